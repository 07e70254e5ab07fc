"""Where engines and ranks are, how weights reach them, and what of a rollout's keys is refused.

Takes about three seconds besides imports.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective_rules import compose

import rft.config.placement
from rft.cluster.base import InlineHandle
from rft.cluster.place import _engines, learner_settings
from rft.config.dry_run import _generation, _memory
from rft.config.dry_run import placement as printed_placement
from rft.config.objective import doubts
from rft.config.placement import choose_transport, plan_placement
from rft.config.schema import Config
from rft.config.validate import validate
from rft.errors import RftError

PRESETS = sorted(
    p.stem for p in (Path(__file__).parent.parent / "rft/configs/generation").glob("*.yaml")
)


def sized(
    engines: int = 1,
    tensor_parallel: int = 1,
    ranks: int = 1,
    gpus_per_node: int = 8,
    placement: str = "disaggregated",
    mode: str = "ray",
) -> Config:
    config = Config()
    config.rollout.engines, config.rollout.tensor_parallel = engines, tensor_parallel
    config.learner.workers = ranks
    config.cluster.gpus_per_node = gpus_per_node
    config.cluster.placement, config.cluster.mode = placement, mode
    return config


@cache
def composed(*overrides: str) -> Config:
    return compose(*overrides)


def with_keys(keys: dict[str, Any], *overrides: str) -> Config:
    """What Hydra composes, with dotted keys set to values."""
    config = deepcopy(composed(*overrides))
    for key, value in keys.items():
        *path, last = key.split(".")
        section: Any = config
        for name in path:
            section = section[name] if isinstance(section, dict) else getattr(section, name)
        if isinstance(section, dict):
            section[last] = value
        else:
            assert hasattr(section, last), key
            setattr(section, last, value)
    return config


def on_gpu(keys: dict[str, Any], *overrides: str) -> Config:
    """A plan for GPUs that need not be here: one node of eight, half of them engines."""
    gpus = ["cluster=ray", "cluster.device=cuda", "+scale=gpus_8", "dry_run=true"]
    return with_keys(keys, "model=qwen2.5_1.5b_instruct", *gpus, *overrides)


# ---- placement


@settings(deadline=None)
@given(
    engines=st.integers(1, 12),
    size=st.integers(1, 8),
    ranks=st.integers(1, 20),
    spare=st.integers(0, 8),
    placement=st.sampled_from(["disaggregated", "colocated"]),
)
def test_no_engine_is_over_two_nodes_and_no_gpu_has_two_of_a_kind(
    engines: int, size: int, ranks: int, spare: int, placement: str
) -> None:
    per_node = size + spare
    placed = plan_placement(sized(engines, size, ranks, per_node, placement), "cuda")
    held = [gpu for gpus in placed.engines for gpu in gpus]
    learning = [gpu for gpus in placed.ranks for gpu in gpus]
    assert (len(placed.engines), len(placed.ranks)) == (engines, ranks)
    assert len(set(held)) == engines * size
    assert len(set(learning)) == ranks
    for gpus in placed.engines:
        assert len({gpu // per_node for gpu in gpus}) == 1
    if placement == "disaggregated":
        assert not set(held) & set(learning)
    else:
        assert learning == list(range(ranks))
    assert sum(placed.nodes) == placed.gpus == 1 + max(held + learning)
    assert all(0 < gpus <= per_node for gpus in placed.nodes)
    assert set(placed.nodes[:-1]) <= {per_node}


@settings(deadline=None)
@given(engines=st.integers(1, 40), size=st.sampled_from([1, 2, 4, 8]), ranks=st.integers(1, 40))
def test_where_engines_fill_nodes_ranks_follow_them_and_no_gpu_is_idle(
    engines: int, size: int, ranks: int
) -> None:
    placed = plan_placement(sized(engines, size, ranks), "cuda")
    flat = [gpu for gpus in placed.engines + placed.ranks for gpu in gpus]
    assert flat == list(range(engines * size + ranks))
    shared = plan_placement(sized(engines, size, ranks, placement="colocated"), "cuda")
    assert shared.engines == tuple(tuple(range(e * size, e * size + size)) for e in range(engines))
    assert shared.gpus == max(engines * size, ranks)


def test_what_engines_leave_of_a_node_goes_to_ranks() -> None:
    placed = plan_placement(sized(engines=3, tensor_parallel=3, ranks=4), "cuda")
    assert placed.engines == ((0, 1, 2), (3, 4, 5), (8, 9, 10))
    assert placed.ranks == ((6,), (7,), (11,), (12,))
    assert placed.nodes == (8, 5)


def test_on_cpu_and_without_training_nothing_is_placed_that_is_not_there() -> None:
    placed = plan_placement(sized(engines=3, ranks=2), "cpu")
    assert placed.engines == ((), (), ())
    assert placed.ranks == ((), ())
    assert (placed.gpus, placed.nodes) == (0, ())
    sampling = plan_placement(sized(engines=3, ranks=2), "cuda", training=False)
    assert (sampling.ranks, sampling.nodes) == ((), (3,))


def test_one_process_shares_its_gpus() -> None:
    assert plan_placement(sized(mode="inline"), "cuda").gpus == 1


def test_an_engine_that_no_node_can_hold_is_refused() -> None:
    with pytest.raises(RftError, match=r"tensor_parallel=4 is over cluster\.gpus_per_node=2"):
        plan_placement(sized(tensor_parallel=4, gpus_per_node=2), "cuda")


class Silent:
    """A part that was built, and has nothing to say."""

    def wait(self, seconds: float) -> list[Any]:
        return []

    def start(self, method: str) -> None:
        """It is never asked what came of it."""


class Recorder:
    """A cluster that only takes notes."""

    parcel_seconds = 0.0

    def __init__(self) -> None:
        self.spawned: dict[str, dict[str, Any]] = {}

    def spawn(self, name: str, target: str, **kwargs: Any) -> InlineHandle:
        self.spawned[name] = {"target": target} | kwargs
        return InlineHandle(name, Silent())


def test_what_a_dry_run_prints_is_what_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one node, a part's GPUs there are those of the run."""
    config = on_gpu({"rollout.engines": 3, "rollout.tensor_parallel": 2, "learner.workers": 2})
    printed = re.findall(r"\[([\d-]+)\] (engine \d)", printed_placement(config))
    monkeypatch.setattr(rft.config.placement, "gpu_count", lambda: 8)
    cluster = Recorder()
    _engines(cluster, config, plan_placement(config, "cuda"))  # type: ignore[arg-type]
    started = {name: kwargs["gpus"] for name, kwargs in cluster.spawned.items()}
    assert {name: tuple(map(int, span.split("-"))) for span, name in printed} == started
    assert started == {"engine 0": (0, 1), "engine 1": (2, 3), "engine 2": (4, 5)}


