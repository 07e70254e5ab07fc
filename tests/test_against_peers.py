"""Our advantages and objectives beside the code of TRL 1.16 and verl 0.9.1, on random batches: loss
and gradient are equal to 1e-6 where both mean the same, and elsewhere differ as docs/objectives.md
says. Takes about 15 s, half of it their imports.

TRL's two methods that hold its numbers, `_generate_and_score_completions` (advantages, corrections)
and `_compute_loss`, run as they are on a trainer that has rewards and log-probs given to it instead
of a model. verl's are plain functions.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rft.config.parts import build
from rft.learner.micro_batch import MicroBatch
from rft.learner.objectives import PolicyLoss
from rft.records import Group, Knobs, Totals

pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM versions")

ROOT = Path(__file__).parent.parent
PEERS = Path(sys.prefix) / "peers"
KNOBS = Knobs(step=0, progress=0.0, lr=1e-6)
Part = dict[str, Any]


@pytest.fixture(scope="module")
def trl() -> Iterator[SimpleNamespace]:
    """The two trainers of TRL and their configs."""
    pytest.importorskip("trl", reason="TRL is not here; it comes with the extra `test`")
    with pytest.MonkeyPatch.context() as patch:
        if "vllm" not in sys.modules:
            # It would be imported, which takes seconds and sets a dozen variables; none is needed.
            patch.setitem(sys.modules, "vllm", None)
        grpo = importlib.import_module("trl.trainer.grpo_trainer")
        rloo = importlib.import_module("trl.trainer.rloo_trainer")
    yield SimpleNamespace(
        GRPOTrainer=grpo.GRPOTrainer,
        GRPOConfig=grpo.GRPOConfig,
        RLOOTrainer=rloo.RLOOTrainer,
        RLOOConfig=rloo.RLOOConfig,
    )
    state = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def verl() -> Iterator[ModuleType]:
    """verl's `core_algos`, of which neither path nor modules nor environment stay behind."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PEERS)
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # as verl and
        patch.setenv("LAZY_LEGACY_OP", "False")  # tensordict would, and leave it so
        algorithms = pytest.importorskip(
            "verl.trainer.ppo.core_algos",
            reason="verl is not here; `make` puts it beside the environment, into peers",
            exc_type=ImportError,
        )
        importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    yield algorithms
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(PEERS):
            del sys.modules[name]


# ---- a batch, as they see it and as we do


