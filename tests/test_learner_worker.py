"""The learner on real DeepSpeed: one gradient, however it is split, sharded or spread over ranks.

Every rank is a process of its own, and stays for the whole module since starting one takes long.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rft.cluster.groups import Learner
from rft.errors import RftError
from rft.learner.worker import LearnerSettings, LearnerWorker
from rft.records import Receipt, Totals
from rft.records import Sequence as TrainSequence
from rft.weights import unpack

STAGES = (0, 1, 2, 3)
LR = 1e-4
BUDGET = 4096
ROWS = [(12, 1.0), (9, -0.7), (20, 0.4), (7, -1.1), (15, 0.9), (11, -0.2), (18, 0.5), (10, -0.8)]
"""Tokens and advantage of each sequence; a third of the tokens are the prompt."""

Weights = dict[str, npt.NDArray[np.float32]]
Updates = list[tuple[list[TrainSequence], Totals]]
Job = Callable[..., Any]

_part: Any = None


def _make(rank: int, world: int, settings: LearnerSettings) -> None:
    global _part
    torch.set_num_threads(1)
    _part = LearnerWorker(rank, world, settings)


def _call(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_part, method)(*args)


def _inside(job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return job(_part, *args)


def _end(worker: LearnerWorker) -> None:
    worker._engine.destroy()


class Rank:
    """One learner rank in its process, with `call` as `rft.cluster.base.Handle` has it."""

    def __init__(self, number: int) -> None:
        self.name = f"rank {number}"
        context = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, mp_context=context)

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self.process.submit(_call, method, args)


class Ranks:
    """Processes for `world` ranks; as much of a cluster as a `Learner` needs."""

    def __init__(self, world: int) -> None:
        self.ranks = [Rank(number) for number in range(world)]
        self.running: Learner | None = None

    def learner(
        self,
        model: Path,
        stage: int = 0,
        token_budget: int = BUDGET,
        resume: Path | None = None,
        kl_coef: float = 0.0,
        **keys: Any,
    ) -> Learner:
        """A learner that started anew, or from `resume`; ends the one before it."""
        self.end()
        objective = {"_target_": "rft.learner.objectives.PolicyLoss", "kl_coef": kl_coef}
        options: dict[str, Any] = {
            "model_path": str(model),
            "dtype": "float32",
            "attention": "sdpa",
            "gradient_checkpointing": False,
            "device": "cpu",
            "threads": 1,
            "zero_stage": stage,
            "token_budget": token_budget,
            "betas": (0.9, 0.95),
            "weight_decay": 0.01,
            "max_grad_norm": 0.0,
            "temperature": 1.0,
            "seed": 3,
            "objective": objective,
        }
        settings = LearnerSettings(**(options | keys))
        made = [
            rank.process.submit(_make, i, len(self.ranks), settings)
            for i, rank in enumerate(self.ranks)
        ]
        self.gather(made, what="construction", deadline=60)
        learner = Learner(self, self.ranks, token_budget=token_budget, deadline=90)  # type: ignore[arg-type]
        learner.start(0, resume)
        self.running = learner
        return learner

    def inside(self, job: Job, *args: Any) -> list[Any]:
        """What `job(worker, ...)` returns in each rank's process."""
        pending = [rank.process.submit(_inside, job, args) for rank in self.ranks]
        return self.gather(pending, what="a job", deadline=90)

    def end(self) -> None:
        """The ranks stay joined, which saves time; leaving and joining again has its own test."""
        if self.running is not None:
            self.running = None
            self.inside(_end)

    def gather(self, pending: Sequence[Future[Any]], *, what: str, deadline: float) -> list[Any]:
        return [future.result(deadline) for future in pending]

    def host(self, handle: Any) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        for rank in self.ranks:
            for process in (rank.process._processes or {}).values():
                process.kill()
            rank.process.shutdown()


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def sequences(rows: Sequence[tuple[int, float]] = ROWS, seed: int = 0) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for length, advantage in rows:
        response = length - length // 3
        tokens = rng.integers(3, 49, length).astype(np.int32)
        behaviour = rng.normal(-3, 0.3, response).astype(np.float32)
        made.append(TrainSequence(tokens, response, advantage, behaviour))
    return made


def totals(of: Sequence[TrainSequence]) -> Totals:
    return Totals(sum(s.response for s in of), len(of), 16)


def batch(rows: Sequence[tuple[int, float]] = ROWS, seed: int = 0) -> Updates:
    made = sequences(rows, seed)
    return [(made, totals(made))]


def weights(of: Learner) -> Weights:
    bundle, receipt = of.publish(1)
    found = bundle.result()
    assert receipt == Receipt(1, found.checksum)
    return {name: tensor.numpy().copy() for name, tensor in unpack(found)}