def test_an_engine_is_given_its_keys_inline_and_in_a_server() -> None:
    for mode in ("inline", "ray"):
        config = compose(f"cluster={mode}", "budget=thinking_cap", "rollout=transformers")
        cluster = Recorder()
        _engines(cluster, config, plan_placement(config, "cpu"))  # type: ignore[arg-type]
        given = cluster.spawned["engine 0"]
        assert given["gpus"] == ()
        assert given["budget"]["_target_"] == "rft.rollout.budgets.ThinkingCap"
        assert "tensor_parallel" not in given  # which TransformersEngine does not take
        part = config.rollout.engine
        if mode == "ray":
            assert given["target"] == "rft.rollout.server.EngineServer"
            assert given["engine"] == part
        else:
            assert given["target"] == part["_target_"]
            assert given["max_sequences"] == part["max_sequences"]


def test_cores_are_shared_with_the_learner_only_where_both_work_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))

    def threads(**keys: int) -> tuple[int, int]:
        dotted = {key.replace("__", "."): value for key, value in keys.items()}
        config = with_keys({"rollout.engines": 2, "learner.workers": 4} | dotted, "cluster=ray")
        cluster = Recorder()
        _engines(cluster, config, plan_placement(config, "cpu"))  # type: ignore[arg-type]
        return cluster.spawned["engine 0"]["threads"], learner_settings(config, "cpu").threads

    assert threads() == (6, 3)
    assert threads(rollout__staleness=1) == (2, 2)
    assert threads(rollout__staleness=1, cluster__threads=5) == (5, 5)


