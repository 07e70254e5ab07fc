"""Transforms: which rollouts are trained on, and that a resumed run picks the same. Takes 5 s."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import build, check
from rft.errors import RftError
from rft.learner.advantages import GroupAdvantage
from rft.records import Group, Rollout, Score
from rft.state import load_state, save_state
from rft.transforms.d3s import D3s, most_varied
from rft.transforms.drop_zero_variance import DropZeroVariance
from rft.transforms.replay import Replay
from rft.transforms.thin import Balance
from rft.transforms.transform import Transform

NAN = float("nan")


def rollout(task: str, index: int, *, forced: bool = False, text: str = "") -> Rollout:
    length = index % 4  # of one in four nothing is left
    draw = np.random.default_rng([index, *task.encode()])
    return Rollout(
        task=task,
        index=index,
        tag="plain",
        prompt_ids=tuple(range(len(task))),
        response_ids=draw.integers(0, 1000, length).astype(np.int32),
        behaviour_logp=-draw.random(length).astype(np.float32),
        version=draw.integers(0, 9, length).astype(np.int32),
        finish="stop" if index % 2 else "length",
        text=text,
        forced=draw.random(length) < 0.5 if forced else None,
    )


def group(task: str, signal: list[float]) -> Group:
    """A group with the advantages of `signal`, which the verifier's rewards do not show."""
    n = len(signal)
    plain = Group(
        task,
        tuple(rollout(task, i) for i in range(n)),
        tuple(Score(0.0, "wrong") for _ in range(n)),
        shaped=np.array(signal, dtype=np.float64),
    )
    return replace(plain, advantage=GroupAdvantage()([plain])[0])


def kept(group: Group) -> list[int]:
    """Which rollouts of a group are trained on."""
    found = range(len(group.rollouts)) if group.kept is None else np.flatnonzero(group.kept)
    return [int(i) for i in found]


def kept_advantages(groups: list[Group]) -> list[float]:
    found = []
    for of in groups:
        assert of.advantage is not None
        found += of.advantage[kept(of)].tolist()
    return found


# ---- dropping groups


def test_groups_whose_shaped_rewards_are_equal_are_dropped() -> None:
    mixed = group("mixed", [1.0, 0.0])
    groups = [
        mixed,
        group("equal", [0.3] * 8),
        group("rounding", [0.1 + 0.2, 0.3]),
        group("one", [0.5]),
        group("abstains", [NAN, 1.0, 1.0]),
        group("all abstain", [NAN, NAN]),
        group("none", []),
    ]
    assert DropZeroVariance(0)(1, 0.0, groups) == [mixed]
    still = group("abstains", [NAN, 1.0, 0.0])
    assert DropZeroVariance(0)(1, 0.0, [still]) == [still]


# ---- thinning groups


@given(
    rewards=st.lists(st.sampled_from([0.0, 1.0, NAN]), max_size=12),
    n=st.integers(2, 9),
    step=st.integers(1, 5),
)
@settings(deadline=None, max_examples=200)
def test_a_group_is_thinned_to_halves_and_what_one_lacks_the_other_fills(
    rewards: list[float], n: int, step: int
) -> None:
    whole = group("t", rewards)
    found = Balance(7, n=n)(step, 0.5, [whole])
    known = sum(r == r for r in rewards)
    if not known:
        assert found == []
        return
    (thinned,) = found
    chosen = kept(thinned)
    assert len(chosen) == min(n, known)
    values = [rewards[i] for i in chosen]
    assert not np.isnan(values).any()
    mixed = 0.0 in rewards and 1.0 in rewards
    good, bad = (values.count(1.0), values.count(0.0)) if mixed else (0, len(values))
    good_pool, bad_pool = (rewards.count(1.0), rewards.count(0.0)) if mixed else (0, known)
    assert good == good_pool or good >= n // 2
    assert bad == bad_pool or bad >= n - n // 2
    assert thinned.advantage is whole.advantage  # of the whole group
    assert thinned.rollouts is whole.rollouts
    assert kept(Balance(7, n=n)(step, 0.5, [whole])[0]) == chosen


def test_which_rollouts_are_kept_is_drawn_by_seed_step_and_task() -> None:
    def picks(seed: int, step: int, task: str) -> list[int]:
        return kept(Balance(seed, n=4)(step, 0.0, [group(task, [1.0, 0.0] * 16)])[0])

    everything = [picks(*c) for c in itertools.product([0, 1], [1, 2], ["a", "b"])]
    assert len({tuple(p) for p in everything}) == 8
    often = np.bincount([i for step in range(200) for i in picks(0, step, "a")], minlength=32)
    assert often.min() > 5  # each of 32 is expected 25 times


