"""Every configuration key, typed and documented once. Imports neither torch nor vllm.

A field typed `Part` is a small component: `{_target_: dotted.path.Class, key: value, ...}`. Its
keys are the arguments of that class; `rft.config.parts` builds it and checks the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

Part = dict[str, Any]


@dataclass
class ModelConfig:
    path: str = MISSING
    """Hugging Face folder or hub id of the policy to finetune."""
    dtype: str = "float32"
    """Weights' dtype in learner and engines: float32 or bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    attention: str = "sdpa"
    """transformers' attention implementation in the learner: sdpa, eager, flash_attention_2."""
    liger: bool = False
    """Liger's fused norms, rotary embeddings and MLPs in the learner; CUDA alone."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Sizes as in the model's config.json, for a dry run where the model itself is not at hand."""


@dataclass
class PoolConfig:
    source: str = MISSING
    """A .jsonl or .parquet file, a folder, or the id of a dataset on the Hugging Face hub."""
    files: str = ""
    """Where the source is a folder or a dataset id: which of its files, as a glob; all that match
    make one pool. Empty: a `save_to_disk` folder, or the dataset as the hub presents it."""
    subset: str = ""
    """The dataset's configuration on the hub, where it has several."""
    split: str = "train"
    """Split to read, where the source has several."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the source's, where they differ: id, prompt, answer, weak, strong, domain,
    verifier, question (the prompt without instructions, where tasks are told apart by that). `a.b`
    is field b of struct column a."""
    adapt: str = ""
    """Dotted path of a function from a source's row to one with our columns, where a mapping of
    names is not enough; `rft.tasks.adapters` has those of the presets. When its file changes the
    pool is prepared again; what that imports is not looked at."""
    verifier: str = ""
    """Name of the verifier of all rows, where the source has no column for it."""
    domain: str = ""
    """Domain of all rows, where the source has no column for it."""
    user: str = "{prompt}"
    """What the user says: the prompt with instructions around it, on how to answer, say."""
    nan_pass_rates: str = "error"
    """A NaN pass rate in a file is an error, or means unknown, as in GURU's files."""
    rates: dict[str, str] = field(default_factory=dict)
    """weak or strong -> a file of pass rates that rft.reference_eval wrote; what it knows goes
    before the source's own column."""
    max_tasks: int = 0
    """Tasks that are used, the first ones; 0 is all."""


@dataclass
class TasksConfig:
    train: PoolConfig = field(default_factory=PoolConfig)
    """The training pool."""
    evaluation: dict[str, PoolConfig] = field(default_factory=dict)
    """Held-out sets by name; the first one decides which checkpoint is the best."""
    chat: str = "auto"
    """Whether prompts go through the model's chat template: always, never (messages are joined as
    text), or auto: those that are lists of messages."""
    system: str = ""
    """System prompt of chat prompts that bring none."""
    thinking: str = "auto"
    """For chat templates that know thinking (Qwen3): enabled, disabled, or auto, its default."""
    assistant: str = ""
    """What the model's turn starts with, `<think>\\n` for instance; a part of the prompt."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    too_long: str = "drop"
    """Tasks with a longer prompt are left out, and counted, or are an error that names the row."""
    overlap: str = "error"
    """Training tasks that are in an evaluation set too, but for case, spaces and punctuation:
    error, drop (from training) or allow."""


@dataclass
class SchedulerConfig:
    estimator: Part = field(default_factory=dict)
    """How likely is the policy to solve each task?"""
    selector: Part = field(default_factory=dict)
    """Which tasks this step?"""
    planner: Part = field(default_factory=dict)
    """How many rollouts for each?"""
    survey_every: int = 0
    """Steps between two surveys: the whole pool is sampled before a step and the estimator told its
    pass rates (scheduler=surveyed). 0: none. It costs as much as it sounds: for upper bounds."""
    survey_samples: int = 8
    """Completions a task of a survey; they are neither trained on nor counted as the run's."""