# ---- transport


VLLM = "rft.rollout.vllm_engine.VllmEngine"
TRANSFORMERS = "rft.rollout.transformers_engine.TransformersEngine"


@pytest.mark.parametrize(
    ("device", "mode", "placement", "engine", "auto", "others"),
    [
        ("cpu", "ray", "disaggregated", VLLM, "shared", []),
        ("cpu", "ray", "colocated", VLLM, "shared", []),
        ("cuda", "inline", "colocated", VLLM, "shared", []),
        ("cuda", "ray", "colocated", VLLM, "ipc", ["shared"]),
        ("cuda", "ray", "disaggregated", VLLM, "nccl", ["shared"]),
        ("cuda", "ray", "disaggregated", TRANSFORMERS, "shared", []),
        ("cuda", "ray", "disaggregated", "mine.Engine", "shared", ["nccl"]),
    ],
)
def test_each_placement_has_its_transports_and_refuses_others(
    device: str, mode: str, placement: str, engine: str, auto: str, others: list[str]
) -> None:
    config = sized(mode=mode, placement=placement)
    config.rollout.engine = {"_target_": engine}
    assert choose_transport(config, device) == auto
    for asked in ("shared", "ipc", "nccl"):
        config.rollout.transport = asked
        if asked in (auto, *others):
            assert choose_transport(config, device) == asked
        else:
            with pytest.raises(RftError, match=rf"transport={asked} cannot be used with"):
                choose_transport(config, device)


def test_differences_go_through_the_memory_of_one_node() -> None:
    config = sized(engines=4, ranks=4)
    config.rollout.engine = {"_target_": VLLM}
    config.rollout.delta_sync = True
    assert choose_transport(config, "cuda") == "shared"
    config.rollout.transport = "nccl"
    with pytest.raises(RftError, match=r"delta_sync=true with rollout\.transport=nccl"):
        choose_transport(config, "cuda")
    config.rollout.transport = "auto"
    config.learner.workers = 5
    with pytest.raises(RftError, match=r"memory of one node, and this run is on 2"):
        choose_transport(config, "cuda")
    config.rollout.delta_sync = False
    assert choose_transport(config, "cuda") == "nccl"


# ---- what is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rollout.tensor_parallel": 0}, r"rollout\.tensor_parallel=0 is too small"),
    ({"rollout.staleness": -1}, r"rollout\.staleness=-1 is too small"),
    ({"rollout.skip_protect": 0}, r"rollout\.skip_protect=0 is too small; .*at least 1"),
    ({"rollout.restarts": -1}, r"rollout\.restarts=-1 is too small"),
    ({"rollout.heartbeat": 0.5}, r"rollout\.heartbeat=0\.5 is too small"),
    ({"rollout.heartbeat": math.nan}, r"rollout\.heartbeat=nan"),
    ({"rollout.deadline": 0.0}, r"rollout\.deadline=0\.0 is too small"),
    ({"rollout.top_p": 0.0}, r"rollout\.top_p=0\.0 must lie in \(0, 1\]"),
    ({"rollout.top_p": 1.01}, r"rollout\.top_p=1\.01"),
    ({"rollout.top_p": math.nan}, r"rollout\.top_p=nan"),
    ({"rollout.skip_ratio": 1.0}, r"rollout\.skip_ratio=1\.0 must lie in \[0, 1\)"),
    ({"rollout.skip_ratio": -0.1}, r"rollout\.skip_ratio=-0\.1 is too small"),
    ({"rollout.stop": ["a", ""]}, r"rollout\.stop=\['a', ''\] has an empty string"),
    ({"rollout.transport": "rdma"}, r"rollout\.transport='rdma' is not a choice"),
    ({"rollout.transport": "nccl"}, r"transport=nccl .*cluster\.device=cpu"),
    ({"rollout.engine.budget": None}, r"engine\.budget is set by the run; set rollout\.budget"),
    ({"rollout.engine.tensor_parallel": 2}, r"set rollout\.tensor_parallel instead"),
    ({"rollout.tensor_parallel": 2}, r"tensor_parallel=2 needs 2 GPUs an engine .*on CPU"),
    ({"rollout.budget": {"_target_": "rft.rollout.budgets.No"}}, r"rollout\.budget\._target_"),
    ({"rollout.engines": 2}, r"cluster=inline is one process .*rollout\.engines=2"),
    (
        {"rollout.partial": True, "rollout.staleness": 1},
        r"partial=true with rollout\.staleness=1: .*set rollout\.staleness=2",
    ),
    (
        {
            "rollout.partial": True,
            "rollout.staleness": 2,
            "controllers.temperature": {"_target_": "rft.controls.TemperatureSchedule"},
        },
        r"partial=true with controllers\.temperature=TemperatureSchedule.*two temperatures",
    ),
]


