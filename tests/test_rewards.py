"""Verifiers may do anything: it costs the one score, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rft.errors import RftError
from rft.records import Score, Task
from rft.rewards.exact import ExactAnswer
from rft.rewards.pool import VerifierPool

TIMEOUT = 3.0
"""Seconds; the machine may be busy."""


def puppet(name: str = "Puppet", workers: int = 2, **keys: Any) -> VerifierPool:
    verifier = {"_target_": f"verifiers_for_tests.{name}", **keys}
    return VerifierPool(verifier, workers=workers, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    made = puppet()
    yield made
    made.close()


def score(pool: VerifierPool, *texts: str) -> list[Score]:
    return pool.score([(Task(f"t{i}", "p", "a"), text, "stop") for i, text in enumerate(texts)])


def verdicts(pool: VerifierPool, *texts: str) -> list[tuple[float, str]]:
    return [(s.reward, s.reason) for s in score(pool, *texts)]


def test_correct_partial_and_wrong_come_back_in_order(pool: VerifierPool) -> None:
    texts = ["1", "0", "0.25", "1.0", "0", "1", "0.5"]
    assert verdicts(pool, *texts) == [
        (float(text), {0.0: "wrong", 1.0: "correct"}.get(float(text), "partial")) for text in texts
    ]


def test_nothing_to_score_gives_no_scores(pool: VerifierPool) -> None:
    assert pool.score([]) == []


def test_fewer_items_than_workers_are_scored(pool: VerifierPool) -> None:
    assert verdicts(pool, "1") == [(1.0, "correct")]


def test_a_verifier_that_raises_is_an_error_with_its_words_and_not_a_wrong_answer(
    pool: VerifierPool,
) -> None:
    a, b, c = score(pool, "1", "raise", "nothing")
    assert a == Score(1.0, "correct")
    assert (b.reward, b.reason) == (0.0, "error")
    assert "ValueError: no such answer" in b.detail
    assert (c.reward, c.reason) == (0.0, "error")
    assert "TypeError" in c.detail


def test_a_hang_is_killed_at_its_deadline_and_costs_that_one_score(pool: VerifierPool) -> None:
    start = time.monotonic()
    assert verdicts(pool, "1", "hang", "0", "1", "0.5", "0") == [
        (1.0, "correct"),
        (0.0, "timeout"),
        (0.0, "wrong"),
        (1.0, "correct"),
        (0.5, "partial"),
        (0.0, "wrong"),
    ]
    assert time.monotonic() - start < 100  # a hang would be 600


def test_a_verifier_that_ends_its_process_costs_that_one_score(pool: VerifierPool) -> None:
    found = score(pool, "1", "exit", "0", "1")
    assert [s.reason for s in found] == ["correct", "error", "wrong", "correct"]
    assert "ended with 3" in found[1].detail


@pytest.mark.parametrize("text", ["sys.exit", "interrupt"])
def test_a_verifier_that_calls_for_an_exit_costs_that_one_score(
    pool: VerifierPool, text: str
) -> None:
    try:
        found = score(pool, "1", text, "0")
    except (SystemExit, KeyboardInterrupt) as error:
        pytest.fail(f"{type(error).__name__} came out of the pool and would end the run")
    assert [s.reason for s in found] == ["correct", "error", "wrong"]


def test_checks_that_are_slow_together_but_not_alone_are_no_timeouts() -> None:
    """Two checks in one message are over the deadline of one check."""
    pool = puppet(workers=1)
    try:
        assert verdicts(pool, *["sleep 1.8"] * 2, *["1"] * 6) == [(1.0, "correct")] * 8
    finally:
        pool.close()


@pytest.mark.parametrize("reward", ["nan", "1.7", "-0.1", "inf"])
def test_a_reward_outside_0_and_1_is_an_error_of_that_one_score(
    pool: VerifierPool, reward: str
) -> None:
    a, b, c = score(pool, "1", reward, "0")
    assert [s.reason for s in (a, b, c)] == ["correct", "error", "wrong"]
    assert b.reward == 0.0
    assert reward in b.detail


def test_a_fraction_is_an_error_unless_the_verifier_declares_it() -> None:
    pool = puppet("Whole")
    try:
        (found,) = score(pool, "0.5")
        assert found.reason == "error"
        assert "fractional = True" in found.detail
    finally:
        pool.close()


def test_a_timeout_that_the_verifier_notices_itself_is_one(pool: VerifierPool) -> None:
    (found,) = score(pool, "late")
    assert found == Score(0.0, "timeout", "test 3 took too long")


def test_a_verdict_brings_its_detail(pool: VerifierPool) -> None:
    (found,) = score(pool, "verdict")
    assert found == Score(1.0, "correct", "all tests pass")


@pytest.mark.parametrize("text", ["fork and hang", "daemon and hang"])
def test_what_a_verifier_forks_ends_with_it(pool: VerifierPool, tmp_path: Path, text: str) -> None:
    note = tmp_path / "pid"
    (found,) = score(pool, f"{text} {note}")
    assert found.reason == "timeout"
    assert not psutil.pid_exists(int(note.read_text()))
    assert verdicts(pool, "1", "0") == [(1.0, "correct"), (0.0, "wrong")]


def test_a_verifier_that_prints_without_end_is_a_timeout(
    pool: VerifierPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verdicts(pool, "print", "1") == [(0.0, "timeout"), (1.0, "correct")]
    assert capfd.readouterr().out == ""


def test_a_verifier_that_eats_memory_is_an_error() -> None:
    pool = VerifierPool(
        {"_target_": "verifiers_for_tests.Puppet"}, workers=1, timeout=20.0, memory_gib=1.0
    )
    try:
        found = score(pool, "eat", "1")
        assert [s.reason for s in found] == ["error", "correct"]
        assert "MemoryError" in found[0].detail
    finally:
        pool.close()


def test_a_verifier_may_import_torch() -> None:
    pool = VerifierPool({"_target_": "verifiers_for_tests.Torch"}, workers=2, timeout=200.0)
    try:
        assert verdicts(pool, "1", "0", "hang me") == [
            (1.0, "correct"),
            (0.0, "wrong"),
            (0.0, "error"),
        ]
    finally:
        pool.close()


def test_a_verifier_that_kills_its_parent_costs_its_own_score_and_the_pool_goes_on() -> None:
    pool = puppet(workers=1)
    try:
        found = score(pool, "1", "kill parent", "0", "1")
        assert [s.reason for s in found] == ["correct", "error", "wrong", "correct"]
    finally:
        pool.close()


@pytest.mark.parametrize("name", ["Puppet", "Slow"])
def test_checks_beside_some_that_kill_all_workers_are_made_again(name: str) -> None:
    """Three of 32; nobody else is blamed, also where workers are just being built, and no worker is
    left that has lost its parent."""
    before = orphans()
    verifier = {"_target_": f"verifiers_for_tests.{name}"}
    pool = VerifierPool(verifier, workers=4, timeout=100.0)
    texts = ["sleep 0.3", "1", "0", "0.5"] * 8
    killers = {1, 6, 20}
    for i in killers:
        texts[i] = "kill parent"
    try:
        found = score(pool, *texts)
        reasons = {"1": "correct", "0": "wrong", "0.5": "partial", "sleep 0.3": "correct"}
        reasons["kill parent"] = "error"
        assert [s.reason for s in found] == [reasons[text] for text in texts]
        assert all("ended with -9" in found[i].detail for i in killers)
    finally:
        pool.close()
    assert orphans() <= before


def orphans() -> set[int]:
    """Workers and what they are forked from, without a parent."""
    found = set()
    for process in psutil.process_iter(["ppid", "cmdline"]):
        if process.info["ppid"] == 1 and "rft.rewards.nursery" in (process.info["cmdline"] or []):
            found.add(process.pid)
    return found


def test_half_a_surrogate_pair_and_megabytes_pass(pool: VerifierPool) -> None:
    assert verdicts(pool, "length \ud800", "length " + "x" * 10_000_000) == [(1.0, "correct")] * 2


def test_a_thousand_hostile_answers_leave_a_pool_of_the_same_size_and_no_call_is_late() -> None:
    """Bounds are far above what is usual: the machine may be busy. A check that is late by a tenth
    of a second is a timeout, whatever it would have been, on a busy machine too."""
    before = len(psutil.Process().children(recursive=True))
    pool = VerifierPool({"_target_": "verifiers_for_tests.Puppet"}, workers=2, timeout=0.1)
    kinds = ["hang", "exit", "raise", "nan", "-1", "sys.exit", "print", "fork and hang /dev/null"]
    late = {"hang", "print", "fork and hang /dev/null"}
    texts = [kinds[i % len(kinds)] for i in range(1000)]
    try:
        start = time.monotonic()
        for text in texts[:50]:  # one by one
            began = time.monotonic()
            assert verdicts(pool, text)[0][0] == 0.0
            assert time.monotonic() - began < 10.0
        found = score(pool, *texts[50:])
        assert {s.reason for s, text in zip(found, texts[50:], strict=True) if text in late} == {
            "timeout"
        }
        others = [s.reason for s, text in zip(found, texts[50:], strict=True) if text not in late]
        assert others.count("error") > 0.8 * len(others)
        assert set(others) <= {"error", "timeout"}
        assert time.monotonic() - start < 600
        assert len(psutil.Process().children(recursive=True)) <= before + 3  # nursery, two workers
    finally:
        pool.close()
    assert len(psutil.Process().children(recursive=True)) == before


def test_checks_go_on_while_the_caller_does_something_else(pool: VerifierPool) -> None:
    verdicts(pool, *["1"] * 8)  # its workers are there
    pool.submit([7], [(Task("a", "p", "a"), "sleep 1", "stop")])
    pool.submit([8], [(Task("b", "p", "a"), "0", "stop")])
    found = {key: score.reason for key, score in pool.poll(0.0)}
    assert 7 not in found
    while len(found) < 2:
        found |= {key: score.reason for key, score in pool.poll(5.0)}
    assert found == {7: "correct", 8: "wrong"}
    assert pool.poll(0.0) == []


@pytest.mark.parametrize("name", ["Unbuildable", "Dying"])
@pytest.mark.timeout(300)
def test_a_verifier_that_cannot_be_built_is_one_clear_error(name: str) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RftError, match=rf"verifiers_for_tests\.{name}"):
        puppet(name).close()
    left = [c for c in psutil.Process().children(recursive=True) if c not in before]
    assert left == []


def test_a_verifier_that_is_never_built_is_an_error_and_not_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rft.rewards.pool.START_SECONDS", 2.0, raising=False)
    outcome: list[object] = []

    def build() -> None:
        try:
            puppet("Endless", workers=1)
        except RftError as error:
            outcome.append(error)

    thread = threading.Thread(target=build, daemon=True)
    before = set(psutil.Process().children(recursive=True))
    thread.start()
    thread.join(60)
    for process in set(psutil.Process().children(recursive=True)) - before:
        process.kill()
    assert outcome, "still waiting after a minute"


@pytest.mark.timeout(300)
def test_a_verifier_that_cannot_be_built_again_is_one_clear_error(tmp_path: Path) -> None:
    pool = puppet("OnceOnly", workers=1, path=str(tmp_path / "built"))
    try:
        with pytest.raises(RftError, match=r"verifiers_for_tests\.OnceOnly"):
            score(pool, "exit", "1")
    finally:
        pool.close()


def test_its_processes_are_gone_after_close() -> None:
    pool = puppet()
    pids = {int(s.detail) for s in score(pool, *["pid"] * 8)}
    assert all(psutil.pid_exists(pid) for pid in pids)
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_closing_ends_checks_that_are_under_way_and_those_that_wait() -> None:
    others = set(psutil.Process().children())
    mine = puppet()
    mine.submit(range(60), [(Task("a", "p", "a"), "sleep 1", "stop")] * 60)
    (started,) = set(psutil.Process().children()) - others  # what its workers are forked from
    start = time.monotonic()
    mine.close()
    assert time.monotonic() - start < 20.0  # all of them would take half a minute
    assert not started.is_running()
    with pytest.raises(RftError, match="were closed"):
        mine.poll(1.0)


def test_closing_gives_the_check_under_way_no_score() -> None:
    mine = VerifierPool({"_target_": "verifiers_for_tests.Puppet"}, workers=1, timeout=600.0)
    (worker,) = {int(s.detail) for s in score(mine, "pid")}
    mine.submit([0], [(Task("a", "p", "a"), "sleep 600", "stop")])
    time.sleep(0.2)  # it is with the worker; were it not, it would have no score either
    assert psutil.pid_exists(worker)
    mine.close()
    with pytest.raises(RftError, match="were closed"):
        mine.poll(1.0)


def test_closing_while_a_worker_is_built_says_so_and_does_not_blame_the_verifier(
    tmp_path: Path,
) -> None:
    others = set(psutil.Process().children())
    mine = puppet("QuickOnce", path=str(tmp_path / "built"))
    (nursery,) = set(psutil.Process().children()) - others
    mine.submit(range(2), [(Task("a", "p", "a"), "sleep 1", "stop")] * 2)
    end = time.monotonic() + 30
    while len(nursery.children()) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    mine.close()
    with pytest.raises(RftError, match="were closed"):
        mine.poll(1.0)


@pytest.mark.timeout(300)
def test_a_lost_process_that_workers_are_forked_from_costs_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = puppet()
    try:
        pids = [int(s.detail) for s in score(pool, *["pid"] * 8)]
        nursery, workers = psutil.Process(pids[0]).parent(), map(psutil.Process, set(pids))
        assert nursery is not None
        nursery.kill()
        psutil.wait_procs([*workers], timeout=10)
        assert verdicts(pool, *["1"] * 8) == [(1.0, "correct")] * 8
        monkeypatch.setattr("rft.rewards.pool.END_SECONDS", 1.0)
        nursery = psutil.Process(int(score(pool, "pid")[0].detail)).parent()
        assert nursery is not None
        nursery.suspend()  # it answers no more
        reasons = [s.reason for s in score(pool, "hang", "1", "hang", "0")]
        assert reasons == ["timeout", "correct", "timeout", "wrong"]
    finally:
        pool.close()


# ---- the verifiers there are


@pytest.mark.parametrize(
    ("text", "finish", "reward"),
    [("42", "stop", 1.0), (" 42\n", "stop", 1.0), ("42", "length", 0.0), ("420", "stop", 0.0)],
)
def test_an_exact_answer_is_the_whole_text_and_ended_by_the_model(
    text: str, finish: Any, reward: float
) -> None:
    assert ExactAnswer()(Task("t", "p", "42"), text, finish) == reward
