"""The learner on real DeepSpeed: what it learns, saves, publishes and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from learning import (
    LR,
    ROWS,
    Ranks,
    Updates,
    Weights,
    assert_close,
    assert_equal,
    batch,
    kl,
    learn,
    loss,
    publish,
    sequences,
    totals,
    two_steps,
    weights,
)

from rft.cluster.groups import Learner
from rft.errors import RftError
from rft.learner.worker import LearnerWorker
from rft.weights.delta import DeltaWeights

STAGES = (0, 1, 2, 3)


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


# ---- one gradient


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rows", [ROWS[:1], [(20, 1.0), (19, -1.0), (18, 0.5)]])
def test_a_rank_with_fewer_micro_batches_than_the_other_changes_nothing(
    alone: Ranks, pair: Ranks, tiny_model: Path, stage: int, rows: list[tuple[int, float]]
) -> None:
    updates = batch(rows)
    one, two = (ranks.learner(tiny_model, stage, 20) for ranks in (alone, pair))
    (ours,), (theirs,) = learn(one, updates), learn(two, updates)
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
        (metrics,) = learn(learner, [(computed, counts)])
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

    learner = alone.learner(tiny_model)
    (metrics,) = learn(learner, batch(), temperature=0.7)
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
        metrics = [learn(learner, batch(seed=seed))[0] for seed in (0, 1)]
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
    first, second = learn(learner, batch() + batch(), 0.05)
    assert first["clip_fraction"] == 0.0
    assert second["clip_fraction"] > 0.0
    assert second["mismatch_kl"] == pytest.approx(first["mismatch_kl"], rel=1e-5)


def test_a_kl_term_pulls_back_to_the_first_weights(alone: Ranks, tiny_model: Path) -> None:
    learner = alone.learner(tiny_model, 2, objective=kl(1.0))
    assert learner.facts.every_rollout
    still = batch([(length, 0.0) for length, _ in ROWS])
    (nothing,) = learn(learner, still)
    assert nothing["kl"] == pytest.approx(0.0, abs=1e-6)
    assert nothing["grad_norm"] == pytest.approx(0.0, abs=1e-5)
    learn(learner, batch(), 0.01)
    away, back = (learn(learner, still, 1e-3)[0]["kl"] for _ in range(2))
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
        learn(learner, batch())
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


def test_bfloat16_learns_with_every_stage_that_keeps_float32_masters(
    alone: Ranks, tiny_model: Path
) -> None:
    for stage in STAGES[1:]:
        learner = alone.learner(tiny_model, stage, dtype="bfloat16", max_grad_norm=1.0)
        metrics = [learn(learner, batch(), 1e-3)[0] for _ in range(3)]
        assert metrics[0]["grad_norm"] > 0.5
        before, after = metrics[0]["entropy"], metrics[-1]["entropy"]
        assert np.isfinite(after)
        assert before != after


# ---- what may not be learnt from


def poisoned(**keys: Any) -> Updates:
    ((rows, counts),) = batch()
    rows[3] = replace(rows[3], task="r-bad", **keys)
    return [(rows, counts)]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_prob_that_is_no_number_is_named_and_nothing_learnt(
    alone: Ranks, tiny_model: Path, value: float
) -> None:
    learner = alone.learner(tiny_model, 2)
    before = weights(learner)
    logp = sequences()[3].behaviour_logp.copy()
    logp[1] = value
    with pytest.raises(
        RftError, match=rf"step 4: the engine's log-prob of a token of task r-bad is {value}"
    ):
        learn(learner, poisoned(behaviour_logp=logp), step=4)
    assert_equal(weights(learner), before)


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_are_no_numbers_stop_all_ranks_alike(
    pair: Ranks, tiny_model: Path, stage: int
) -> None:
    """One rank alone sees it, and neither waits for the other."""
    learner = pair.learner(tiny_model, stage, token_budget=20)
    pair.inside(_break_on_rank_1)
    with pytest.raises(RftError, match=r"the learner's log-prob of a token of task r-test is nan"):
        learn(learner, batch())


def _break_on_rank_1(worker: LearnerWorker) -> None:
    def spoil(module: Any, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * float("nan")

    if worker._rank == 1:
        worker._hf.model.norm.register_forward_hook(spoil)


def test_an_advantage_that_is_no_number_is_named(alone: Ranks, tiny_model: Path) -> None:
    learner = alone.learner(tiny_model)
    with pytest.raises(RftError, match="the advantage of a rollout of task r-bad is inf"):
        learn(learner, poisoned(advantage=float("inf")))


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        *((stage, {}) for stage in STAGES),
        *((stage, {"dtype": "bfloat16"}) for stage in (1, 3)),
        *((stage, {"dtype": "bfloat16", "offload": "optimizer"}) for stage in (1, 2, 3)),
    ],
)
def test_a_gradient_that_overflows_is_skipped_and_poisons_nothing(
    pair: Ranks, tiny_model: Path, stage: int, keys: dict[str, Any]
) -> None:
    learner = pair.learner(tiny_model, stage, **keys)
    learn(learner, batch(seed=0))
    learn(learner, batch(seed=1))
    expected = weights(learner)
    learner = pair.learner(tiny_model, stage, **keys)
    learn(learner, batch(seed=0))
    before = weights(learner)
    ((rows, counts),) = poisoned(advantage=3e38)
    small = replace(counts, tokens=rows[3].response + 1)
    (metrics,) = learn(learner, [(rows[3:4], small)])  # twice its loss is over float32's largest
    assert metrics["skipped"] == 1.0
    assert_equal(weights(learner), before)
    (metrics,) = learn(learner, batch(seed=1))
    assert metrics["skipped"] == 0.0
    assert_equal(weights(learner), expected)


@pytest.mark.parametrize("world", ["alone", "pair"])
def test_a_mismatch_over_the_limit_stops_before_the_step(
    request: pytest.FixtureRequest, tiny_model: Path, world: str
) -> None:
    learner = request.getfixturevalue(world).learner(tiny_model, 1, mismatch_limit=0.5)
    before = weights(learner)
    rows = [replace(r, behaviour_logp=r.behaviour_logp - 3.0) for r in sequences()]
    with pytest.raises(RftError, match=r"mismatch/kl is .*, over learner\.mismatch_limit=0\.5"):
        learn(learner, [(rows, totals(rows))])
    assert_equal(weights(learner), before)


def test_a_layout_that_would_not_be_exact_is_refused(alone: Ranks, tiny_model: Path) -> None:
    with pytest.raises(RftError, match=r"learner\.layout=shared would not be exact"):
        alone.learner(tiny_model, layout="shared", attention="flex_attention")


# ---- references


def near(period: int, coef: float) -> dict[str, Any]:
    term = {"_target_": "rft.learner.kl.Kl", "coef": coef, "every": period}
    return loss(kl={"near": term})


def test_a_reference_is_refreshed_when_its_period_comes(alone: Ranks, tiny_model: Path) -> None:
    """At steps 2 and 4 it becomes the policy of before the step, so at 3 and 5 it is near again."""
    learner = alone.learner(tiny_model, objective=near(2, 1e-6))
    found = [learn(learner, batch(), 1e-3, step=step)[0]["kl"] for step in range(1, 7)]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] < found[3] > found[2]
    assert found[4] < found[3]
    assert found[5] > found[4]


def test_a_refreshed_reference_is_the_same_after_a_resume(
    alone: Ranks, tiny_model: Path, tmp_path: Path
) -> None:
    learner = alone.learner(tiny_model, 1, objective=near(2, 1.0))
    for step in (1, 2, 3):
        learn(learner, batch(), 1e-3, step=step)
    learner.save(tmp_path)
    (goes_on,) = learn(learner, batch(), 1e-3, step=4)
    assert goes_on["kl"] > 0.0
    after = weights(learner)
    again = alone.learner(tiny_model, 1, objective=near(2, 1.0), resume=tmp_path / "learner")
    (resumed,) = learn(again, batch(), 1e-3, step=4)
    assert resumed["kl"] == goes_on["kl"]
    assert_equal(weights(again), after)


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
    learner = alone.learner(tiny_model, stage)
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
        rows.append(replace(row, behaviour_logp=behaviour))
    learner = alone.learner(tiny_model)
    gaps = [
        learn(learner, [(rows, totals(rows))], lr=0.0, temperature=t)[0]["mismatch_max"]
        for t in (0.7, 1.0)
    ]
    assert gaps[0] < 1e-5
    assert gaps[1] > 0.1


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
    two_steps(learner)  # one would not tell whether Adam's count of steps is restored
    learner.save(folder)
    at_save = weights(learner)
    state = ranks.inside(_random)
    learn(learner, batch(seed=1), 2 * LR)
    after = weights(learner)

    again = ranks.learner(model, stage, resume=folder / "learner")
    assert ranks.inside(_random) == state
    assert_equal(weights(again), at_save)
    learn(again, batch(seed=1), 2 * LR)
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
    learn(learner, batch())
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
    published = publish(learner, 7)
    assert published.version == 7
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size <= published.nbytes < size + 64 * len(named)  # shared tensors are sent once


@pytest.mark.parametrize("stage", [1, 3])
def test_what_two_ranks_publish_of_their_changes_is_the_whole(
    pair: Ranks, tiny_model: Path, stage: int
) -> None:
    learner = pair.learner(tiny_model, stage, dtype="bfloat16", delta=True)
    first = publish(learner, 1)
    unchanged = publish(learner, 2)
    learn(learner, batch(), lr=1e-5)
    changed = publish(learner, 3)
    assert (first.nbytes, unchanged.nbytes) == (first.layout.size, 0)
    assert 0 < changed.nbytes < first.nbytes / 3
    assert_equal({n: t.float().numpy() for n, t in changed.tensors()}, whole(learner))


def whole(learner: Learner) -> Weights:
    """What a new engine would load of the version published last."""
    weights = publish(learner, 4)
    assert isinstance(weights, DeltaWeights)
    weights.whole.verify()
    return {n: t.float().numpy().copy() for n, t in weights.whole.tensors()}


def test_a_rank_that_has_no_memory_to_publish_does_not_hold_up_the_other(
    pair: Ranks, tiny_model: Path
) -> None:
    learner = pair.learner(tiny_model, 3)
    pair.inside(_leave_memory, 2**19)
    first, second = (rank.call("publish", 1) for rank in pair.ranks)
    with pytest.raises(RftError, match=r"0\.00 GiB of shared host memory, 0\.00 GiB are available"):
        first.result(60)
    assert second.result(60) is None
    pair.inside(_leave_memory, 2**40)
    assert publish(learner, 2).version == 2


def _leave_memory(worker: LearnerWorker, left: int) -> None:
    from rft.weights import shared

    shared.free_memory = lambda: left


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
            learn(learner, batch())
            found.append(weights(learner))
            ranks.gather([rank.call("close") for rank in ranks.ranks], what="closing", deadline=30)
            ranks.running = None
        assert_equal(*found)
    finally:
        ranks.close()