@dataclass(frozen=True)
class Rows:
    """B padded rows of width T, in groups of `sizes`: float64 tensors [B, T], `mask` [B, T] bool,
    true for trained tokens, and `rewards` [B]. What is not trained holds junk."""

    logp: torch.Tensor
    old: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    sizes: tuple[int, ...]

    @property
    def full(self) -> int:
        """Rows with trained tokens."""
        return int(self.mask.any(1).sum())

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def index(self) -> np.ndarray:
        """Number of each row's group, [B]."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)


def random_rows(
    seed: int,
    sizes: tuple[int, ...] = (4, 4, 4),
    *,
    width: int = 9,
    drift: float = 0.4,
    holes: bool = True,
    empty: bool = False,
) -> Rows:
    """`drift` is the standard deviation of each log-ratio; `holes` are tokens in the middle that
    are not trained on; with `empty` one row has no trained token."""
    rng = np.random.default_rng(seed)
    shape = (sum(sizes), width)
    lengths = rng.integers(1, width + 1, shape[0])
    lengths[0] = width
    mask = np.arange(width) < lengths[:, None]
    if holes:
        mask &= (rng.random(shape) < 0.8) | (np.arange(width) == 0)
    if empty:
        mask[rng.integers(1, shape[0])] = False

    def noisy(values: np.ndarray, scale: float) -> np.ndarray:
        return values + scale * rng.standard_normal(shape)

    old = -np.abs(noisy(np.zeros(shape), 1.5))
    columns = {
        "logp": noisy(old, drift),
        "old": old,
        "behaviour": noisy(old, drift),
        "reference": noisy(old, 0.8),
        "entropy": rng.random(shape) * 3.0,
    }
    junk = {name: np.where(mask, x, rng.uniform(0, 9, shape)) for name, x in columns.items()}
    return Rows(
        **{name: torch.tensor(x) for name, x in junk.items()},
        mask=torch.tensor(mask),
        rewards=torch.tensor(rng.choice([0.0, 0.25, 0.5, 1.0], shape[0])),
        sizes=sizes,
    )


@st.composite
def batches(draw: st.DrawFn, *, equal: bool = True, **fixed: Any) -> Rows:
    """Random rows; `equal` groups, as TRL needs, or groups of any size from 1."""
    if equal:
        sizes = (draw(st.integers(2, 4)),) * draw(st.integers(1, 4))
    else:
        sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
        sizes += (2,)
    keys = {
        "width": draw(st.integers(2, 9)),
        "drift": draw(st.sampled_from([0.05, 0.4, 1.2])),
        "holes": draw(st.booleans()),
        "empty": draw(st.booleans()),
    }
    return random_rows(draw(st.integers(0, 2**31)), sizes, **(keys | fixed))


@dataclass(frozen=True)
class Found:
    """A loss and its gradient to the log-probs, [B, T]."""

    loss: float
    gradient: np.ndarray


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-6)


def same(a: Found, b: Found, *, ratio: float = 1.0) -> None:
    """`b` is `ratio` times `a`."""
    close(a.loss * ratio, b.loss)
    close(a.gradient * ratio, b.gradient)


def part(module: str, name: str, **keys: Any) -> Part:
    return {"_target_": f"rft.learner.{module}.{name}", **keys}


def ppo(low: float = 0.2, high: float = 0.2, **keys: Any) -> Part:
    return part("clips", "Ppo", low=low, high=high, **keys)


def grpo(delta: float = 1e-4, **keys: Any) -> Part:
    """GRPO's advantage; the default is TRL's delta."""
    return part("advantages", "GroupAdvantage", delta=delta, **keys)


RLOO = part("advantages", "LeaveOneOut")
REWARD = part("advantages", "RewardAdvantage")
PPO = ppo()
COLUMNS = ("logp", "old", "behaviour", "reference", "entropy")
K3 = part("kl", "Kl", form="k3", coef=0.1)


def advantages(rows: Rows, advantage: Part) -> torch.Tensor:
    """Ours of each row, [B]."""
    groups = [
        Group(task="t", rollouts=(), scores=(), shaped=rewards.numpy())
        for rewards in rows.rewards.split(list(rows.sizes))
    ]
    return torch.tensor(np.concatenate(build(advantage)(groups)))


def micro_batch(rows: Rows, logp: torch.Tensor, advantage_B: torch.Tensor, at: slice) -> MicroBatch:
    """The trained tokens of the rows `at`, end to end."""
    mask = rows.mask[at]
    lengths_B = mask.sum(1)
    lengths_S = lengths_B[lengths_B > 0]
    return MicroBatch(
        logp_N=logp[at][mask],
        entropy_N=rows.entropy[at][mask],
        old_N=rows.old[at][mask],
        behaviour_N=rows.behaviour[at][mask],
        references=(rows.reference[at][mask],),
        advantage_N=advantage_B[at].repeat_interleave(lengths_B),
        age_N=torch.zeros(int(lengths_S.sum()), dtype=torch.int64),
        sequence_N=torch.arange(len(lengths_S)).repeat_interleave(lengths_S),
        length_N=lengths_S.repeat_interleave(lengths_S),
        sequences=len(lengths_S),
    )


def prepared(
    rows: Rows, logp: torch.Tensor, advantage_B: torch.Tensor, loss: PolicyLoss
) -> list[MicroBatch]:
    """Two micro-batches, as the learner would hand them to `loss`."""
    half = len(rows.mask) // 2
    split = [micro_batch(rows, logp, advantage_B, at) for at in (slice(0, half), slice(half, None))]
    split = [batch for batch in split if batch.sequences]
    if loss.prepares:
        new = loss.prepare(split, lambda x: x, KNOBS)
        split = [replace(b, advantage_N=a) for b, a in zip(split, new, strict=True)]
    if loss.adapts:
        loss.adapt(split, lambda x: x, KNOBS)
    return split


def ours(
    rows: Rows,
    advantage: Part | torch.Tensor,
    *,
    clip: Part = PPO,
    max_tokens: int | None = None,
    **keys: Any,
) -> Found:
    """Of two micro-batches. `advantage` is a part, or what it would give: [B]."""
    loss = PolicyLoss(clip=clip, **keys)
    known = advantages(rows, advantage) if isinstance(advantage, dict) else advantage
    logp = rows.logp.clone().requires_grad_()
    totals = Totals(
        tokens=rows.tokens,
        sequences=rows.full,
        rows=len(rows.mask),
        max_tokens=max_tokens or rows.mask.shape[1],
    )
    total = torch.zeros((), dtype=torch.float64)
    for batch in prepared(rows, logp, known, loss):
        total = total + loss(batch, totals, KNOBS)[0]
    total.backward()
    assert logp.grad is not None
    return Found(float(total.detach()), logp.grad.numpy())


# ---- TRL

# What its constructors copy from the config. Those of GRPO that RLOO lacks are None there.
TRL_KEYS = re.findall(
    r"\w+",
    """
    beta delta importance_sampling_level loss_type mask_truncated_completions max_completion_length
    multi_objective_aggregation normalize_advantages num_generations num_iterations
    off_policy_mask_threshold reward_clip_range scale_rewards top_entropy_quantile use_vllm
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode
    """,
)


@cache
def trl_config(kind: Any, rows: int, generations: int, keys: tuple[tuple[str, Any], ...]) -> Any:
    steps = dict(keys).get("steps_per_generation", 1)
    return kind(
        per_device_train_batch_size=rows // steps,
        num_generations=generations,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **dict(keys),
    )


@cache
def offline(base: Any) -> Any:
    """A trainer class whose instances have log-probs instead of a model, and run on one process."""

    class Offline(base):  # type: ignore[misc]
        def __init__(self, args: Any, rows: Rows) -> None:
            self.args, self.rows, self.at = args, rows, slice(None)
            for key in TRL_KEYS:
                setattr(self, key, getattr(args, key, None))
            self.epsilon_low = args.epsilon
            self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
            self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
            self.ref_model = SimpleNamespace()
            self.policy = rows.old
            self.accelerator = SimpleNamespace(
                device=torch.device("cpu"),
                num_processes=1,
                process_index=0,
                gather=lambda x: x,
                reduce=lambda x, reduction: x,
                pad_across_processes=lambda x, dim, pad_index: x,
            )
            self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
            self.reward_funcs, self.reward_func_names = [None], ["reward"]
            self.reward_weights = torch.ones(1, dtype=rows.rewards.dtype)
            self.environment_factories = self.environments = self.tools = None
            self._tokenizer = SimpleNamespace(pad_token_id=0)
            self.eos_token_ids, self.pad_to_multiple_of = [2], None
            self.aux_loss_enabled = self._entropy_bonus_enabled = False
            self._metrics = {"train": defaultdict(list)}
            self._logs = defaultdict(list) | {"rewards": defaultdict(list)}
            self._pending_extra_logs: dict[str, Any] = {}
            self._pending_metrics: dict[str, Any] = {}

        def _generate(self, prompts: list[str]) -> Any:
            mask = self.rows.mask.numpy()
            width = mask.shape[1]
            texts = [""] * len(mask)
            if hasattr(self, "loss_type") and self.loss_type:
                ids = [[1] * width] * len(mask)
                logps = [list(row) for row in self.rows.behaviour.numpy()]
                given = logps if self.use_vllm else None
                return [[1]] * len(mask), ids, mask.astype(int).tolist(), texts, given, {}, None, []
            # RLOO has no mask of tokens, but leaves out rows that do not end in eos.
            lengths = mask.sum(1)
            ids = [[1] * (n - 1) + [2] if n else [1] for n in lengths]
            return [[1]] * len(mask), ids, texts

        def _calculate_rewards(self, *_: Any) -> torch.Tensor:
            return self.rows.rewards[:, None].clone()

        def _get_per_token_logps_and_entropies(
            self, model: Any, _ids: Any, _mask: Any, keep: int, *_: Any, **__: Any
        ) -> Any:
            known = self.policy if model is self.model else self.rows.reference
            return known[self.at, :keep], self.rows.entropy[self.at, :keep], None

    return Offline


def scored(trl: SimpleNamespace, rows: Rows, kind: str = "GRPO", **keys: Any) -> tuple[Any, Any]:
    """A trainer of TRL and what it makes of the rows' rewards and log-probs. It takes two
    optimizer steps on them, and so needs old log-probs."""
    config = getattr(trl, f"{kind}Config")
    keys = {"num_iterations": 2} | keys
    if kind == "RLOO":
        keys["mask_truncated_completions"] = True
    args = trl_config(config, len(rows.mask), rows.sizes[0], tuple(sorted(keys.items())))
    trainer = offline(getattr(trl, f"{kind}Trainer"))(args, rows)
    prompts = [{"prompt": "p"}] * len(rows.mask)
    return trainer, trainer._generate_and_score_completions(prompts)


def of_trl(
    trl: SimpleNamespace, rows: Rows, kind: str = "GRPO", parts: int = 1, **keys: Any
) -> Found:
    """TRL's loss of the rows, in so many micro-batches of equally many rows."""
    trainer, inputs = scored(trl, rows, kind, **keys)
    logp = rows.logp.clone().requires_grad_()
    trainer.policy, trainer.current_gradient_accumulation_steps = logp, parts
    total, size = 0.0, len(rows.mask) // parts
    for i in range(parts):
        trainer.at = slice(i * size, (i + 1) * size)
        cut = {k: x[trainer.at] if x.dim() else x for k, x in inputs.items()}
        loss = trainer._compute_loss(trainer.model, cut)
        loss.backward()
        total += float(loss.detach())
    assert logp.grad is not None
    return Found(total, logp.grad.numpy())


