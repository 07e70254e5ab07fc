"""Whole runs as a user starts them: real engines, real DeepSpeed, real Ray, on a tiny model."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import ENV, assert_same_run, check, lines, overrides, train


def metrics(folder: Path) -> list[dict[str, float]]:
    return lines(folder / "metrics.jsonl")


@pytest.fixture
def spotless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if a run of this test leaves a process, temporary file or shared-memory segment.

    Children inherit a mark in their environment, whoever their parent becomes.
    """
    mark = f"RFT_TEST_MARK={uuid.uuid4()}"
    segments = set(Path("/dev/shm").iterdir())
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # short: Ray keeps sockets there
        monkeypatch.setitem(ENV, *mark.split("="))
        monkeypatch.setitem(ENV, "TMPDIR", temporary)
        yield

        def left() -> list[str]:
            found = [str(path) for path in Path(temporary).iterdir()]
            # Other runs on this machine have segments of their own, which they hold.
            new = {str(path) for path in set(Path("/dev/shm").iterdir()) - segments}
            found += [path for path in new if not held(path)]
            return found + marked(mark)

        deadline = time.monotonic() + 15  # grace: processes end a little after their parent
        while left() and time.monotonic() < deadline:
            time.sleep(0.3)  # of other processes: there is nothing to wait on
        assert left() == []


def held(path: str) -> bool:
    """Whether a live process maps the file."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if path in maps.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return False


def marked(mark: str) -> list[str]:
    """Command lines of live processes with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or somebody else's
    return found


