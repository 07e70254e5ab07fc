"""Estimators that see the prompts, the one that only counts, and the script that embeds a pool."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ENV, HERE, check, write_pool

from rft.config.schema import TasksConfig
from rft.errors import RftError
from rft.scheduler.estimators import embeddings as embeddings_module
from rft.scheduler.estimators.attention import AttentionEstimator
from rft.scheduler.estimators.observed import ObservedRate
from rft.scheduler.estimators.value_head import ValueHead
from rft.scheduler.parts import Estimator, Floats, PoolView, Report, Setup
from rft.state import load_state, save_state
from rft.tasks.prompts import PromptEncoder

SCRIPT = HERE.parent / "scripts/embed_prompts.py"
EMBEDDING = [ValueHead, AttentionEstimator]


def setup(n: int, seed: int = 0) -> Setup:
    unknown = np.full(n, np.nan)
    pool = PoolView([f"t{i}" for i in range(n)], unknown, unknown)
    return Setup(pool, tasks_per_step=16, rollouts_per_task=8, seed=seed)


def report(
    tasks: Sequence[int], rates: Sequence[float] | Floats, step: int = 1, n: int = 8
) -> Report:
    array, rate, count = np.array(tasks), np.array(rates), np.full(len(tasks), float(n))
    return Report(step, step - 1, array, count, count * rate, rate, array, 0)


def write(folder: Path, rows: Any) -> str:
    path = folder / "embeddings.npy"
    np.save(path, rows)
    return str(path)


def spearman(a: Floats, b: Floats) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


class Linear:
    """Tasks whose pass rate is a sigmoid of a direction in their embeddings, which have a large
    part in common; the first half is trained on."""

    def __init__(self, folder: Path, n: int = 600, width: int = 24) -> None:
        rng = np.random.default_rng(1)
        z = rng.normal(size=(n, width))
        self.rates = 1.0 / (1.0 + np.exp(-2.0 * z @ rng.normal(size=width) / np.sqrt(width)))
        self.path = write(folder, (z * rng.uniform(0.1, 9.0, width) + 30.0).astype(np.float32))
        self.setup, self.n = setup(n), n

    def train(self, estimator: Estimator, steps: range) -> None:
        for step in steps:
            rng = np.random.default_rng(step)
            tasks = rng.choice(self.n // 2, 16, replace=False)
            estimator.observe(report(tasks, rng.binomial(8, self.rates[tasks]) / 8.0, step))


# ---- from embeddings


@pytest.mark.parametrize("kind", EMBEDDING)
def test_tasks_never_trained_on_are_ranked_by_their_embeddings(kind: Any, tmp_path: Path) -> None:
    world = Linear(tmp_path)
    unseen = np.arange(world.n // 2, world.n)
    estimator = kind(world.setup, embeddings=world.path)
    world.train(estimator, range(1, 41))
    rates, evidence = estimator.predict(unseen)
    assert spearman(rates, world.rates[unseen]) > 0.8
    assert ((rates >= 0) & (rates <= 1)).all()
    assert (evidence > 0).all()
    error = ((rates - world.rates[unseen]) ** 2).mean()
    assert error < 0.4 * world.rates[unseen].var(), "calibrated, not only in order"
    assert np.array_equal(estimator.sample(unseen, np.random.default_rng(0)), rates)


@pytest.mark.parametrize("kind", EMBEDDING)
def test_nothing_is_known_before_any_feedback(kind: Any, tmp_path: Path) -> None:
    estimator = kind(setup(5), embeddings=write(tmp_path, np.eye(5)))
    for _ in range(2):
        rates, evidence = estimator.predict(np.arange(5))
        assert np.isnan(rates).all()
        assert evidence.tolist() == [0.0] * 5
        estimator.observe(report([], []))  # nor by a plan of which nothing came back


@pytest.mark.parametrize("kind", EMBEDDING)
def test_an_estimator_goes_on_from_its_state_to_the_bit(kind: Any, tmp_path: Path) -> None:
    world = Linear(tmp_path)
    whole, part, resumed = (kind(world.setup, embeddings=world.path) for _ in range(3))
    world.train(whole, range(1, 31))
    world.train(part, range(1, 16))
    save_state(tmp_path / "state", part.state())
    world.train(part, range(16, 20))
    resumed.load(load_state(tmp_path / "state"))
    world.train(resumed, range(16, 31))
    for a, b in zip(whole.predict(np.arange(600)), resumed.predict(np.arange(600)), strict=True):
        assert np.array_equal(a, b)
    fresh = kind(world.setup, embeddings=world.path)
    save_state(tmp_path / "fresh", fresh.state())
    fresh.load(load_state(tmp_path / "fresh"))
    assert np.isnan(fresh.predict(np.arange(3))[0]).all()


@pytest.mark.parametrize("kind", EMBEDDING)
def test_predicting_in_chunks_changes_nothing(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Linear(tmp_path)
    estimator = kind(world.setup, embeddings=world.path)
    world.train(estimator, range(1, 4))
    tasks = np.random.default_rng(0).permutation(world.n)
    at_once = estimator.predict(tasks)
    monkeypatch.setattr(embeddings_module, "CHUNK", 7 * 512)
    assert estimator._embeddings.step == 7
    for a, b in zip(at_once, estimator.predict(tasks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    rebuilt = kind(world.setup, embeddings=world.path)
    np.testing.assert_allclose(rebuilt._embeddings._scale, estimator._embeddings._scale)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((4, 3)), "has 4 rows and the pool 5 tasks; write it for this pool with scripts/"),
        (np.zeros(5), r"holds no float array \[tasks, dimensions\]"),
        (np.zeros((5, 3), dtype=np.int64), "holds no float array"),
        (
            np.array([[0.0], [1.0], [np.nan], [0.0], [0.0]]),
            "row 2, task 't2', holds a value that is",
        ),
        (
            np.array([[0.0], [1.0], [0.0], [0.0], [np.inf]]),
            "row 4, task 't4', holds a value that is",
        ),
        (np.array([[object()]] * 5), "is not a .npy file .*Python objects"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RftError, match=message):
        ValueHead(setup(5), embeddings=write(tmp_path, rows))


def test_embeddings_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RftError, match=r"none.npy is not there; .* scripts/embed_prompts.py"):
        AttentionEstimator(setup(5), embeddings=f"{tmp_path}/none.npy")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(RftError, match=r"text.npy is not a .npy file"):
        AttentionEstimator(setup(5), embeddings=f"{tmp_path}/text.npy")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_are_standardised_over_the_pool(dtype: Any, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(50.0, 3.0, size=(200, 4)).astype(dtype)
    rows[:, 2] = 7.0  # says nothing
    path = write(tmp_path, rows)
    whole = embeddings_module.Embeddings(path, setup(200)).of(np.arange(200))
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(whole.std(axis=0), [1.0, 1.0, 0.0, 1.0], atol=1e-3)


# ---- the value head


def test_the_evidence_of_a_value_head_is_discounted_by_report(tmp_path: Path) -> None:
    estimator = ValueHead(setup(5), embeddings=write(tmp_path, np.eye(5)))
    estimator.observe(report([0, 1], [0.5, 0.5], n=8))
    assert estimator.predict(np.array([4]))[1].item() == 8.0
    estimator.observe(report([0], [0.5], n=4))
    assert estimator.predict(np.array([4]))[1].item() == pytest.approx(0.9 * 8 + 4)


def test_the_value_head_descends_the_gradient_of_its_squared_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    head = ValueHead(setup(9), embeddings=write(tmp_path, rng.normal(size=(9, 6))), hidden=5)
    head._weights[:] = rng.normal(size=len(head._weights))
    x, rate = head._embeddings.of(np.arange(9)), rng.random(9).astype(np.float32)
    W1, b1, w2, b2 = (torch.tensor(w, requires_grad=True) for w in head._split(head._weights))
    value = torch.sigmoid(torch.tanh(torch.tensor(x) @ W1.T + b1) @ w2 + b2)
    np.testing.assert_allclose(head.predict(np.arange(9))[0], np.nan, equal_nan=True)
    np.testing.assert_allclose(head._forward(x)[1], value.detach(), atol=1e-6)
    ((value - torch.tensor(rate)) ** 2).mean().backward()
    expected = torch.cat([w.grad.flatten() for w in (W1, b1, w2, b2) if w.grad is not None])
    np.testing.assert_allclose(head._gradient(x, rate), expected, atol=1e-6)


def test_the_value_head_updates_as_adam_does(tmp_path: Path) -> None:
    head = ValueHead(setup(3), embeddings=write(tmp_path, np.eye(3)), lr=0.01, hidden=4)
    weights = torch.tensor(head._weights.copy(), requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.01)
    for seed in range(5):
        gradient = np.random.default_rng(seed).normal(size=len(weights)).astype(np.float32)
        head._update(gradient)
        weights.grad = torch.tensor(gradient)
        adam.step()
    np.testing.assert_allclose(head._weights, weights.detach(), rtol=1e-4, atol=1e-6)


def test_the_seed_decides_how_a_value_head_starts(tmp_path: Path) -> None:
    path = write(tmp_path, np.eye(5))
    starts = [ValueHead(setup(5, seed), embeddings=path).state()["weights"] for seed in (0, 0, 1)]
    assert np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


def test_a_state_of_another_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, np.eye(5))
    state = ValueHead(setup(5), embeddings=path, hidden=8).state()
    with pytest.raises(RftError, match=r"57 weights and the config asks for 29; restore"):
        ValueHead(setup(5), embeddings=path, hidden=4).load(state)


# ---- attention


def attend(z: Floats, rates: dict[int, float], query: int, temperature: float) -> float:
    """By the formula, a task at a time."""
    z = (z - z.mean(axis=0)) / z.std(axis=0)
    scores = {i: z[query] @ z[i] / np.sqrt(z.shape[1]) / temperature for i in rates if i != query}
    weights = {i: np.exp(score) for i, score in scores.items()}
    return float(sum(w * rates[i] for i, w in weights.items()) / sum(weights.values()))


def test_few_references_give_their_mean_by_attention_and_their_rollouts(tmp_path: Path) -> None:
    z = np.random.default_rng(0).normal(size=(12, 5))
    estimator = AttentionEstimator(setup(12), embeddings=write(tmp_path, z), temperature=2.0)
    estimator.observe(report([3, 4, 5], [0.0, 0.5, 1.0], n=4))
    estimator.observe(report([4], [0.75], step=2, n=8))  # its latest rate counts
    references = {3: 0.0, 4: 0.75, 5: 1.0}
    rates, evidence = estimator.predict(np.arange(12))
    expected = [attend(z, references, q, 2.0) for q in range(12)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    assert evidence[4] == pytest.approx(4.0), "it does not attend to itself"
    assert ((evidence[:3] > 4) & (evidence[:3] < 8)).all()


def test_the_only_reference_says_nothing_of_itself(tmp_path: Path) -> None:
    estimator = AttentionEstimator(setup(3), embeddings=write(tmp_path, np.eye(3)))
    estimator.observe(report([1], [0.25]))
    rates, evidence = estimator.predict(np.arange(3))
    assert rates[[0, 2]].tolist() == [0.25, 0.25]
    assert np.isnan(rates[1])
    assert evidence.tolist() == [8.0, 0.0, 8.0]


def test_the_line_is_fitted_to_references_that_are_left_out_in_turn(tmp_path: Path) -> None:
    world = Linear(tmp_path, n=60)
    z = np.load(world.path).astype(np.float64)
    estimator = AttentionEstimator(world.setup, embeddings=world.path)
    tasks, observed = np.arange(30), world.rates[:30]
    metrics = estimator.observe(report(tasks.tolist(), observed))
    references = dict(zip(range(30), observed.tolist(), strict=True))
    said = [attend(z, references, q, 4.0) for q in range(60)]
    slope, base = np.polyfit(said[:30], observed, 1)
    assert metrics["estimate/slope"] == pytest.approx(slope, rel=1e-4)
    expected = np.clip(base + slope * np.array(said), 0.0, 1.0)
    np.testing.assert_allclose(estimator.predict(np.arange(60))[0], expected, atol=1e-4)


def test_references_that_say_nothing_of_one_another_give_their_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path, rng.normal(size=(50, 400)))
    estimator = AttentionEstimator(setup(50), embeddings=path, temperature=100.0)
    observed = rng.random(30)
    metrics = estimator.observe(report([*range(30)], observed))
    assert metrics["estimate/slope"] == 0.0, "left out, each lowers the others' mean by itself"
    np.testing.assert_allclose(estimator.predict(np.arange(50))[0], observed.mean())


def test_the_latest_tasks_are_the_references(tmp_path: Path) -> None:
    path = write(tmp_path, np.random.default_rng(0).normal(size=(20, 3)))
    estimator = AttentionEstimator(setup(20), embeddings=path, window=4)
    for step, tasks in enumerate(([0, 1, 2], [3, 0], [5]), start=1):
        estimator.observe(report(tasks, [step / 10] * len(tasks), step))
    assert estimator.state()["tasks"].tolist() == [2, 3, 0, 5]
    assert estimator.state()["rates"].tolist() == [0.1, 0.2, 0.2, 0.3]
    estimator.observe(report([*range(6, 16)], [0.5] * 10, step=4))
    assert estimator.state()["tasks"].tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (ValueHead, {"hidden": 0}),
        (ValueHead, {"lr": 0.0}),
        (ValueHead, {"updates": 0}),
        (AttentionEstimator, {"window": 1}),
        (AttentionEstimator, {"temperature": 0.0}),
    ],
)
def test_a_key_out_of_range_is_named(kind: Any, keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RftError, match=f"scheduler.estimator.{next(iter(keys))}="):
        kind(setup(5), embeddings=write(tmp_path, np.eye(5)), **keys)


# ---- what was observed, and nothing else


def test_the_observed_rate_is_that_of_the_last_visit_or_of_all() -> None:
    last, every = ObservedRate(setup(4), window="last"), ObservedRate(setup(4), window="all")
    for estimator in (last, every):
        estimator.observe(report([1, 2], [0.5, 1.0], n=8))
        estimator.observe(report([2], [0.25], step=2, n=4))
    for estimator, rate, n in ((last, 0.25, 4.0), (every, 0.75, 12.0)):
        rates, evidence = estimator.predict(np.array([0, 1, 2]))
        assert np.isnan(rates[0])
        assert rates[1:].tolist() == [0.5, rate]
        assert evidence.tolist() == [0.0, 8.0, n]
        assert estimator.sample(np.array([1, 2]), np.random.default_rng(0)).tolist() == [0.5, rate]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_observed_rates_are_the_means_of_any_history_and_survive(data: Any) -> None:
    window = data.draw(st.sampled_from(["last", "all"]))
    estimator, seen = ObservedRate(setup(6), window=window), {}
    for step in range(data.draw(st.integers(0, 6))):
        tasks = data.draw(st.lists(st.integers(0, 5), unique=True))
        for task in tasks:
            n = data.draw(st.integers(1, 16))
            total = float(data.draw(st.integers(0, n)))
            before = seen.get(task, (0, 0.0)) if window == "all" else (0, 0.0)
            seen[task] = (before[0] + n, before[1] + total)
            one = np.array([float(n)])
            at = np.array([task])
            estimator.observe(Report(step, step, at, one, one * 0 + total, total / one, at, 0))
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", estimator.state())
        resumed = ObservedRate(setup(6), window=window)
        resumed.observe(report([0], [1.0]))  # what a state replaces
        resumed.load(load_state(Path(folder) / "state"))
    rates, evidence = resumed.predict(np.arange(6))
    for task in range(6):
        n, total = seen.get(task, (0, 0.0))
        assert evidence[task] == n
        assert rates[task] == total / n if n else np.isnan(rates[task])


# ---- the script


def arguments(model: Path, pool: Path, out: Path, *more: str) -> list[str]:
    where = ["--model", str(model), "--out", str(out), "--device", "cpu", "--quiet"]
    return [*where, f"model.path={model}", f"tasks.train.source={pool}", "tasks_per_step=1", *more]


def test_the_script_writes_the_mean_last_hidden_state_of_every_prompt(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    pool, out = write_pool(tmp_path / "pool.jsonl", tasks=40), tmp_path / "made" / "embeddings.npy"
    given = arguments(tiny_model, pool, out, "--batch-tokens", "40")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *given], env=ENV, capture_output=True, text=True, timeout=200
    )
    check(done)
    rows = np.load(out)
    assert rows.shape == (40, 128)
    assert rows.dtype == np.float32
    assert [file.name for file in out.parent.iterdir()] == ["embeddings.npy"]
    encoder = PromptEncoder(str(tiny_model), TasksConfig())
    prompts = [json.loads(line)["prompt"] for line in pool.read_text().splitlines()]
    model = AutoModel.from_pretrained(tiny_model)
    for row, prompt in zip(rows, map(encoder.encode, prompts), strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([prompt])).last_hidden_state[0]
        np.testing.assert_allclose(row, states.mean(dim=0), atol=2e-5)
    ValueHead(setup(40), embeddings=str(out))


def test_the_script_reads_the_runs_pool_and_names_what_is_wrong(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    pool, out = tmp_path / "pool.jsonl", tmp_path / "e.npy"
    rows = [{"question": f"ab{c}", "answer": "a"} for c in "abcb"] + [
        {"question": "a" * 20, "answer": "a"}
    ]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["+tasks.train.columns.prompt=question", "tasks.max_prompt_tokens=8"]
    main(arguments(tiny_model, pool, out, *columns))
    assert np.load(out).shape == (3, 128), "what the run leaves out is left out"
    for more, message in (
        (["tasks.train.sorce=x"], "did you mean 'tasks.train.source'?"),
        ([], "no column 'prompt'"),
        (["--out", f"{tmp_path}/e.bin"], "must end in .npy"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments(tiny_model, pool, out, *more))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