# ---- verl


def of_verl(
    verl: ModuleType,
    rows: Rows,
    advantage_B: torch.Tensor,
    kind: str = "vanilla",
    *,
    aggregation: str = "token-mean",
    weights: torch.Tensor | None = None,
    kl: tuple[str, float] | None = None,
    old: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **keys: Any,
) -> Found:
    """The loss `kind` plus `kl`'s form times its coefficient; `keys` are of its config."""
    config = verl.ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, loss_agg_mode=aggregation, **keys
    )
    mask = rows.mask if mask is None else mask
    logp = rows.logp.clone().requires_grad_()
    name = {"old_log_prob": rows.old if old is None else old}
    if kind == "reinforce":
        name, function = {"rollout_log_prob": rows.behaviour}, verl.compute_policy_loss_reinforce
    else:
        function = verl.get_policy_loss_fn(kind)
    loss, _ = function(
        **name,
        log_prob=logp,
        advantages=advantage_B[:, None].expand_as(logp),
        response_mask=mask,
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    if kl is not None:
        penalty = verl.kl_penalty(logp, rows.reference, kl[0])
        loss = loss + kl[1] * verl.agg_loss(penalty, mask, aggregation, **config.global_batch_info)
    loss.backward()
    assert logp.grad is not None
    return Found(float(loss.detach()), logp.grad.numpy())


def verl_weights(rows: Rows, ratio: torch.Tensor, level: str, threshold: Any) -> torch.Tensor:
    helper = sys.modules["verl.trainer.ppo.rollout_corr_helper"]
    mask = rows.mask.double()
    return helper.compute_rollout_correction_weights(ratio, mask, level, threshold)[0]


def verl_advantages(verl: ModuleType, name: str, rows: Rows, **keys: Any) -> torch.Tensor:
    """[B, T], from rewards on each row's last trained token."""
    function = getattr(verl, f"compute_{name}_advantage")
    return function(last_token_rewards(rows), rows.mask.double(), index=rows.index, **keys)[0]


def last_token_rewards(rows: Rows) -> torch.Tensor:
    width = rows.mask.shape[1]
    last_B = (rows.mask * torch.arange(1, width + 1)).argmax(1)
    return torch.zeros_like(rows.logp).scatter(1, last_B[:, None], rows.rewards[:, None])


def random_test(*strategies: Any, examples: int = 25, **named: Any) -> Any:
    """Hypothesis without a deadline: the first example may compile."""

    def decorate(test: Any) -> Any:
        return settings(deadline=None, max_examples=examples)(given(*strategies, **named)(test))

    return decorate


# ---- advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@random_test(rows=batches(), silent=st.sets(st.integers(0, 15)))
def test_advantages_are_those_of_trl_also_where_a_reward_is_missing(
    trl: SimpleNamespace, scale: str, rows: Rows, silent: set[int]
) -> None:
    missing = torch.tensor([i in silent for i in range(len(rows.rewards))])
    rows = replace(rows, rewards=rows.rewards.masked_fill(missing, float("nan")))
    _, found = scored(trl, rows, scale_rewards=scale)
    close(advantages(rows, grpo(scale=scale)), found["advantages"])


@random_test(rows=batches(holes=False), silent=st.sets(st.integers(0, 15)))
def test_leave_one_out_is_that_of_trl(trl: SimpleNamespace, rows: Rows, silent: set[int]) -> None:
    missing = torch.tensor([i in silent for i in range(len(rows.rewards))])
    rows = replace(rows, rewards=rows.rewards.masked_fill(missing, float("nan")))
    _, found = scored(trl, rows, "RLOO", beta=0.0)
    close(advantages(rows, RLOO), found["advantages"])


@pytest.mark.parametrize(
    ("name", "keys", "advantage"),
    [
        ("grpo_outcome", {}, grpo(1e-6)),
        ("grpo_outcome", {"norm_adv_by_std_in_grpo": False}, grpo(scale="none")),
        ("rloo_outcome", {}, RLOO),
    ],
)
@random_test(rows=batches(equal=False))
def test_advantages_are_those_of_verl_but_for_groups_of_one(
    verl: ModuleType, name: str, keys: Part, advantage: Part, rows: Rows
) -> None:
    found = verl_advantages(verl, name, rows, **keys)
    mine = advantages(rows, advantage)
    alone = torch.tensor(np.repeat(rows.sizes, rows.sizes) == 1)
    assert (mine[alone] == 0.0).all()
    expected = torch.where(alone, rows.rewards, mine)
    close(found, expected[:, None] * rows.mask)


def test_a_group_of_one_has_its_reward_as_advantage_in_verl_and_is_refused_by_trl(
    trl: SimpleNamespace, verl: ModuleType
) -> None:
    rows = replace(random_rows(0, (1, 2)), rewards=torch.tensor([0.5, 0.0, 1.0]).double())
    assert float(verl_advantages(verl, "grpo_outcome", rows)[0, 0]) == pytest.approx(0.5)
    assert float(advantages(rows, grpo())[0]) == 0.0
    with pytest.raises(ValueError, match="at least 2 generations"):
        trl.GRPOConfig(per_device_train_batch_size=1, num_generations=1, use_cpu=True, bf16=False)


def test_equal_rewards_that_float32_cannot_average_have_an_advantage_in_both_and_none_here(
    trl: SimpleNamespace, verl: ModuleType
) -> None:
    rows = random_rows(0, (8,), holes=False)
    rows = replace(rows, rewards=torch.full((8,), 0.3, dtype=torch.float32))
    _, found = scored(trl, rows)
    assert found["advantages"].abs().max() == pytest.approx(3e-4, rel=0.1)
    of_verl_ = verl.compute_grpo_outcome_advantage(
        torch.full((8, 1), 0.3), torch.ones(8, 1), rows.index
    )[0]
    assert of_verl_.abs().max() == pytest.approx(0.029, rel=0.1)
    for delta in (1e-4, 1e-6, 0.0):
        assert (advantages(rows, grpo(delta)) == 0.0).all()


def test_a_missing_reward_spreads_over_its_group_in_verl_and_abstains_here(
    verl: ModuleType,
) -> None:
    rows = random_rows(0, (3,), holes=False)
    rows = replace(rows, rewards=torch.tensor([float("nan"), 1.0, 0.0]).double())
    assert verl_advantages(verl, "grpo_outcome", rows)[:, 0].isnan().all()
    close(advantages(rows, grpo(0.0)), [0.0, 0.5**0.5, -(0.5**0.5)])


@pytest.mark.parametrize("coef", [0.0, 0.05])
@random_test(rows=batches(equal=False))
def test_reinforce_pp_whitens_returns_as_verl_does(
    verl: ModuleType, coef: float, rows: Rows
) -> None:
    rewards = verl.compute_rewards(last_token_rewards(rows), rows.old, rows.reference, coef)
    found, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, rows.mask.double(), config=SimpleNamespace(gamma=1.0)
    )
    loss = PolicyLoss(clip=PPO, whiten=part("whiten", "Whiten", ddof=1, kl_coef=coef))
    mine = prepared(rows, rows.logp, advantages(rows, REWARD), loss)
    whitened = torch.cat([batch.advantage_N for batch in mine])
    assume(whitened.std() > 0.5)  # of equal returns verl leaves some 1e-8 / 1e-4
    close(whitened, found[rows.mask])