@pytest.fixture(scope="module")
def inline(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished inline run, transformers engine, float32."""
    folder = tmp_path_factory.mktemp("inline")
    check(train(*overrides(tiny_model, folder, "inline")))
    return folder / "inline"


@pytest.mark.usefixtures("spotless")
def test_inline_and_ray_are_the_same_run(inline: Path, tiny_model: Path) -> None:
    """Rewards, losses, posteriors and final weights, bit for bit; and Ray leaves nothing behind."""
    check(train(*overrides(tiny_model, inline.parent, "ray", "cluster=ray")))
    assert_same_run(inline, inline.parent / "ray")


def test_vllm_agrees_with_the_learner_at_any_temperature(tiny_model: Path, tmp_path: Path) -> None:
    """Engine and learner in processes of their own, float32: log-probs agree at every step."""
    run = ["rollout=vllm", "rollout.max_tokens=12", "cluster=ray", "rollout.temperature=0.7"]
    check(train(*overrides(tiny_model, tmp_path, "vllm", *run)))
    rows = metrics(tmp_path / "vllm")
    assert len(rows) == 8
    assert all(row["mismatch/max_abs"] < 1e-4 for row in rows)
    assert all(0 <= row["sync/probe_gap"] < 1e-4 for row in rows)
    assert [row["version"] for row in rows] == list(range(1, 9))
    assert all(row["staleness/max"] == 0 for row in rows)
    # A checkpoint's policy is a model that vLLM and transformers load as it is.
    policy = f"model.path={tmp_path}/vllm/checkpoints/step_8/policy"
    extra = [*run, policy, "steps=3", "cluster=inline", "model.gradient_checkpointing=true"]
    extra.append("objective.aggregation=constant")
    check(train(*overrides(tiny_model, tmp_path, "further", *extra)))
    rows = metrics(tmp_path / "further")
    assert rows[0]["mismatch/max_abs"] < 1e-4
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    assert (tmp_path / "further" / "checkpoints" / "step_3" / "policy").is_dir()


@pytest.mark.parametrize(
    "extra",
    [
        ["cluster=ray", "learner.workers=2", "learner.zero_stage=3", "scheduler=uniform",
         "learner.sequence_parallel=2"],
        ["model.dtype=bfloat16", "objective.aggregation=sequence_mean", "learner.zero_stage=2",
         "scheduler=greso", "scheduler/planner@scheduler.planner.inner=knapsack"],
        ["lora=adalora", "learner.lr=1e-2", "learner.layout=shared"],
        ["objective=bapo", "+weighter=[top_entropy,d3s]", "schedule@learner.schedule=uba",
         "+transform@transforms.thin=balance", "+controller@controllers.kl_scale=adaptive_kl",
         "scheduler=mopps", "scheduler/planner=xrpo"],
    ],
    ids=["zero3-ulysses", "bfloat16-greso-knapsack", "adalora", "weighed-mopps-xrpo"],
)  # fmt: skip
def test_runs_by_override_alone(extra: list[str], tiny_model: Path, tmp_path: Path) -> None:
    check(train(*overrides(tiny_model, tmp_path, "run", "steps=3", *extra)))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    policy = tmp_path / "run" / "checkpoints" / "step_3" / "policy"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(policy)
    assert AutoTokenizer.from_pretrained(policy)("rab=").input_ids[0] == 1


def test_phases_sum_to_the_step(inline: Path) -> None:
    rows = [json.loads(line) for line in (inline / "metrics.jsonl").read_text().splitlines()]
    phases = sum(v for row in rows for k, v in row.items() if k[:5] == "time/" and k != "time/step")
    total = sum(row["time/step"] for row in rows)
    assert 0.9 * total < phases <= total * 1.001


def test_a_selector_from_outside_the_package(tiny_model: Path, tmp_path: Path) -> None:
    """One Python file and one YAML file, neither in rft."""
    own = tmp_path / "conf" / "scheduler" / "selector" / "first.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("_target_: parts_for_tests.FirstTasks\nskip: 3\n")
    extra = ["scheduler/selector=first", "steps=1", "--config-dir", str(tmp_path / "conf")]
    check(train(*overrides(tiny_model, tmp_path, "run", *extra)))
    journal = (tmp_path / "run" / "scheduler" / "journal.jsonl").read_text().splitlines()
    plan = json.loads(journal[1])  # the first line names the pool
    pool = [json.loads(line)["id"] for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    assert [task for _, task, *_ in plan["tasks"]] == pool[3:7]


def test_groups_may_differ_in_size_and_grow_over_rounds(tiny_model: Path, tmp_path: Path) -> None:
    extra = ["scheduler.planner._target_=parts_for_tests.TwoRounds", "steps=2"]
    check(train(*overrides(tiny_model, tmp_path, "run", *extra)))
    folder = tmp_path / "run"
    journal = [json.loads(s) for s in (folder / "scheduler/journal.jsonl").read_text().splitlines()]
    rounds = [o for line in journal if line["event"] == "feedback" for o in line["outcomes"]]
    observed = {(round, len(rewards)) for _, round, rewards in rounds}
    assert observed == {(0, 2), (1, 3), (1, 4)}  # mixed ones grow from 2 to 5, a late one has 4
    with gzip.open(folder / "rollouts" / "step_000001.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    numbers: dict[str, list[int]] = {}
    for row in rows:
        numbers.setdefault(row["task"], []).append(row["index"])
    assert all(found == list(range(len(found))) for found in numbers.values())
    assert sum(map(len, numbers.values())) == metrics(folder)[0]["rollout/count"]


def test_surveys_decide_and_cost_the_run_nothing(tiny_model: Path, tmp_path: Path) -> None:
    more = ["scheduler=surveyed", "scheduler.survey_every=2", "scheduler.survey_samples=4"]
    few = ["steps=3", "evaluation.every=0", "scheduler.selector.steps=1"]
    check(train(*overrides(tiny_model, tmp_path, "surveyed", *more, *few)))
    journal = (tmp_path / "surveyed" / "scheduler" / "journal.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in journal]
    surveys = {line["step"]: line["rates"] for line in events if line["event"] == "survey"}
    assert set(surveys) == {1, 3}
    assert all(len(rates) == 40 and len(set(rates)) > 2 for rates in surveys.values())
    plans = {line["step"]: line["tasks"] for line in events if line["event"] == "plan"}
    for step, rates in surveys.items():
        distance = np.abs(np.array(rates) - 0.5)
        rested = [row[0] for row in plans.get(step - 1, [])]
        distance[rested] = np.inf
        chosen = sorted(distance[[row[0] for row in plans[step]]])
        assert chosen == sorted(distance)[:4]
        assert all(row[3] == pytest.approx(rates[row[0]]) for row in plans[step])
    metrics = lines(tmp_path / "surveyed" / "metrics.jsonl")
    assert [row["rollout/count"] for row in metrics] == [32] * 3
    assert metrics[-1]["tokens/so_far"] == sum(row["tokens/generated"] for row in metrics)


def test_the_schedulers_process_needs_numpy_at_most() -> None:
    code = (
        "import sys, rft.scheduler.scheduler, rft.cluster.base\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.usefixtures("spotless")
@pytest.mark.parametrize(
    ("cluster", "number"), [("inline", signal.SIGINT), ("ray", signal.SIGTERM)], ids=str
)
def test_a_signal_ends_with_a_checkpoint_and_nothing_left(
    number: signal.Signals, cluster: str, inline: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The signalled run resumes to the same end as one that was left alone."""
    name = f"{number.name}-{cluster}"
    arguments = overrides(tiny_model, tmp_path, name, f"cluster={cluster}", "checkpoint.every=100")
    process = subprocess.Popen(
        [sys.executable, "-m", "rft.train", *arguments],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            if number == signal.SIGINT:  # a terminal's Ctrl-C reaches every process
                os.killpg(process.pid, number)
            else:
                process.terminate()
            break
    output = process.stdout.read()
    assert process.wait(60) == 128 + number, output
    assert list((tmp_path / name / "checkpoints").glob("step_*")), output
    check(train(*arguments, "cluster=inline"))  # where it goes on changes nothing
    expected, found = metrics(inline), metrics(tmp_path / name)
    assert found == expected


@pytest.mark.usefixtures("spotless")
def test_an_error_in_the_middle_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    extra = ["cluster=ray", "scheduler.planner._target_=parts_for_tests.FailsLater"]
    done = train(*overrides(tiny_model, tmp_path, "run", *extra))
    check(done, 2)
    assert "FailsLater wants no third step" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verifier_that_breaks_its_promise_is_counted_and_the_run_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    extra = ["steps=2", "reward.verifier._target_=parts_for_tests.TooGenerous"]
    done = train(*overrides(tiny_model, tmp_path, "run", *extra))
    check(done)
    assert "32 checks ended in error" in done.stdout
    assert "TooGenerous gave the reward 1.7" in done.stdout
    assert [row["reward/error"] for row in metrics(tmp_path / "run")] == [1.0, 1.0]


def test_a_finished_run_is_not_repeated_and_a_changed_one_refused(
    inline: Path, tiny_model: Path
) -> None:
    before = (inline / "metrics.jsonl").read_bytes()
    done = train(*overrides(tiny_model, inline.parent, "inline"))
    check(done)
    assert "finished" in done.stdout
    changed = train(*overrides(tiny_model, inline.parent, "inline", "learner.lr=2e-3"))
    check(changed, 2)
    assert "learner.lr: 0.001 -> 0.002" in changed.stderr
    assert (inline / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    inline: Path, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = overrides(tiny_model, tmp_path, "inline")
    shutil.copytree(inline, tmp_path / "inline")
    shutil.copy(inline.parent / "pool.jsonl", tmp_path)
    config = tmp_path / "inline" / "config.yaml"
    config.write_text(config.read_text().replace(str(inline.parent), str(tmp_path)))
    with open(tmp_path / "inline/checkpoints/step_8/policy/model.safetensors", "r+b") as file:
        file.truncate(1000)
    done = train(*arguments)
    check(done)
    assert "step_8 is damaged (policy/model.safetensors was truncated or altered)" in done.stdout
    assert "after step 6" in done.stdout
    assert_same_run(inline, tmp_path / "inline")
    for state in (tmp_path / "inline" / "checkpoints").glob("step_*/state.json"):
        state.write_text(state.read_text() + " ")
    done = train(*arguments)
    check(done, 2)
    assert "are damaged" in done.stderr


def test_a_sweep_gives_each_job_its_own_run(tiny_model: Path, tmp_path: Path) -> None:
    check(train("-m", *overrides(tiny_model, tmp_path, "sweep", "steps=1"), "seed=0,1"))
    zero, one = (metrics(tmp_path / "sweep" / f"seed={seed}") for seed in (0, 1))
    assert len(zero) == len(one) == 1
    assert zero != one


BAD = {
    "unknown key": (["learner.lrr=1"], "did you mean 'learner.lr'"),
    "added unknown key": (["+learner.lrr=1"], "did you mean 'learner.lr'"),
    "unknown group": (["scheduler=botz"], "did you mean 'bots'"),
    "unknown experiment": (["+experiment=letters_bot"], "did you mean 'letters_bots'"),
    "wrong type": (["learner.lr=fast"], "learner.lr"),
    "not a choice": (["learner.layout=packet"], "did you mean 'packed'"),
    "out of range": (["learner.zero_stage=4"], "learner.zero_stage=4"),
    "unknown argument of a part": (["+scheduler.selector.targte=0.4"], "did you mean 'target'"),
    "no such part": (
        ["scheduler.selector._target_=rft.scheduler.selectors.uniform.Unifrm"],
        "'Uniform'",
    ),
    "no model": (["model.path=/nowhere/model"], "model.path=/nowhere/model"),
    "no pool": (["tasks.train.source=nowhere.jsonl"], "tasks.train.source=nowhere.jsonl"),
    "more positions than the model has": (["rollout.max_tokens=60"], "64 positions"),
    "a budget that holds no sequence": (["learner.token_budget=8"], "learner.token_budget=8"),
    "more ranks than cores": (["cluster=ray", "learner.workers=4096"], "learner.workers=4096"),
    "inline with ranks": (["learner.workers=2"], "cluster=inline"),
    "a GPU run without a GPU": (["cluster.device=cuda"], "without an NVIDIA GPU"),
    "an engine key that the run sets": (["+rollout.engine.dtype=bfloat16"], "model.dtype"),
    "not a choice of a part": (["objective.aggregation=mean"], "did you mean 'token_mean'"),
    "betas out of range": (["learner.betas=[0.9,1.5]"], "learner.betas=[0.9, 1.5]"),
    "a remote cluster's device": (["cluster=ray", "cluster.address=auto"], "cluster.device=auto"),
    "more tasks than the pool": (["tasks_per_step=4000"], "tasks_per_step=4000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case: str, tiny_model: Path, tmp_path: Path) -> None:
    extra, words = BAD[case]
    done = train(*overrides(tiny_model, tmp_path, "run", *extra))
    check(done, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.jsonl"))


def test_an_occupied_port_is_named(tiny_model: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        extra = ["cluster=ray", "learner.workers=2", f"learner.port={port}"]
        done = train(*overrides(tiny_model, tmp_path, "run", *extra))
    check(done, 2)
    assert f"learner.port={port}" in done.stderr


def test_a_read_only_folder_is_named(tiny_model: Path, tmp_path: Path) -> None:
    done = train(*overrides(tiny_model, tmp_path, "run", "runs_dir=/proc/nowhere"))
    check(done, 2)
    assert "/proc/nowhere" in done.stderr


def test_a_model_without_a_tokenizer_is_named(tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model / name).read_bytes())
    done = train(*overrides(tiny_model, tmp_path, "run", f"model.path={bare}"))
    check(done, 2)
    assert "tokenizer" in done.stderr


def test_the_config_is_refused_without_torch(tiny_model: Path, tmp_path: Path) -> None:
    """Validation of a good config imports neither torch nor ray nor vllm nor transformers."""
    code = (
        "import sys; from hydra import compose, initialize_config_module\n"
        "from hydra.core.config_store import ConfigStore\n"
        "from rft.config.compose import Composed, to_config\n"
        "from rft.config.validate import validate\n"
        "ConfigStore.instance().store(name='schema', node=Composed)\n"
        "with initialize_config_module('rft.configs', version_base='1.3'):\n"
        "    config = to_config(compose('train', sys.argv[1:]))\n"
        "validate(config)\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])\n"
    )
    arguments = overrides(tiny_model, tmp_path, "run")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENV, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_dry_run_says_what_would_happen(tiny_model: Path, tmp_path: Path) -> None:
    done = train(*overrides(tiny_model, tmp_path, "run", "dry_run=true"))
    check(done)
    for words in ("4 tasks x 8 rollouts = 32 rollouts", "all parts in this process", "parameters"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()