def test_what_is_not_kept_already_is_not_chosen() -> None:
    before = np.array([0, 1, 1, 1, 1, 1], dtype=bool)
    whole = replace(group("t", [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), kept=before)
    for transform in (Balance(0, n=4), D3s(0, start=0.8, end=0.8)):
        (found,) = transform(1, 0.0, [whole])
        assert len(kept(found)) == 4
        assert 1 in kept(found)
        assert 0 not in kept(found)
    none = replace(whole, kept=np.zeros(6, dtype=bool))
    assert Balance(0, n=4)(1, 0.0, [none]) == []
    assert D3s(0)(1, 0.0, [none]) == []


# ---- thinning the batch


@given(
    values=st.lists(st.integers(-3, 3) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9),
    data=st.data(),
)
@settings(deadline=None, max_examples=300)
def test_no_other_choice_of_rollouts_varies_more(values: list[float], data: st.DataObject) -> None:
    x = np.array(values, dtype=np.float64)
    n = data.draw(st.integers(1, len(x)))
    mask = most_varied(x, n, np.random.default_rng(0))
    assert mask.sum() == n
    best = max(np.var(x[list(choice)]) for choice in itertools.combinations(range(len(x)), n))
    assert np.var(x[mask]) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("progress", "n"), [(0.0, 10), (0.5, 23), (1.0, 36)])
def test_the_share_of_the_batch_grows_with_progress(progress: float, n: int) -> None:
    rng = np.random.default_rng(0)
    groups = [group(str(i), rng.random(8).tolist()) for i in range(5)]
    found = D3s(0)(1, progress, groups)
    chosen = kept_advantages(found)
    assert len(chosen) == n
    everything = np.sort(kept_advantages(groups))
    splits = [
        np.var(np.concatenate([everything[:low], everything[40 - n + low :]]))
        for low in range(n + 1)
    ]
    assert np.var(chosen) == pytest.approx(max(splits))
    assert [g.task for g in found] == sorted(g.task for g in found)
    for thinned in found:
        assert thinned.advantage is groups[int(thinned.task)].advantage


def test_groups_that_vary_little_are_dropped_and_abstentions_are_not_counted() -> None:
    groups = [group("equal", [1.0] * 4), group("mixed", [1.0, 0.0, 0.0, 1.0, NAN, NAN])]
    (found,) = D3s(0, start=0.5, end=0.5)(1, 0.0, groups)
    assert found.task == "mixed"
    assert kept(found) == [0, 1, 2, 3]
    assert D3s(0)(1, 0.0, []) == []
    assert [kept(g) for g in D3s(0)(1, 0.0, [group("a", [1.0, 0.0])])] in ([[0]], [[1]])


def test_which_of_equal_advantages_are_kept_does_not_depend_on_their_place() -> None:
    groups = [group(str(i), [1.0, 0.0]) for i in range(20)]
    often = np.zeros(20)
    for step in range(100):
        for found in D3s(0, start=0.5, end=0.5)(step, 0.0, groups):
            often[int(found.task)] += len(kept(found))
    assert often.sum() == 2000
    assert often.min() > 70  # 100 are expected


# ---- replay


def fresh(step: int, count: int = 10) -> list[Group]:
    return [group(f"{step}.{i}", [1.0, 0.0]) for i in range(count)]


def steps_of(groups: list[Group]) -> list[int]:
    return [int(g.task.split(".")[0]) for g in groups]


def test_the_first_step_has_nothing_to_replay() -> None:
    groups = fresh(1)
    same(Replay(0, share=1.0)(1, 0.0, groups), groups)


@pytest.mark.parametrize(("window", "share"), [(1, 0.4), (2, 0.4), (3, 0.9), (2, 0.0), (2, 1.0)])
def test_a_share_of_the_groups_is_of_the_last_steps(window: int, share: float) -> None:
    replay = Replay(0, window=window, share=share)
    old: list[int] = []
    for step in range(1, 121):
        groups = fresh(step)
        found = replay(step, 0.0, groups)
        assert len(found) == len(groups)
        assert len({g.task for g in found}) == len(found)  # none twice
        ages = step - np.array(steps_of(found))
        assert ages.min() >= 0
        assert ages.max() <= window
        if step > window:
            old += ages.tolist()
        for mine, theirs in zip(found, groups, strict=True):
            assert mine is theirs or mine.task != theirs.task
    assert np.mean(np.array(old) > 0) == pytest.approx(share, abs=0.05)
    if share:
        per_age = np.bincount(old, minlength=window + 1)[1:] / sum(np.array(old) > 0)
        np.testing.assert_allclose(per_age, 1 / window, atol=0.07)