@random_test(rows=batches(equal=False))
def test_reinforce_pp_with_a_baseline_whitens_as_verl_does(verl: ModuleType, rows: Rows) -> None:
    found = verl_advantages(verl, "reinforce_plus_plus_baseline_outcome", rows)
    # Of a group of one verl keeps the reward; here the group's mean is taken off it too.
    baseline = advantages(rows, grpo(scale="none"))
    alone = torch.tensor(np.repeat(rows.sizes, rows.sizes) == 1)
    loss = PolicyLoss(clip=PPO, whiten=part("whiten", "Whiten", ddof=1))
    mine = prepared(rows, rows.logp, torch.where(alone, rows.rewards, baseline), loss)
    whitened = torch.cat([batch.advantage_N for batch in mine])
    assume(whitened.std() > 0.5)
    close(whitened, found[rows.mask])


def test_returns_that_are_all_equal_are_whitened_to_0_here_and_nearly_so_in_verl(
    verl: ModuleType,
) -> None:
    rows = replace(random_rows(0), rewards=torch.ones(12).double())
    loss = PolicyLoss(clip=PPO, whiten=part("whiten", "Whiten", ddof=1))
    mine = prepared(rows, rows.logp, advantages(rows, REWARD), loss)
    assert all((batch.advantage_N == 0.0).all() for batch in mine)
    found, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        last_token_rewards(rows), rows.mask.double(), config=SimpleNamespace(gamma=1.0)
    )
    assert 0.0 < float(found.max()) < 1e-4


@random_test(rows=batches(holes=False, empty=False))
def test_the_kl_in_rloos_reward_is_that_of_trl_with_one_group_and_has_another_baseline_with_more(
    trl: SimpleNamespace, rows: Rows
) -> None:
    _, found = scored(trl, rows, "RLOO", beta=0.05)
    loss = PolicyLoss(clip=PPO, whiten=part("whiten", "KlReward", coef=0.05))
    known = advantages(rows, RLOO)
    mine = prepared(rows, rows.logp, known, loss)
    first = torch.cat([torch.ones(0), rows.mask.sum(1).cumsum(0)[:-1]]).long()
    first = torch.cat([torch.zeros(1, dtype=torch.int64), first])
    by_row = torch.cat([batch.advantage_N for batch in mine])[first]
    if len(rows.sizes) == 1:
        close(by_row, found["advantages"])
    else:
        # The cost itself is the same: what is left of the difference is a baseline alone.
        cost = 0.05 * ((rows.old - rows.reference) * rows.mask).sum(1)
        size, count = rows.sizes[0], len(cost)
        group = cost.view(-1, size).sum(1).repeat_interleave(size)
        close(found["advantages"], known - cost + (group - cost) / (size - 1))
        close(by_row, known - cost + (cost.sum() - cost) / (count - 1))


# ---- losses: TRL

