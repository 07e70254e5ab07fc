"""The report: complete and escaped, and there for runs that have next to nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rft.errors import RftError
from rft.report import main, write_report
from rft.tracking.curves import smooth
from rft.tracking.files import RunFiles

ATTACK = "<script>alert('owned')</script><img src=http://x/y onerror=alert(1)>"


def make_run(folder: Path, steps: int, evaluations: tuple[int, ...] = (), text: str = "ba") -> Path:
    """A run's folder with that many steps, and evaluations at those."""
    files = RunFiles(folder)
    for step in range(1, steps + 1):
        files.metrics(
            step,
            {
                "reward/mean": 0.5,
                "selection/effective_task_ratio": 0.5,
                "policy/grad_norm": 1.0,
                "mismatch/max_abs": 0.0 if step == 1 else 1e-6,
                "tokens/generated": 100,
                "time/generate": 1.0,
                "time/learn": 3.0,
                "time/step": 4.0,
            },
        )
        row = {"prompt": "rab=", "text": text, "reward": 1.0, "reason": "correct", "version": 0}
        files.rollouts(step, [row] * 30)
    for step in evaluations:
        files.evaluation(
            {
                "step": step,
                "set": "test",
                "k": 4,
                "accuracy": 0.2 + 0.01 * step,
                "ci95": 0.03,
                "tokens_so_far": 100 * step,
                "seconds_so_far": 4.0 * step,
            }
        )
    files.close()
    return folder


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, the text, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:  # not inside <style>
            self.text += data

    @property
    def rollouts(self) -> dict[str, Any]:
        """The columns of the rollouts that are inside the page."""
        columns: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(self.scripts[0])))
        return columns

    @property
    def policy(self) -> str:
        """What may be loaded and run."""
        found = next(a["content"] for t, a in self.tags if t == "meta" and "http-equiv" in a)
        assert found is not None
        return found


def page_of(folder: Path) -> Page:
    curves, page = write_report(folder)
    assert curves.read_bytes().startswith(b"\x89PNG")
    return Page(page.read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", 20, (0, 10, 20))
    (folder / "config.yaml").write_text("seed: 7\nmodel:\n  path: /models/tiny\n")
    page = page_of(folder)
    text = " ".join(page.text.split())
    assert re.search(r"20\.0% ±3\.0 → 40\.0% ±3\.0 \+20\.0 points from step 0 to step 20", text)
    for part in ("2,000", "1m20s", "/models/tiny", "75.0%", "seed: 7", "All 600 rollouts are here"):
        assert part in text
    assert page.rollouts["step"] == [step for step in range(1, 21) for _ in range(30)]
    assert set(page.rollouts["text"]) == {"ba"}


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, 3, (0, 3)))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "base", "object", "embed")
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:image/png;base64,") or (
                name not in attributes
            )
    assert "default-src 'none'" in page.policy
    assert "connect-src" not in page.policy


def test_no_script_may_run_but_the_page_s_own(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, 3))
    kinds = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert kinds == ["application/octet-stream", None]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page.policy
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval", page.scripts[1])


def test_model_text_is_escaped_everywhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / ATTACK.replace("/", "_"), 0)
    files = RunFiles(folder)
    files.metrics(1, {"reward/mean": 1.0})
    chat = [{"role": "user", "content": ATTACK}]
    rows: list[dict[str, Any]] = [
        {"prompt": ATTACK, "text": ATTACK, "reward": 0.0, "reason": ATTACK, "version": 0},
        {"prompt": chat, "text": "\ud800", "reward": 0.0, "reason": '"><script>', "version": 0},
    ]
    files.rollouts(1, rows)
    files.evaluation({"step": 0, "set": ATTACK, "k": 1, "accuracy": 0.5, "ci95": None})
    (folder / "config.yaml").write_text(json.dumps({"model": {"path": ATTACK}}))
    page = page_of(folder)
    assert len(page.scripts) == 2
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert all("http" not in (a.get("src") or "") for _, a in page.tags)
    assert ATTACK in page.text
    assert page.rollouts["text"] == [ATTACK, "\ud800"]
    assert page.rollouts["prompts"] == [ATTACK, f"user: {ATTACK}"]


@pytest.mark.parametrize(("steps", "evaluations"), [(1, ()), (1, (0,)), (30, ()), (0, (0,))])
def test_a_run_with_little_in_it(steps: int, evaluations: tuple[int, ...], tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, steps, evaluations))
    assert ("Evaluations" in page.text) == bool(evaluations)
    assert ("Time by phase" in page.text) == bool(steps)


def test_a_step_with_no_known_metric(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.metrics(1, {"reward/mean": float("nan"), "mine": 1.0})
    files.rollouts(1, [])
    assert "Mean reward" in page_of(tmp_path).text


def test_a_folder_without_a_run_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RftError, match="holds no run"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    done = subprocess.run(
        [sys.executable, "-m", "rft.report", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "curves.png"), str(tmp_path / "report.html")]


@pytest.mark.parametrize("flag", [("--out", "x"), ("--set", "test"), ("--baseline", "uniform")])
def test_one_run_is_not_compared(
    flag: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, 2)
    assert main([str(tmp_path), *flag]) == 2
    assert f"{tmp_path} is one run" in capsys.readouterr().err


def test_smoothing_keeps_a_constant_at_both_ends_and_skips_nan() -> None:
    values = np.full(200, 3.0)
    values[50] = np.nan
    np.testing.assert_allclose(smooth(values), 3.0)
    assert np.isnan(smooth(np.array([np.nan]))).all()