@pytest.mark.parametrize(("keys", "words"), REFUSED)
def test_what_cannot_be_generated_so_is_refused(
    keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = {"runs_dir": str(tmp_path)}
    validate(with_keys(folder))
    with pytest.raises(RftError, match=words):
        validate(with_keys(folder | keys))


SKIPPING = {"controllers.skip_ratio": {"_target_": "rft.controls.SkipSchedule"}}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {
                "rollout.tensor_parallel": 2,
                "rollout.engine": {"_target_": TRANSFORMERS},
            },
            r"tensor_parallel=2 with rollout=transformers",
        ),
        ({"rollout.skip_ratio": 0.1}, r"skip_ratio=0\.1 .*rollout\.engine\.eager=true"),
        (SKIPPING, r"controllers\.skip_ratio with CUDA graphs"),
        ({"rollout.transport": "ipc"}, r"transport=ipc .*disaggregated"),
        ({"rollout.tensor_parallel": 16}, r"over cluster\.gpus_per_node=8"),
        (
            {
                "cluster.placement": "colocated",
                "rollout.engine.gpu_memory_fraction": 0.5,
                "rollout.tensor_parallel": 2,
            },
            r"learner\.workers=4 with engines on 8 GPUs: no rank is on GPU 4.*workers=8",
        ),
    ],
)
def test_what_gpus_cannot_do_is_refused_in_a_dry_run_too(keys: dict[str, Any], words: str) -> None:
    validate(on_gpu({}))
    with pytest.raises(RftError, match=words):
        validate(on_gpu(keys))


def test_without_cuda_graphs_layers_can_be_skipped() -> None:
    validate(on_gpu(SKIPPING | {"rollout.engine.eager": True}))


def test_more_gpus_than_the_machine_has_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rft.config.placement.gpu_count", lambda: 4)
    monkeypatch.setattr("rft.config.validate.gpu_count", lambda: 4)
    keys = {
        "runs_dir": str(tmp_path),
        "cluster.mode": "ray",
        "cluster.device": "cuda",
        "learner.workers": 2,
        "rollout.tensor_parallel": 2,
    }
    validate(with_keys(keys))
    with pytest.raises(RftError, match=r"needs 6 GPUs .*engines=2 of .*parallel=2.*machine has 4"):
        validate(with_keys(keys | {"rollout.engines": 2}))


def test_an_engine_divides_the_models_heads(tiny_model: Path) -> None:
    """The tiny model has 4."""
    keys = {"model.path": str(tiny_model), "tasks.max_prompt_tokens": 12}
    validate(on_gpu(keys | {"rollout.tensor_parallel": 2}))
    with pytest.raises(RftError, match=r"tensor_parallel=3 does not divide the 4 attention heads"):
        validate(on_gpu(keys | {"rollout.tensor_parallel": 3}))