AGREE_TRL = {
    "bnpo is token_mean": ({"loss_type": "bnpo"}, {}),
    "dapo is token_mean": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"clip": ppo(high=0.28)},
    ),
    "dr_grpo is constant": (
        {"loss_type": "dr_grpo", "max_completion_length": 13},
        {"aggregation": "constant", "max_tokens": 13},
    ),
    "delta is a dual clip": ({"loss_type": "dapo", "delta": 1.5}, {"clip": ppo(dual=1.5)}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.28},
        {"clip": part("clips", "Cispo", cap=1.28)},
    ),
    "sequence ratios over tokens": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.02},
        {"ratio": "sequence", "clip": ppo(0.02, 0.02)},
    ),
    "sequence ratios over a constant": (
        {
            "loss_type": "dr_grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "max_completion_length": 9,
        },
        {"ratio": "sequence", "clip": ppo(0.02, 0.02), "aggregation": "constant", "max_tokens": 9},
    ),
    "cispo with sequence ratios": (
        {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.05},
        {"ratio": "sequence", "clip": part("clips", "Cispo", cap=1.05)},
    ),
    "a KL term": (
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
        {"kl": {"base": K3}},
    ),
}
OVER_ROWS = {
    "grpo is sequence_mean": ({"loss_type": "grpo"}, {"aggregation": "sequence_mean"}),
    "grpo with a KL term": (
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
        {"aggregation": "sequence_mean", "kl": {"base": K3}},
    ),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.03,
            "epsilon_high": 0.04,
        },
        {"ratio": "sequence", "clip": ppo(0.03, 0.04), "aggregation": "sequence_mean"},
    ),
    "luspo is sequence_sum of sequence ratios": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02},
        {"ratio": "sequence", "clip": ppo(0.02, 0.02), "aggregation": "sequence_sum"},
    ),
}


@pytest.mark.parametrize("case", AGREE_TRL)
@random_test(rows=batches(), scale=st.sampled_from(["group", "none"]))
def test_the_loss_is_that_of_trl(trl: SimpleNamespace, case: str, rows: Rows, scale: str) -> None:
    theirs, keys = AGREE_TRL[case]
    same(ours(rows, grpo(scale=scale), **keys), of_trl(trl, rows, scale_rewards=scale, **theirs))


@pytest.mark.parametrize("case", OVER_ROWS)
@random_test(rows=batches())
def test_a_mean_over_rows_is_that_of_trl_but_it_counts_rows_without_trained_tokens(
    trl: SimpleNamespace, case: str, rows: Rows
) -> None:
    theirs, keys = OVER_ROWS[case]
    ratio = rows.full / len(rows.mask)
    same(ours(rows, grpo(), **keys), of_trl(trl, rows, **theirs), ratio=ratio)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("parts", [2, 3])
def test_split_into_micro_batches_trl_stays_the_same_as_we_do(
    trl: SimpleNamespace, loss_type: str, parts: int
) -> None:
    aggregation = {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "constant"}[loss_type]
    rows = random_rows(3)
    theirs = {"loss_type": loss_type, "max_completion_length": 9}
    theirs |= {"steps_per_generation": parts, "gradient_accumulation_steps": parts}
    theirs |= {"num_iterations": 2}
    same(ours(rows, grpo(), aggregation=aggregation), of_trl(trl, rows, parts=parts, **theirs))


def test_bnpo_in_micro_batches_is_a_mean_of_means(trl: SimpleNamespace) -> None:
    rows = random_rows(3)
    whole = of_trl(trl, rows, loss_type="bnpo")
    same(ours(rows, grpo()), whole)
    theirs = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 2}
    split = of_trl(trl, rows, parts=2, loss_type="bnpo", **theirs)
    tokens = rows.mask.view(2, -1).sum(1)
    factor = (tokens.sum() / (2 * tokens)).repeat_interleave(6)[:, None]
    assert (factor - 1).abs().min() > 0.05
    close(whole.gradient * factor.numpy(), split.gradient)


def test_trls_dapo_divides_by_its_generation_batch_not_by_the_optimizer_step(
    trl: SimpleNamespace,
) -> None:
    """Two optimizer steps on one generation batch: tokens of either are divided by half of all."""
    rows = random_rows(3)
    mine = advantages(rows, grpo())
    found = of_trl(trl, rows, parts=2, loss_type="dapo", steps_per_generation=2)
    for step in (slice(0, 6), slice(6, None)):
        cut = {k: getattr(rows, k)[step] for k in (*COLUMNS, "mask", "rewards")}
        alone = Rows(**cut, sizes=(4,))
        factor = alone.tokens / (rows.tokens / 2) / 2  # the second 2: accumulated by `of_trl`
        close(ours(alone, mine[step]).gradient * factor, found.gradient[step])
        assert abs(factor * 2 - 1) > 0.05


@random_test(rows=batches(holes=False))
def test_rloos_sequence_ratio_is_that_of_trl_but_it_counts_rows_without_trained_tokens(
    trl: SimpleNamespace, rows: Rows
) -> None:
    found = of_trl(trl, rows, "RLOO", beta=0.0, epsilon=0.2)
    mine = ours(rows, RLOO, ratio="product", aggregation="sequence_mean")
    ratio = rows.full / len(rows.mask)
    close(mine.gradient * ratio, found.gradient)
    # A row without tokens has the ratio 1 there: its advantage is in the loss, not in the gradient.
    without = advantages(rows, RLOO)[~rows.mask.any(1)].sum() / len(rows.mask)
    close(mine.loss * ratio - float(without), found.loss)


def test_trl_weighs_kl_by_the_ratio_unless_told_otherwise(trl: SimpleNamespace) -> None:
    rows = random_rows(1)
    keys = {"loss_type": "dapo", "beta": 0.1}
    plain = of_trl(trl, rows, use_bias_correction_kl=False, **keys)
    default = of_trl(trl, rows, **keys)
    same(ours(rows, grpo(), kl={"base": K3}), plain)
    logp = rows.logp.clone().requires_grad_()
    gap = rows.reference - logp
    weighed = (logp - rows.old).exp() * (gap.exp() - gap - 1)
    (0.1 * (weighed * rows.mask).sum() / rows.tokens).backward()
    assert logp.grad is not None
    without = of_trl(trl, rows, loss_type="dapo")
    close(default.gradient, without.gradient + logp.grad.numpy())
    assert np.abs(default.gradient - plain.gradient).max() > 1e-3


def test_an_epsilon_high_of_dapo_is_a_cap_below_1_in_trls_cispo(trl: SimpleNamespace) -> None:
    rows = random_rows(1)
    found = of_trl(trl, rows, loss_type="cispo", epsilon_high=0.28)
    same(ours(rows, grpo(), clip=part("clips", "Cispo", cap=0.28)), found)
    assert np.abs(found.gradient - ours(rows, grpo()).gradient).max() > 1e-2