@dataclass
class RolloutConfig:
    engine: Part = field(default_factory=dict)
    """The engine class and its own options."""
    engines: int = 1
    """Number of engines; requests are spread over them by expected tokens."""
    tensor_parallel: int = 1
    """GPUs of one engine, all in one node."""
    temperature: float = 1.0
    """Sampling temperature in training; the learner applies it too."""
    top_p: float = 1.0
    """Mass of the nucleus that is sampled from. Below 1 behaviour log-probs are those of the
    nucleus and the learner's are not: what lies between, objective.correction weighs."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response; the first to appear is its end."""
    max_tokens: int = 16
    """Most tokens to generate for one rollout."""
    budget: Part | None = None
    """What happens within a response, forced text at a number of tokens, say: budget=thinking_cap,
    markers or none."""
    staleness: int = 0
    """Training steps that may lie between the weights that sample a token and the step that learns
    from it. 0 is on policy; above, generation goes on while the learner works."""
    partial: bool = False
    """A step takes whichever groups are complete first, and the others go on with newer weights
    (APRIL). Needs a staleness of at least 2."""
    overlap_rounds: bool = True
    """Planners that can are asked for more while groups of a round are still being generated. false
    waits for the whole round: with several engines, what makes runs equal to the last bit."""
    skip_ratio: float = 0.0
    """Share of the decoder layers that are left out while sampling, drawn anew for each step
    (Nested-ReFT); controllers.skip_ratio varies it."""
    skip_protect: int = 2
    """First and last layers, as many of each, that are never left out."""
    tree_share: float = 0.0
    """Share of each task's rollouts that are of a tree (LATR), where the engine grows any:
    rollout=latr; controllers.tree_share varies it."""
    transport: str = "auto"
    """How weights reach engines: shared (memory of one node), and for vLLM on GPU ipc (where
    learner and engines share GPUs) or nccl (where they do not); auto takes the last that can be."""
    delta_sync: bool = False
    """Send only what an optimizer step changed; through shared memory, so on one node."""
    heartbeat: float = 8.0
    """Seconds without a sign of life after which an engine's process is taken for dead and
    replaced."""
    deadline: float = 600.0
    """Seconds one step or one call of an engine may take before it is taken for hung and
    replaced."""
    restarts: int = 3
    """Deaths of an engine in a row, without a finished rollout in between, that are mended; the
    next one ends the run. Those over a prompt that is tried alone are not counted."""


@dataclass
class RewardConfig:
    verifier: Part = field(default_factory=dict)
    """The verifier class and its own options."""
    shapers: dict[str, Part] = field(default_factory=dict)
    """What else is rewarded, by a name of your choice, applied in order; task selection sees
    correctness alone. `+shaper@reward.shapers.length=alp` adds one."""
    workers: int = 1
    """Verifier processes."""
    sandbox: str = "auto"
    """How programs are isolated: bwrap, userns, auto (the first of these that proves itself here),
    or unsafe, which does not isolate."""
    timeout: float = 10.0
    """Seconds one check may take; then its process is killed and the score counts as a timeout."""
    memory_gib: float = 16.0
    """Address space of a verifier process, and so the most memory it can take."""


@dataclass
class LearnerConfig:
    workers: int = 1
    """Learner ranks: one a GPU, or processes on CPU."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3."""
    offload: str = "none"
    """What DeepSpeed keeps on the host: none, optimizer, or all (parameters too, ZeRO 3)."""
    sequence_parallel: int = 1
    """Ranks that share each micro-batch's columns (Ulysses), for completions too long for one."""
    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Rate that the schedule ends at."""
    schedule: Part = field(default_factory=dict)
    """The rate after warm-up, from `lr` to `min_lr`."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 turns it off."""
    updates: int = 1
    """Optimizer steps a batch of rollouts; above 1 the old log-probs are computed first."""
    token_budget: int = 16384
    """Most tokens, padding included, in one micro-batch of one rank."""
    layout: str = "auto"
    """Rows of a micro-batch: padded (a sequence each), packed (several), shared (rollouts of a task
    after their prompt, computed once), or auto, the least work of those exact for the model."""
    mismatch_limit: float = 1.0
    """Largest mismatch/kl between learner and engines that is learnt from; above it the run stops.
    0 sets no limit."""
    lora: Part | None = None
    """Adapters to train in place of the weights: lora=lora, adalora or dynamic_rank."""
    port: int = 0
    """Port of the ranks' rendezvous on the first rank's host; 0 takes a free one."""
    deadline: float = 3600.0
    """Seconds one optimizer step may take before the run stops and says so."""