def two_steps(of: Learner) -> tuple[Weights, list[dict[str, float]]]:
    """Two optimizer steps on different data; weights after them, and their metrics."""
    metrics = [of.learn(batch(seed=seed), LR)[0] for seed in (0, 1)]
    return weights(of), metrics


def assert_close(a: Weights, b: Weights) -> None:
    """Equal to 1e-6, where a step moves each weight by 1e-4. Adam divides a gradient by its own
    size, so the few that are next to nothing may differ by what rounding made of them."""
    assert a.keys() == b.keys()
    gap = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
    assert (gap > 1e-6).sum() <= 10, f"{(gap > 1e-6).sum()} of {len(gap)} weights differ"
    assert gap.max() < LR / 5


def assert_equal(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def expected(alone: Ranks, tiny_model: Path) -> tuple[Weights, list[dict[str, float]]]:
    """One rank without ZeRO, all sequences in one micro-batch."""
    learner = alone.learner(tiny_model)
    before = weights(learner)
    found = two_steps(learner)
    moved = max(float(np.abs(found[0][name] - before[name]).max()) for name in before)
    assert moved > 1.5 * LR  # a hundred times the tolerance of what follows
    return found


# ---- one gradient


@pytest.mark.parametrize("token_budget", [BUDGET, 20])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_do_not_depend_on_micro_batches_or_zero_stage(
    alone: Ranks,
    tiny_model: Path,
    expected: tuple[Weights, list[dict[str, float]]],
    stage: int,
    token_budget: int,
) -> None:
    found, metrics = two_steps(alone.learner(tiny_model, stage, token_budget))
    assert_close(found, expected[0])
    for ours, theirs in zip(metrics, expected[1], strict=True):
        for name in ("loss", "grad_norm", "entropy", "clip_fraction", "mismatch_kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_does(
    pair: Ranks,
    tiny_model: Path,
    expected: tuple[Weights, list[dict[str, float]]],
    stage: int,
) -> None:
    found, metrics = two_steps(pair.learner(tiny_model, stage, token_budget=20))
    assert_close(found, expected[0])
    for ours, theirs in zip(metrics, expected[1], strict=True):
        for name in ("loss", "grad_norm", "entropy", "mismatch_kl", "mismatch_max"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rows", [ROWS[:1], [(20, 1.0), (19, -1.0), (18, 0.5)]])
def test_a_rank_with_fewer_micro_batches_than_the_other_changes_nothing(
    alone: Ranks, pair: Ranks, tiny_model: Path, stage: int, rows: list[tuple[int, float]]
) -> None:
    updates = batch(rows)
    one, two = (ranks.learner(tiny_model, stage, 20) for ranks in (alone, pair))
    (ours,), (theirs,) = one.learn(updates, LR), two.learn(updates, LR)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert_close(weights(one), weights(two))


@pytest.mark.parametrize("stage", [0, 2])
def test_rows_without_advantage_may_be_left_out(alone: Ranks, tiny_model: Path, stage: int) -> None:
    rows = [(length, 0.0 if i % 2 else advantage) for i, (length, advantage) in enumerate(ROWS)]
    ((every, counts),) = batch(rows)
    some = [s for s in every if s.advantage]
    found = []
    for computed in (every, some):
        learner = alone.learner(tiny_model, stage)
        (metrics,) = learner.learn([(computed, counts)], LR)
        found.append((weights(learner), metrics["grad_norm"]))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_the_gradient_is_the_one_of_a_plain_loop(alone: Ranks, tiny_model: Path) -> None:
    """Written out for one sequence at a time with transformers' own logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ((rows, counts),) = batch()
    loss = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
        logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1] / 0.7, -1)
        logp = logp.gather(1, ids[0, 1:, None])[-row.response :, 0]
        loss = loss - row.advantage * (logp - logp.detach()).exp().sum() / counts.tokens
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01).step()

    learner = alone.learner(tiny_model, temperature=0.7)
    (metrics,) = learner.learn(batch(), LR)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    found = weights(learner)
    plain = {n: p.detach().numpy() for n, p in model.named_parameters(remove_duplicate=False)}
    assert_close(found, plain)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_to_their_global_norm(
    alone: Ranks, pair: Ranks, tiny_model: Path, stage: int
) -> None:
    """The second of two clipped steps differs from the unclipped one by the first's size."""
    found = {}
    for name, ranks, limit in (("one", alone, 0.05), ("two", pair, 0.05), ("free", alone, 0.0)):
        learner = ranks.learner(tiny_model, stage, max_grad_norm=limit)
        metrics = [learner.learn(batch(seed=seed), LR)[0] for seed in (0, 1)]
        found[name] = weights(learner)
        assert metrics[0]["grad_norm"] > 0.5  # as it was before clipping
    assert_close(found["one"], found["two"])
    largest = max(np.abs(found["one"][n] - found["free"][n]).max() for n in found["one"])
    assert largest > 10e-6
    learner = alone.learner(tiny_model, 0, max_grad_norm=0.05)
    two_steps(learner)
    assert_close(found["one"], weights(learner))


def test_several_updates_take_their_ratios_from_the_weights_before_the_first(
    alone: Ranks, tiny_model: Path
) -> None:
    """At such a rate the second step's ratios have left the clipping range."""
    learner = alone.learner(tiny_model)
    first, second = learner.learn(batch() + batch(), 0.05)
    assert first["clip_fraction"] == 0.0
    assert second["clip_fraction"] > 0.0
    assert second["mismatch_kl"] == pytest.approx(first["mismatch_kl"], rel=1e-5)


def test_a_kl_term_pulls_back_to_the_first_weights(alone: Ranks, tiny_model: Path) -> None:
    learner = alone.learner(tiny_model, 2, kl_coef=1.0)
    assert learner.needs_reference
    still = batch([(length, 0.0) for length, _ in ROWS])
    (nothing,) = learner.learn(still, LR)
    assert nothing["kl"] == pytest.approx(0.0, abs=1e-6)
    assert nothing["grad_norm"] == pytest.approx(0.0, abs=1e-5)
    learner.learn(batch(), 0.01)
    away, back = (learner.learn(still, 1e-3)[0]["kl"] for _ in range(2))
    assert away > back > 0.0


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_recomputes_and_changes_nothing(
    alone: Ranks, tiny_model: Path, stage: int
) -> None:
    found = []
    forwards = []
    for on in (False, True):
        learner = alone.learner(tiny_model, stage, gradient_checkpointing=on)
        alone.inside(_count_forwards)
        learner.learn(batch(), LR)
        forwards += alone.inside(_forwards)
        found.append(weights(learner))
    assert_close(*found)
    assert forwards == [1, 2]


def _count_forwards(worker: LearnerWorker) -> None:
    worker.forwards = 0  # type: ignore[attr-defined]

    def count(*_: Any) -> None:
        worker.forwards += 1  # type: ignore[attr-defined]

    worker._hf.model.layers[0].mlp.register_forward_pre_hook(count)


def _forwards(worker: LearnerWorker) -> int:
    return worker.forwards  # type: ignore[attr-defined,no-any-return]


def test_bfloat16_learns_with_every_stage(alone: Ranks, tiny_model: Path) -> None:
    for stage in STAGES:
        learner = alone.learner(tiny_model, stage, dtype="bfloat16", max_grad_norm=1.0)
        metrics = [learner.learn(batch(), 1e-3)[0] for _ in range(3)]
        assert metrics[0]["grad_norm"] > 0.5
        before, after = metrics[0]["entropy"], metrics[-1]["entropy"]
        assert np.isfinite(after)
        assert before != after


# ---- log-probs


def transformers_logp(model: Path, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    found = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    return np.asarray(found.numpy())


@pytest.mark.parametrize("stage", [0, 3])
def test_log_probs_are_those_of_transformers_at_temperature_1(
    alone: Ranks, tiny_model: Path, stage: int
) -> None:
    learner = alone.learner(tiny_model, stage, temperature=0.5)
    tokens = sequences()[2].tokens
    found = learner.logprobs(tokens)
    np.testing.assert_allclose(found, transformers_logp(tiny_model, tokens), atol=1e-5)


def test_temperature_scales_the_logits_that_are_learnt_from(alone: Ranks, tiny_model: Path) -> None:
    """Behaviour log-probs taken at the temperature agree, and at another they do not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = []
    for row in sequences():
        ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, :-1] / 0.7, -1)
        behaviour = logp.gather(1, ids[0, 1:, None])[-row.response :, 0].numpy()
        rows.append(TrainSequence(row.tokens, row.response, row.advantage, behaviour))
    gaps = [
        alone.learner(tiny_model, temperature=t).learn([(rows, totals(rows))], LR)[0][
            "mismatch_max"
        ]
        for t in (0.7, 1.0)
    ]
    assert gaps[0] < 1e-5
    assert gaps[1] > 0.1


def test_many_tokens_are_scored_in_chunks_with_the_same_result() -> None:
    from rft.learner import logprobs

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 16)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(16, 8), head

        def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor]:
            return (self.embed(input_ids),)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    module = logprobs.TokenLogProbs(Model(), 0.7)
    tokens_BT = torch.randint(0, 16, (3, logprobs.CHUNK))
    targets_BT = torch.rand(tokens_BT.shape) < 0.8
    targets_BT[:, 0] = False
    results = []
    for rows in (slice(0, 3), *(slice(i, i + 1) for i in range(3))):
        module.zero_grad()
        logp_N, entropy_N = module(tokens_BT[rows], targets_BT[rows])
        (logp_N.sum() / 1000).backward()
        assert head.weight.grad is not None
        results.append((logp_N.detach(), entropy_N, head.weight.grad.clone()))
    whole, *parts = results
    assert len(whole[0]) > logprobs.CHUNK
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2])
    assert not whole[1].requires_grad


# ---- saving and publishing


@pytest.mark.parametrize("stage", STAGES)
def test_a_learner_that_was_saved_goes_on_bit_for_bit(
    alone: Ranks, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    goes_on_bit_for_bit(alone, tiny_model, tmp_path, stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_that_were_saved_go_on_bit_for_bit(
    pair: Ranks, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    goes_on_bit_for_bit(pair, tiny_model, tmp_path, stage)


def goes_on_bit_for_bit(ranks: Ranks, model: Path, folder: Path, stage: int) -> None:
    learner = ranks.learner(model, stage)
    learner.learn(batch(seed=0), LR)
    learner.save(folder)
    at_save = weights(learner)
    state = ranks.inside(_random)
    learner.learn(batch(seed=1), 2 * LR)
    after = weights(learner)

    again = ranks.learner(model, stage, resume=folder / "learner")
    assert ranks.inside(_random) == state
    assert_equal(weights(again), at_save)
    again.learn(batch(seed=1), 2 * LR)
    assert_equal(weights(again), after)


def _random(worker: LearnerWorker) -> list[int]:
    state = torch.get_rng_state()
    draw = torch.randint(0, 2**31, (3,)).tolist()
    torch.set_rng_state(state)
    return [int(x) for x in draw]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_saved_policy_loads_in_transformers_with_its_tokenizer(
    pair: Ranks, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    learner = pair.learner(tiny_model, stage)
    learner.learn(batch(), LR)
    learner.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    named = {n: p.detach().numpy() for n, p in model.named_parameters(remove_duplicate=False)}
    assert_equal(weights(learner), named)
    tokens = sequences()[0].tokens
    np.testing.assert_allclose(
        learner.logprobs(tokens), transformers_logp(tmp_path / "policy", tokens), atol=1e-5
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").encode("ab") == (
        AutoTokenizer.from_pretrained(tiny_model).encode("ab")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_published_is_the_model_under_all_its_names(
    alone: Ranks, tiny_model: Path, stage: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    named = {n: p.detach().numpy() for n, p in model.named_parameters(remove_duplicate=False)}
    assert "lm_head.weight" in named  # tied to the embeddings, and vLLM asks for it
    learner = alone.learner(tiny_model, stage)
    assert_equal(weights(learner), named)
    bundle = learner.publish(7)[0].result()
    assert bundle.version == 7
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size <= len(bundle.data) < size + 64 * len(named)  # shared tensors are sent once


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RftError, match=rf"learner\.port={port} .*learner\.port=0"):
            LearnerWorker(0, 2, None).open("127.0.0.1", port)  # type: ignore[arg-type]


def test_a_learner_that_was_closed_can_be_started_again_in_its_process(tiny_model: Path) -> None:
    """A sweep with cluster=inline trains several runs in one process."""
    ranks = Ranks(1)
    try:
        found = []
        for _ in range(2):
            learner = ranks.learner(tiny_model)
            learner.learn(batch(), LR)
            found.append(weights(learner))
            ranks.gather([rank.call("close") for rank in ranks.ranks], what="closing", deadline=30)
            ranks.running = None
        assert_equal(*found)
    finally:
        ranks.close()


def test_the_head_is_called_as_often_as_told_whatever_the_number_of_tokens(
    tiny_model: Path,
) -> None:
    """ZeRO-3 gathers the head's weights at each call, so ranks must call it equally often."""
    from transformers import AutoModelForCausalLM

    from rft.learner.logprobs import TokenLogProbs

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    for tokens in (2, 12):
        tokens_BT = torch.arange(3, 3 + tokens)[None]
        targets_BT = torch.arange(tokens)[None] > 0
        with torch.no_grad():
            whole = TokenLogProbs(model, 1.0)(tokens_BT, targets_BT)
            calls.clear()
            parts = TokenLogProbs(model, 1.0, chunks=3)(tokens_BT, targets_BT)
        assert len(calls) == 3
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b)
