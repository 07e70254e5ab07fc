"""Which rollouts a page has inside it, how their texts are cut, and that it stays small."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rft.reporting import page, rollouts
from rft.reporting.rollouts import Kept, Packed, pack, read_rollouts
from rft.tracking.curves import draw
from rft.tracking.files import RunFiles, rollout_files
from rft.tracking.run import Run, read_run

WORDS = "the sum of both sides is then 12 x + 7 so we have = ) ( \\frac and"


def row(text: str = "ba", **more: Any) -> dict[str, Any]:
    found = {"task": "t", "index": 0, "prompt": "p", "text": text, "finish": "stop"}
    return {**found, "reward": 1.0, "reason": "correct", "detail": "", "version": 0, **more}


def written(rng: np.random.Generator, tokens: int, **more: Any) -> dict[str, Any]:
    """A rollout of that many tokens, with gaps as between two bfloat16 programs."""
    words = [f"{word} " for word in rng.choice(WORDS.split(), tokens)]
    gaps = np.round(rng.normal(0, 0.02, tokens), 5).tolist()
    pieces = [len(word) for word in words]
    return row("".join(words), tokens=tokens, pieces=pieces, gaps=gaps, **more)


def make_run(folder: Path, steps: int, rows: list[dict[str, Any]]) -> Run:
    files = RunFiles(folder)
    for step in range(1, steps + 1):
        files.metrics(step, {"rollout/count": len(rows)})
        files.rollouts(step, rows)
    files.close()
    return read_run(folder)


def unpacked(packed: Packed) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed.data)))
    return found


def columns(kept: Kept) -> dict[str, Any]:
    return unpacked(pack(kept, 10**9))


def test_all_rollouts_are_there_where_there_is_room(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3, [row("a"), row("b", task="u"), row("c", shaped=0.5)])
    found = columns(read_rollouts([run], ["mine"], 100))
    assert found["text"] == ["a", "b", "c"] * 3
    assert found["step"] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [found["tasks"][k] for k in found["task"]] == ["t", "u", "t"] * 3
    assert found["shaped"] == [None, None, 0.5] * 3
    assert found["gaps"] == [None] * 9  # a run from before there were gaps


def test_fewer_are_spread_evenly_over_runs_steps_and_a_step(tmp_path: Path) -> None:
    rows = [row(str(i)) for i in range(20)]
    runs = [make_run(tmp_path / name, 5, rows) for name in ("a", "b")]
    kept = read_rollouts(runs, ["a", "b"], 40)
    assert kept.total == 200
    found = columns(kept)
    assert found["run"] == [0] * 20 + [1] * 20
    assert found["step"] == [step for _ in "ab" for step in range(1, 6) for _ in range(4)]
    assert found["text"][:4] == ["0", "5", "10", "15"]


def test_where_room_is_short_rollouts_are_left_out_evenly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = make_run(tmp_path, 5, [row(rng.bytes(100).hex()) for _ in range(40)])
    kept = read_rollouts([run], ["a"], 1000)
    packed = pack(kept, len(pack(kept, 10**9).data) // 2)
    steps = unpacked(packed)["step"]
    assert 60 < packed.count == len(steps) < 120
    assert min(steps.count(step) for step in range(1, 6)) >= packed.count // 5 - 1


def test_more_steps_than_rollouts_that_fit(tmp_path: Path) -> None:
    found = columns(read_rollouts([make_run(tmp_path, 30, [row(), row()])], ["a"], 10))
    assert found["step"] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]


def test_of_large_files_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    run = make_run(tmp_path, 2, [row(rng.bytes(2000).hex()) for _ in range(400)])
    monkeypatch.setattr(rollouts, "READ", 300_000)
    kept = read_rollouts([run], ["a"], 10_000)
    assert kept.total == 800  # as the metrics say
    assert 100 < len(kept.rows) < 700


@pytest.mark.parametrize("cut", [4000, 1500])
def test_a_long_text_is_cut_between_tokens_and_keeps_its_end(cut: int) -> None:
    rng = np.random.default_rng(1)
    whole = written(rng, 3000, versions=list(range(3000)), logps=[0.0] * 3000)
    found = whole
    for most in (4000, 1500):
        if most >= cut:
            found = rollouts._cut(found, most)
    at, characters, first, tokens = found["cut"]
    assert cut - 20 <= len(found["text"]) <= cut
    assert (
        whole["text"]
        == found["text"][:at] + whole["text"][at : at + characters] + (found["text"][at:])
    )
    assert found["versions"] == [*range(first), *range(first + tokens, 3000)]
    assert sum(found["pieces"]) == len(found["text"])
    assert sum(found["pieces"][:first]) == at
    assert len(found["gaps"]) == 3000 - tokens == len(found["pieces"])


def test_a_long_text_without_pieces_is_cut_too() -> None:
    found = rollouts._cut(row("x" * 5000 + "y" * 5000, gaps=None), 1500)
    assert found["text"] == "x" * 1050 + "y" * 450
    assert found["cut"] == [1050, 8500, 0, 0]


def test_a_gap_has_two_digits_that_count() -> None:
    gaps = [None, 0.0, 0.00001, -0.00004, 0.01234, -0.98765, 12.3456]
    assert rollouts._coarse(gaps) == [None, 0, 1, -4, 1200, -99000, 1200000]
    assert rollouts._coarse(None) is None


@pytest.mark.parametrize(("count", "tokens"), [(10_000, 40), (80, 8000)])
def test_a_page_stays_under_five_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, tokens: int
) -> None:
    monkeypatch.setattr(page, "PANELS", ["Mean reward"])  # others take as long to draw
    rng = np.random.default_rng(2)
    steps = 4
    prompt = " ".join(rng.choice(WORDS.split(), 80))
    rows = [
        written(rng, tokens, prompt=f"{i} {prompt}", task=f"task {i}")
        for i in range(count // steps)
    ]
    html = page.run_page(make_run(tmp_path, steps, rows))
    assert len(html.encode()) < page.LIMIT < 5_000_000
    assert f"{count:,}" in html


@pytest.mark.parametrize("content", [b"{torn\n", b"3\n", b'{"task": "t"}\n', None])
def test_a_damaged_file_costs_its_own_rollouts_and_is_named(
    tmp_path: Path, content: bytes | None
) -> None:
    run = make_run(tmp_path, 3, [row()])
    path = rollout_files(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-9] if content is None else gzip.compress(content))
    kept = read_rollouts([run], ["a"], 10)
    assert [r["step"] for r in kept.rows] == [1, 3]
    assert kept.total == 2
    (problem,) = kept.problems
    assert str(path) in problem
    assert "not what a run wrote" in problem
    assert b"PNG" in draw(run, ["Response lengths"], "light")[:8]
    note = page._note(kept, pack(kept, 10**9))
    assert "All 2 rollouts are here." in note
    assert str(path) in note


def test_where_there_is_no_room_for_any_rollout_it_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, [row()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "LIMIT", 10)
        html = page.run_page(run)
    assert "0 of 1 rollouts are here" in html
    assert 'id="browser"' not in html