@pytest.mark.parametrize(
    ("planner", "takes"),
    [
        *((name, True) for name in ("constant", "knapsack", "coba", "e3")),
        *((name, False) for name in ("dars", "reinforce_ada", "speed", "xrpo", "refill")),
    ],
)
def test_partial_rollouts_are_for_planners_that_ask_once(
    planner: str, takes: bool, tmp_path: Path
) -> None:
    override = f"scheduler/planner={planner}"
    config = compose("+generation=april", override, f"runs_dir={tmp_path}")
    if takes:
        validate(config)
    else:
        with pytest.raises(RftError, match=r"partial=true with scheduler\.planner=\w+, which asks"):
            validate(config)


# ---- what is doubted


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rollout.staleness": 1}, "older weights sample"),
        ({"rollout.skip_ratio": 0.1}, "fewer layers sample"),
        (SKIPPING, "fewer layers sample"),
        ({"rollout.top_p": 0.9}, "the nucleus is sampled from"),
    ],
)
def test_what_samples_from_another_policy_wants_a_correction(
    keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    keys = keys | {"runs_dir": str(tmp_path)}
    bare = with_keys(keys, "correction@objective.correction=none")
    validate(bare)
    (line,) = doubts(bare)
    assert words in line
    assert doubts(with_keys(keys)) == []
    assert doubts(with_keys(keys, "objective=remix")) == []  # whose ratio does that work


def test_overlap_on_shared_gpus_is_doubted_and_on_cpu_it_is_not() -> None:
    shared = {"cluster.placement": "colocated", "rollout.staleness": 1}
    (line,) = doubts(on_gpu(shared))
    assert "nothing overlaps" in line
    assert doubts(with_keys(shared)) == []


# ---- presets and what is printed


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_generation_goes_with_the_defaults(preset: str, tmp_path: Path) -> None:
    config = compose(f"+generation={preset}", "objective=grpo_paper", f"runs_dir={tmp_path}")
    validate(config)
    assert doubts(config) == []
    plain = compose("objective=grpo_paper", f"runs_dir={tmp_path}")
    off = config.rollout.staleness > 0 or config.rollout.skip_ratio > 0
    assert off == (preset not in ("on_policy", "latr"))
    assert ("correction" in config.objective) == ("correction" in plain.objective or off)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "staleness 0: 1 plan(s) in flight, 32 groups, 64 rollouts an engine; a step waits"),
        (
            {"rollout.staleness": 2},
            "staleness 2: 3 plan(s) in flight, 96 groups, 192 rollouts an engine; generation goes "
            "on while the learner works\n",
        ),
        (
            {"rollout.staleness": 2, "rollout.partial": True},
            "2 plan(s) in flight, 64 groups, 128 rollouts an engine; generation goes on while the "
            "learner works, and a step takes the groups that are complete first\n",
        ),
        (
            {"rollout.staleness": 1, "cluster.placement": "colocated"},
            "nothing is generated while the learner works",
        ),
        ({"rollout.delta_sync": True}, "engines get what changed of the weights, by shared"),
        ({"cluster.placement": "colocated"}, "engines get all weights, by ipc"),
    ],
)
def test_a_dry_run_says_what_is_in_flight(keys: dict[str, Any], words: str) -> None:
    assert words in _generation(on_gpu(keys))


def test_an_engines_memory_is_shared_by_its_gpus() -> None:
    def memory(size: int) -> tuple[str, ...]:
        said = _memory(on_gpu({"rollout.tensor_parallel": size}, "model=qwen2.5_7b"))
        found = re.search(r"each.* engine.*: ([\d.]+) GiB weights; KV cache (\d+) KiB", said)
        assert found
        return found.groups()

    assert memory(1) == ("14.19", "56")
    assert memory(2) == ("7.09", "28")
    assert memory(8) == ("1.77", "14")  # 4 heads of keys on 8 GPUs: each has a whole one


def test_good_keys_are_checked_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from test_objective_rules import compose; import rft.config.validate as v\n"
        f"v.validate(compose('+generation=april', 'runs_dir={tmp_path}'))\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