@pytest.mark.parametrize("share", [0.2, 0.5])
@random_test(rows=batches(empty=False))
def test_the_tokens_of_highest_entropy_are_those_of_trl_or_one_more_or_less(
    trl: SimpleNamespace, share: float, rows: Rows
) -> None:
    keys = {"loss_type": "dapo", "top_entropy_quantile": share}
    trainer, _ = scored(trl, rows, **keys)
    # Its quantile is of float32, as a model's entropies are; float64 would miss it by rounding.
    rows = replace(rows, entropy=rows.entropy.float())
    theirs = int(trainer.get_high_entropy_mask(rows.entropy, rows.mask, 1 - share).sum())
    kept = max(round(share * rows.tokens), 1)
    assert abs(theirs - kept) <= 1
    if theirs == kept:
        weighters = {"top": part("weighters", "TopKEntropy", share=share)}
        same(ours(rows, grpo(), weighters=weighters), of_trl(trl, rows, **keys))


def test_the_defaults_of_trl_are_what_the_table_says(trl: SimpleNamespace) -> None:
    args = trl.GRPOConfig(use_cpu=True, bf16=False, report_to=[])
    assert (args.loss_type, args.beta, args.epsilon, args.epsilon_high) == ("dapo", 0.0, 0.2, None)
    assert (args.scale_rewards, args.importance_sampling_level) == ("group", "token")
    assert args.delta is None
    assert args.use_bias_correction_kl
    assert args.vllm_importance_sampling_correction
    assert args.vllm_importance_sampling_mode == "sequence_mask"
    assert args.vllm_importance_sampling_clip_max == 3.0
    assert args.vllm_importance_sampling_clip_min is None
    rloo = trl.RLOOConfig(use_cpu=True, bf16=False, report_to=[])
    assert (rloo.beta, rloo.epsilon, rloo.normalize_advantages) == (0.05, 0.2, False)


# ---- corrections: TRL