def test_replayed_groups_are_what_they_were() -> None:
    replay = Replay(0, window=1, share=1.0)
    first = fresh(1)
    replay(1, 0.0, first)
    found = replay(2, 0.5, fresh(2))
    assert sorted(map(id, found)) == sorted(map(id, first))


def test_a_step_with_few_groups_or_none_leaves_fewer_to_replay() -> None:
    replay = Replay(0, window=1, share=1.0)
    replay(1, 0.0, fresh(1, 3))
    assert sorted(steps_of(replay(2, 0.0, fresh(2, 10)))) == [1] * 3 + [2] * 7
    assert replay(3, 0.0, []) == []
    assert steps_of(replay(4, 0.0, fresh(4))) == [4] * 10
    assert steps_of(replay(9, 0.0, fresh(9))) == [9] * 10  # what is older than the window is gone


def every_kind() -> list[Group]:
    """Groups that use all that a group can hold."""
    shaped = group("ü", [1.0, NAN, 0.0, 0.25, 1.0])
    plain = Group(
        "plain",
        tuple(
            rollout("plain", i, forced=i > 1, text=t) for i, t in enumerate(["", "ü\ud800", "x"])
        ),
        (Score(1.0, "correct"), Score(0.0, "timeout", "10 s"), Score(0.5, "partial", "é")),
    )
    plain = replace(plain, advantage=GroupAdvantage()([plain])[0])
    return [
        shaped,
        replace(shaped, kept=np.array([1, 0, 1, 1, 0], dtype=bool)),
        plain,
        Group("empty", (), (), advantage=np.zeros(0)),
    ]


def same(a: Any, b: Any) -> None:
    """Asserts that two records are equal to the last bit, types included."""
    assert type(a) is type(b)
    if isinstance(a, (Group, Rollout, Score)):
        for f in fields(a):
            same(getattr(a, f.name), getattr(b, f.name))
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


def resumed(transform: Transform, fresh: Transform, folder: Path) -> Transform:
    """`fresh` with the state of `transform`, by way of a file."""
    save_state(folder / "state.safetensors", {"transforms": {"it": transform.state()}})
    stored = load_state(folder / "state.safetensors")
    fresh.load(stored.get("transforms", {}).get("it", {}))
    return fresh


def test_what_is_to_be_replayed_survives_on_disk_to_the_last_bit(tmp_path: Path) -> None:
    replay = Replay(0, window=2, share=1.0)
    replay(9, 0.0, every_kind())
    replay(10, 0.0, fresh(10, 3))
    again = resumed(replay, Replay(0, window=2, share=1.0), tmp_path)
    ours, theirs = (r(11, 0.0, fresh(11, 7)) for r in (replay, again))
    assert sorted(g.task for g in ours) == ["10.0", "10.1", "10.2", "empty", "plain", "ü", "ü"]
    same(ours, theirs)


SHIPPED = resources.files("rft.configs") / "transform"
NAMES = sorted(f.name[:-5] for f in SHIPPED.iterdir() if f.name.endswith(".yaml"))


def shipped(name: str, seed: int = 3) -> Transform:
    part = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    check("transforms", part)
    made: Transform = build(part, seed)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_picks_the_same(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def groups(step: int) -> list[Group]:
        return [
            group(f"{step}.{i}", (rng.random(6) < 0.5).astype(float).tolist()) for i in range(9)
        ]

    lives = shipped(name)
    assert resumed(lives, shipped(name), tmp_path).state() == lives.state()  # nothing happened yet
    for step in range(1, 7):
        again = resumed(lives, shipped(name), tmp_path)
        batch = groups(step)
        ours = lives(step, step / 10, list(batch))
        same(ours, again(step, step / 10, list(batch)))
    assert ours
    other = shipped(name, seed=4)
    other.load(lives.state())
    if name != "drop_zero_variance":
        picked = [(g.task, kept(g)) for g in lives(7, 0.7, list(batch))]
        assert picked != [(g.task, kept(g)) for g in other(7, 0.7, list(batch))]


def test_values_that_cannot_work_are_refused() -> None:
    for make, said in (
        (lambda: Balance(0, n=1), "Balance cannot work with n=1"),
        (lambda: D3s(0, start=0.0), "D3s cannot work with start=0.0"),
        (lambda: D3s(0, end=NAN), "D3s cannot work with end=nan"),
        (lambda: Replay(0, window=0), "Replay cannot work with window=0"),
        (lambda: Replay(0, share=1.5), "Replay cannot work with share=1.5"),
    ):
        with pytest.raises(RftError, match=said):
            make()