@dataclass
class ClusterConfig:
    mode: str = "ray"
    """ray: every part in a process of its own; inline: all in this one, for a debugger."""
    address: str = "local"
    """local starts a Ray cluster on this machine; auto or host:port joins a running one."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where a GPU is found."""
    placement: str = "disaggregated"
    """On GPU: disaggregated (engines and learner on their own GPUs) or colocated (shared; engines
    sleep while the learner works)."""
    gpus_per_node: int = 8
    """GPUs of a node, of which the run fills one after another; no engine is split over two."""
    threads: int = 0
    """CPU threads of each engine and each learner rank; 0 shares the machine's cores out."""


@dataclass
class EvaluationConfig:
    every: int = 20
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    samples: int = 4
    """Completions a task; accuracy is their mean (avg@k)."""
    temperature: float = 1.0
    """Sampling temperature in evaluation; 0 is greedy."""
    max_tasks: int = 0
    """Tasks of each set that are used, the first ones; 0 is all."""
    rollouts_a_part: int = 2048
    """Completions that each engine makes between two writes of rft.evaluate and
    rft.reference_eval: what an interruption costs, and what keeps engines full."""


@dataclass
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; one is also written at the end and on SIGTERM or Ctrl-C."""
    keep: int = 2
    """Checkpoints kept, newest first; the best one by evaluation is kept as well."""


@dataclass
class TrackingConfig:
    console: str = "auto"
    """rich (live), plain (a line a step), off; auto is rich on a terminal and plain elsewhere."""
    wandb: bool = False
    """Log to Weights & Biases (WANDB_MODE=offline works)."""
    wandb_project: str = "rft"
    """Project name there."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    rollouts: bool = True
    """Keep every rollout, as compressed JSON lines."""
    report: bool = True
    """Write curves.png and report.html at the end."""


@dataclass
class Config:
    name: str = MISSING
    """The run's name; its folder is `runs_dir/name`."""
    arm: str = ""
    """What rft.report calls the runs of one method, over seeds and base models; empty: named by the
    keys in which they differ from others."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    seed: int = 0
    """Every random draw derives from it."""
    steps: int = 100
    """Training steps."""
    tasks_per_step: int = 32
    """Tasks the selector picks for a step."""
    rollouts_per_task: int = 8
    """Rollouts a task that the constant planner asks for, and BOTS' scale for pseudo counts."""
    resume: str = "auto"
    """auto: continue the run of this name if there is one; never: refuse to touch its folder."""
    dry_run: bool = False
    """Print the resolved config, batch arithmetic, placement and memory estimate, and stop."""
    prepare: Part | None = None
    """A function called first, to make files that the run names and that are not there yet."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    advantage: Part = field(default_factory=dict)
    """From the rewards of groups to advantages."""
    objective: Part = field(default_factory=dict)
    """The policy loss."""
    transforms: dict[str, Part] = field(default_factory=dict)
    """Which rollouts are trained on, by a name of your choice, applied in order.
    `+transform@transforms.thin=balance` adds one."""
    controllers: dict[str, Part] = field(default_factory=dict)
    """What sets temperature, kl_scale, skip_ratio and tree_share from step to step, by the knob's
    name. `+controller@controllers.kl_scale=adaptive_kl` adds one."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