@pytest.mark.parametrize(
    ("mode", "low", "high", "correction"),
    [
        ("token_truncate", None, 1.5, part("corrections", "TokenTruncated", cap=1.5)),
        ("token_truncate", 0.7, 1.5, part("corrections", "TokenTruncated", cap=1.5, floor=0.7)),
        ("token_mask", 0.7, 1.5, part("corrections", "IcePop", low=0.7, high=1.5)),
        ("token_mask", None, 1.5, part("corrections", "IcePop", low=0.0, high=1.5)),
        ("sequence_truncate", None, 2.0, part("corrections", "SequenceTruncated", cap=2.0)),
        ("sequence_mask", None, 3.0, part("corrections", "SequenceMask", max=3.0)),
    ],
)
@random_test(rows=batches())
def test_a_correction_is_that_of_trl_and_leaves_the_kl_alone(
    trl: SimpleNamespace, mode: str, low: float | None, high: float, correction: Part, rows: Rows
) -> None:
    keys = {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_mode": mode}
    keys |= {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    found = of_trl(trl, rows, beta=0.1, use_bias_correction_kl=False, **keys)
    same(ours(rows, grpo(), correction=correction, kl={"base": K3}), found)


def test_token_weights_on_sequence_ratios_stay_with_their_tokens_here_and_are_averaged_in_trl(
    trl: SimpleNamespace,
) -> None:
    rows = random_rows(4)
    keys = {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_vllm": True}
    keys |= {"vllm_importance_sampling_mode": "token_truncate", "epsilon": 0.5}
    found = of_trl(trl, rows, vllm_importance_sampling_clip_max=1.5, **keys)
    tis = part("corrections", "TokenTruncated", cap=1.5)
    gspo = {"ratio": "sequence", "clip": ppo(0.5, 0.5), "aggregation": "sequence_mean"}
    mine = ours(rows, grpo(), correction=tis, **gspo)
    close(mine.loss, found.loss)
    close(mine.gradient.sum(1), found.gradient.sum(1))
    assert np.abs(mine.gradient - found.gradient).max() > 1e-3


# ---- losses: verl

DUAL = ppo(0.2, 0.28, dual=3.0)
HIGHER = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
AGREE_VERL = {
    "vanilla, token-mean": ({"kind": "vanilla"} | HIGHER, {"clip": DUAL}),
    "vanilla, seq-mean-token-mean": (
        {"aggregation": "seq-mean-token-mean"} | HIGHER,
        {"clip": DUAL, "aggregation": "sequence_mean"},
    ),
    "vanilla, seq-mean-token-sum": (
        {"aggregation": "seq-mean-token-sum"} | HIGHER,
        {"clip": DUAL, "aggregation": "sequence_sum"},
    ),
    "vanilla with a dual clip out of reach": ({"clip_ratio_c": 1e9}, {}),
    "gspo": (
        {
            "kind": "gspo",
            "aggregation": "seq-mean-token-mean",
            "clip_ratio_low": 0.03,
            "clip_ratio_high": 0.04,
        },
        {"ratio": "sequence", "clip": ppo(0.03, 0.04), "aggregation": "sequence_mean"},
    ),
    "gspo, token-mean": (
        {"kind": "gspo", "clip_ratio_low": 0.03, "clip_ratio_high": 0.04},
        {"ratio": "sequence", "clip": ppo(0.03, 0.04)},
    ),
    "cispo": (
        {"kind": "cispo"} | HIGHER,
        {"clip": part("clips", "Cispo", cap=1.28, floor=0.8)},
    ),
    "gpg is REINFORCE": ({"kind": "gpg"}, {"clip": part("clips", "Reinforce")}),
    "k1": (
        {"kl": ("k1", 0.1)},
        {"clip": ppo(dual=3.0), "kl": {"base": part("kl", "Kl", form="k1", coef=0.1)}},
    ),
    "k2": (
        {"kl": ("k2", 0.1)},
        {"clip": ppo(dual=3.0), "kl": {"base": part("kl", "Kl", form="k2", coef=0.1)}},
    ),
}


@pytest.mark.parametrize("case", AGREE_VERL)
@random_test(rows=batches(equal=False), advantage=st.sampled_from([grpo(), RLOO]))
def test_the_loss_is_that_of_verl(verl: ModuleType, case: str, rows: Rows, advantage: Part) -> None:
    theirs, keys = AGREE_VERL[case]
    known = advantages(rows, advantage)
    same(ours(rows, known, **keys), of_verl(verl, rows, known, **theirs))


@random_test(rows=batches(equal=False))
def test_const_norm_of_verl_counts_rows_without_trained_tokens_only_as_its_trainer_calls_it(
    verl: ModuleType, rows: Rows
) -> None:
    """Alone, its aggregation counts rows with tokens; its trainer gives it the number of all."""
    known, count = advantages(rows, grpo()), len(rows.mask)
    keys = {"clip": ppo(dual=3.0), "max_tokens": 13}
    trainer = {"global_batch_size": count, "dp_size": 1, "batch_num_tokens": rows.tokens}
    norm = {"aggregation": "seq-mean-token-sum-norm"}
    mine = ours(rows, known, aggregation="constant", **keys)
    alone = of_verl(verl, rows, known, global_batch_info={"loss_scale_factor": 13}, **norm)
    same(mine, alone, ratio=count / rows.full)
    same(
        mine,
        of_verl(verl, rows, known, global_batch_info=trainer | {"loss_scale_factor": 13}, **norm),
    )
    width = rows.mask.shape[1]
    padded = of_verl(verl, rows, known, global_batch_info=trainer, **norm)
    same(mine, padded, ratio=13 / width)
    mine = ours(rows, known, aggregation="sequence_mean", **keys)
    found = of_verl(verl, rows, known, aggregation="seq-mean-token-mean", global_batch_info=trainer)
    same(mine, found, ratio=rows.full / count)


def test_verls_dual_clip_is_always_on(verl: ModuleType) -> None:
    rows = random_rows(2, drift=1.2)
    known = advantages(rows, grpo())
    default = of_verl(verl, rows, known)
    same(ours(rows, known, clip=ppo(dual=3.0)), default)
    assert np.abs(default.gradient - ours(rows, known).gradient).max() > 0.01


# ---- corrections: verl


@pytest.mark.parametrize(
    ("level", "threshold", "correction"),
    [
        ("token", 1.5, part("corrections", "TokenTruncated", cap=1.5)),
        ("token", "0.7_1.5", part("corrections", "IcePop", low=0.7, high=1.5)),
        ("sequence", 2.0, part("corrections", "SequenceTruncated", cap=2.0)),
        ("sequence", "1e-9_3.0", part("corrections", "SequenceMask", max=3.0)),
    ],
)
@random_test(rows=batches(equal=False))
def test_a_correction_is_that_of_verl_and_leaves_the_kl_alone(
    verl: ModuleType, level: str, threshold: Any, correction: Part, rows: Rows
) -> None:
    known = advantages(rows, grpo())
    mine, _ = build(correction)(micro_batch(rows, rows.logp, known, slice(None)))
    assume(mine.any())
    weights = verl_weights(rows, rows.old - rows.behaviour, level, threshold)
    close(mine, weights[rows.mask])
    k2 = part("kl", "Kl", form="k2", coef=0.1)
    same(
        ours(rows, known, clip=ppo(dual=3.0), correction=correction, kl={"base": k2}),
        of_verl(verl, rows, known, weights=weights, kl=("k2", 0.1)),
    )


@random_test(rows=batches(equal=False))
def test_token_weights_on_sequence_ratios_stay_with_their_tokens_in_verl_too(
    verl: ModuleType, rows: Rows
) -> None:
    known = advantages(rows, grpo())
    weights = verl_weights(rows, rows.old - rows.behaviour, "token", 1.5)
    tis = part("corrections", "TokenTruncated", cap=1.5)
    same(
        ours(rows, known, ratio="sequence", correction=tis),
        of_verl(verl, rows, known, "gspo", weights=weights),
    )


def test_a_batch_of_which_all_is_dropped_has_no_gradient_here_and_crashes_verl(
    verl: ModuleType,
) -> None:
    rows = random_rows(0)
    rows = replace(rows, behaviour=rows.old - 3.0)
    mine = ours(rows, grpo(), correction=part("corrections", "IcePop", low=0.5, high=5.0))
    assert (mine.gradient == 0.0).all()
    with pytest.raises(ZeroDivisionError):
        verl_weights(rows, rows.old - rows.behaviour, "token", "0.5_5.0")


@random_test(rows=batches(equal=False))
def test_verls_bypass_is_the_ratio_to_the_behaviour_policy(verl: ModuleType, rows: Rows) -> None:
    known = advantages(rows, grpo())
    same(
        ours(rows, known, ratio_to="behaviour", clip=ppo(dual=3.0)),
        of_verl(verl, rows, known, old=rows.behaviour),
    )
    weights = verl_weights(rows, rows.logp - rows.behaviour, "token", 2.0)
    keys = {"ratio_to": "behaviour", "clip": part("clips", "Cispo", cap=2.0)}
    same(
        ours(rows, known, aggregation="sequence_sum", **keys),
        of_verl(verl, rows, known, "reinforce", aggregation="seq-mean-token-sum", weights=weights),
    )


@random_test(rows=batches(equal=False))
def test_verls_geometric_rejection_bounds_the_inverse_ratio_and_changes_the_denominator(
    verl: ModuleType, rows: Rows
) -> None:
    helper = sys.modules["verl.trainer.ppo.rollout_corr_helper"]
    known = advantages(rows, grpo())
    kept, _ = helper.compute_rollout_rejection_mask(
        rows.old - rows.behaviour, rows.mask.double(), "seq_mean_k1", "0.8_1.1"
    )
    mask = (rows.mask * kept).bool()
    assume(mask.any())
    correction = part("corrections", "GeometricMask", low=1 / 1.1, high=1 / 0.8, weight="one")
    mine = ours(rows, known, clip=ppo(dual=3.0), correction=correction)
    found = of_verl(verl, rows, known, mask=mask)
    same(mine, found, ratio=rows.tokens / int(mask.sum()))


# ---- far from the reference, far from old weights


def one_token(**columns: float) -> Rows:
    """A row of one token, its log-prob -1 under all policies but those given."""
    values = dict.fromkeys(COLUMNS, -1.0) | columns
    tensors = {name: torch.full((1, 1), x, dtype=torch.float64) for name, x in values.items()}
    return Rows(**tensors, mask=torch.ones(1, 1).bool(), rewards=torch.ones(1), sizes=(1,))


def two_rows(rows: Rows) -> Rows:
    """The row twice, rewarded 0 and 1: TRL has no group of one."""
    doubled = {name: getattr(rows, name).repeat(2, 1) for name in (*COLUMNS, "mask")}
    return Rows(**doubled, rewards=torch.tensor([0.0, 1.0]).double(), sizes=(2,))


def test_log_ratios_are_bounded_here_and_in_verl_at_20_and_not_in_trl(
    trl: SimpleNamespace, verl: ModuleType
) -> None:
    rows = one_token(old=-26.0)
    bad = -torch.ones(1, dtype=torch.float64)
    mine = ours(rows, bad)
    close(mine.loss, np.exp(20.0))
    same(mine, of_verl(verl, rows, bad, clip_ratio_c=1e12))
    assert of_trl(trl, two_rows(rows), loss_type="dapo").loss > 0.3 * np.exp(25.0)


def test_verl_bounds_the_log_ratio_of_sequences_at_10(verl: ModuleType) -> None:
    rows, bad = one_token(old=-13.0), -torch.ones(1, dtype=torch.float64)
    close(ours(rows, bad, ratio="sequence").loss, np.exp(12.0))
    close(of_verl(verl, rows, bad, "gspo").loss, np.exp(10.0))


def test_k3_is_bounded_at_10_with_no_gradient_beyond_in_verl_and_in_its_argument_here(
    trl: SimpleNamespace, verl: ModuleType
) -> None:
    none = torch.zeros(1, dtype=torch.float64)
    term = part("kl", "Kl", form="k3", coef=1.0)
    for gap in (-4.0, -1.0, 1.0, 2.0):
        rows = one_token(reference=-1.0 + gap)
        found = of_verl(verl, rows, none, kl=("k3", 1.0))
        same(ours(rows, none, kl={"base": term}), found)
    for gap, value in ((3.0, np.exp(3.0) - 4.0), (25.0, np.exp(20.0) - 21.0)):
        rows = one_token(reference=-1.0 + gap)
        mine = ours(rows, none, kl={"base": term})
        close(mine.loss, value)
        found = of_verl(verl, rows, none, kl=("k3", 1.0))
        assert (found.loss, float(found.gradient[0, 0])) == (10.0, 0.0)
        keys = {"loss_type": "dapo", "beta": 1.0, "use_bias_correction_kl": False}
        trls = of_trl(trl, replace(two_rows(rows), rewards=torch.zeros(2).double()), **keys)
        close(trls.loss, np.exp(gap) - gap - 1.0)


def test_k1_and_k2_have_no_bounds_in_verl_and_20_here(verl: ModuleType) -> None:
    rows, none = one_token(reference=-26.0), torch.zeros(1, dtype=torch.float64)
    for form, mine, theirs in (("k1", 20.0, 25.0), ("k2", 200.0, 312.5)):
        term = part("kl", "Kl", form=form, coef=1.0)
        close(ours(rows, none, kl={"base": term}).loss, mine)
        close(of_verl(verl, rows, none, kl=(form, 1.0)).loss, theirs)


@random_test(rows=batches(equal=False))
def test_the_k3_with_a_plus_of_verl_has_the_gradient_of_k2(verl: ModuleType, rows: Rows) -> None:
    known = advantages(rows, grpo())
    term = part("kl", "Kl", form="k2", coef=0.1)
    mine = ours(rows, known, clip=ppo(dual=3.0), kl={"base": term})
    close(mine.gradient, of_verl(verl, rows, known, kl=("k3+", 0.1)).gradient)


def test_the_defaults_of_verl_are_what_the_table_says(verl: ModuleType) -> None:
    config = verl.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    assert (config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c) == (0.2, 0.2, 3.0)
    assert (config.loss_agg_mode, config.loss_scale_factor) == ("token-mean", None)
    assert (config.use_kl_loss, config.kl_loss_coef) == (False, 0.001)
    assert config.kl_loss_type == "low_var_kl"
    folder = PEERS / "verl/trainer/config"
    correction = (folder / "algorithm/rollout_correction.yaml").read_text("utf-8")
    assert re.search(r"^rollout_is: null$", correction, re.M)
    assert re.search(r"^rollout_is_threshold: 2.0$", correction, re.M)


# ---- what is compared


def test_the_random_batches_reach_every_branch() -> None:
    reached: dict[str, int] = defaultdict(int)
    for seed in range(20):
        rows = random_rows(seed, drift=1.2 if seed % 2 else 0.4, empty=bool(seed % 3))
        good = advantages(rows, grpo())[:, None].expand_as(rows.mask)[rows.mask] > 0
        ratio = (rows.logp - rows.old).exp()[rows.mask]
        weight = (rows.old - rows.behaviour).exp()[rows.mask]
        product = ((rows.old - rows.behaviour) * rows.mask).sum(1).exp()
        reached["above"] += int((good & (ratio > 1.28)).sum())
        reached["below"] += int((~good & (ratio < 0.8)).sum())
        reached["dual"] += int((~good & (ratio > 3.0)).sum())
        reached["token weight above"] += int((weight > 1.5).sum())
        reached["token weight below"] += int((weight < 0.7).sum())
        reached["sequence above"] += int((product > 3.0).sum())
        reached["sequence kept"] += int(((product < 2.0) & (product > 0.5)).sum())
        reached["empty rows"] += int((~rows.mask.any(1)).sum())
        reached["holes"] += int((~rows.mask[:, :-1] & rows.mask[:, 1:]).sum())
    assert min(reached.values()) >= 10, dict(reached)


def test_the_page_lists_every_preset() -> None:
    page = (ROOT / "docs/objectives.md").read_text("utf-8")
    table = page.partition("## Presets")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert listed == sorted(p.stem for p in (ROOT / "rft/configs/objective").glob("*.yaml"))
