"""Runs compared: hand-made ones give hand-computed tables, and what is wrong with runs is said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from runs_for_tests import add_rollouts, make_run

from rft import report
from rft.errors import RftError
from rft.reporting.arms import Arm, find_runs
from rft.reporting.comparison import Comparison, compare, write
from rft.reporting.figures import _curves, _legend
from rft.reporting.milestones import CLOCKS, Curve
from rft.reporting.settings import labels
from rft.reporting.tables import Cell, Table, as_csv, latex, markdown, summary_rows

UNIFORM = ([0.2, 0.3, 0.4, 0.35, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5])
BOTS = ([0.2, 0.4, 0.6, 0.5, 0.7], [0.1, 0.3, 0.4, 0.6, 0.6])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms, two seeds each; a step of bots has twice the tokens and takes half the time."""
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"uniform-{seed}", UNIFORM[seed], "uniform", seed)
        make_run(
            tmp_path / "runs" / f"bots-{seed}", BOTS[seed], "bots", seed, tokens=200, seconds=1.0
        )
    return tmp_path / "runs"


def table_of(comparison: Comparison, *words: str) -> Table:
    """The one table whose title has all these words."""
    (found,) = [t for t in comparison.tables if all(word in t.title for word in words)]
    return found


def row(table: Table, arm: str) -> dict[str, Cell]:
    return dict(zip(table.columns, dict(table.rows)[arm], strict=True))


def shown(table: Table, arm: str) -> list[str]:
    return [str(cell) for cell in dict(table.rows)[arm]]


def said(comparison: Comparison, *words: str) -> bool:
    """Whether one note, of the whole or of a table, has all these words."""
    notes = [*comparison.notes, *(note for table in comparison.tables for note in table.notes)]
    return any(all(word in note for word in words) for note in notes)


# ---- by hand


def test_at_equal_steps_by_hand(runs: Path) -> None:
    table = table_of(compare([runs]), "at equal steps")
    # Seed 0, targets 0.3 0.4 0.5 0.6: bots at 5 10 15 20, uniform at 10 20 35 40.
    # Seed 1, targets 0.2 0.3 0.4 0.5: bots at 5 10 20 25, uniform at 10 20 30 40.
    # With two runs the interval goes from one to the other.
    assert shown(table, "bots") == [
        "0.50 [0.50, 0.50] (2)",
        "0.50 [0.50, 0.50] (2)",
        "0.55 [0.43, 0.67] (2)",  # 15/35 and 20/30
        "0.56 [0.50, 0.62] (2)",  # 20/40 and 25/40
        # Best so far at steps 10, 20 and 40.
        "1.42 [1.33, 1.50] (2)",  # 0.4/0.3 and 0.3/0.2
        "1.42 [1.33, 1.50] (2)",  # 0.6/0.4 and 0.4/0.3
        "1.18 [1.17, 1.20] (2)",  # 0.7/0.6 and 0.6/0.5
    ]
    cell = row(table, "bots")["TTB 75%"]
    assert (cell.mean, cell.low, cell.high) == pytest.approx((23 / 42, 3 / 7, 2 / 3))
    assert set(shown(table, "uniform")) == {"1.00 [1.00, 1.00] (2)"}
    assert table.notes == ()


def test_at_equal_tokens_and_seconds_by_hand(runs: Path) -> None:
    comparison = compare([runs])
    # Twice the tokens a step: times double. The budget of 4000 tokens takes bots to step 20, and a
    # quarter of it to step 5, half way between two evaluations.
    tokens = row(table_of(comparison, "at equal tokens"), "bots")
    assert tokens["TTB 100%"].mean == pytest.approx(2 * (20 / 40 + 25 / 40) / 2)
    assert tokens["BSF 25%"].mean == pytest.approx((0.3 / 0.3 + 0.2 / 0.2) / 2)
    assert tokens["BSF 50%"].mean == pytest.approx((0.4 / 0.4 + 0.3 / 0.3) / 2)
    assert tokens["BSF 100%"].mean == pytest.approx((0.6 / 0.6 + 0.4 / 0.5) / 2)
    # Half the seconds a step: times halve. Evaluations and checkpoints are not in them.
    seconds = row(table_of(comparison, "at equal seconds"), "bots")
    assert seconds["TTB 100%"].mean == pytest.approx((20 / 40 + 25 / 40) / 2 / 2)
    assert seconds["BSF 25%"].mean == pytest.approx((0.6 / 0.3 + 0.4 / 0.2) / 2)
    assert seconds["BSF 100%"].mean == pytest.approx((0.7 / 0.6 + 0.6 / 0.5) / 2)
    assert table_of(comparison, "at equal seconds").notes == (
        "Ends before the baseline's budget is spent, and its best at its end counts – "
        "bots: BSF 100% (every run).",
    )


def test_shares_of_the_best_score_by_hand(runs: Path) -> None:
    table = table_of(compare([runs]), "best score", "in steps")
    # Seed 0, targets 0.15 0.3 0.45 0.6: uniform starts above the first; 5/10, 12.5/32.5, 20/40.
    # Seed 1, targets 0.125 0.25 0.375 0.5: 1.25/2.5, 7.5/15, 17.5/27.5, 25/40.
    cells = row(table, "bots")
    assert str(cells["TTB 25% of score"]) == "0.50 (1/2)"
    assert cells["TTB 50% of score"].mean == pytest.approx(0.5)
    assert cells["TTB 75% of score"].mean == pytest.approx((5 / 13 + 7 / 11) / 2)
    assert cells["TTB 100% of score"].mean == pytest.approx((0.5 + 0.625) / 2)
    assert table.notes == (
        "The baseline is there at its first evaluation – every arm: TTB 25% of score (seed 0).",
    )


def test_what_was_spent_and_accuracies_by_hand(runs: Path) -> None:
    comparison = compare([runs])
    spent = table_of(comparison, "spent")
    assert spent.columns == ("ETR", "rollouts", "tokens, k", "seconds")
    assert shown(spent, "bots") == [
        "0.50 [0.50, 0.50] (2)",  # 0.25 and 0.75 in turn
        "320 [320, 320] (2)",
        "8.0 [8.0, 8.0] (2)",
        "40.0 [40.0, 40.0] (2)",
    ]
    assert shown(spent, "uniform")[3] == "80.0 [80.0, 80.0] (2)"
    assert shown(table_of(comparison, "accuracy"), "bots") == [
        "15.0 [10.0, 20.0] (2)",
        "65.0 [60.0, 70.0] (2)",
        "65.0 [60.0, 70.0] (2)",
        "10.0 [10.0, 10.0] (2)",  # 70 - 60 and 60 - 50
    ]


def test_a_run_is_compared_with_the_baseline_of_its_own_seed_and_model(tmp_path: Path) -> None:
    for model in ("small", "large"):
        for seed in (0, 1):
            for arm in ("uniform", "same"):
                accuracy = [0.1, 0.1 + 0.1 * (seed + 1) + (0.3 if model == "large" else 0.0)]
                make_run(
                    tmp_path / f"{arm}-{model}-{seed}",
                    accuracy,
                    arm,
                    seed,
                    model={"path": f"/models/{model}/base"},
                )
    comparison = compare([tmp_path])
    assert shown(table_of(comparison, "at equal steps"), "same")[-1] == "1.00 [1.00, 1.00] (4)"
    assert said(comparison, "seed 0 large, seed 1 large, seed 0 small, seed 1 small")


def test_the_same_runs_give_the_same_files_in_whatever_order(runs: Path, tmp_path: Path) -> None:
    folders = sorted(runs.iterdir())
    one = write(compare(folders), tmp_path / "one")
    write(compare(folders[::-1] + folders), tmp_path / "other")
    for path in one:
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name
    assert [path.name for path in one][:7] == [
        "table.md",
        "table.csv",
        "runs.csv",
        "curves.csv",
        "settings.csv",
        "table.tex",
        "curves.png",
    ]


# ---- arms


def test_runs_without_a_label_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for seed in (0, 1):
        for rho in (0.0, 0.1):
            make_run(
                tmp_path / f"bots-{rho}-{seed}",
                [0.2, 0.4],
                seed=seed,
                scheduler={"selector": {"_target_": "rft.Target"}, "estimator": {"rho": rho}},
                prepare={"folder": f"/cache/{seed}"},
                rollout={"file": f"/cache/{seed}/x"},
                tracking={"console": str(seed)},
            )
        make_run(
            tmp_path / f"uniform-{seed}",
            [0.2, 0.3],
            seed=seed,
            scheduler={"selector": {"_target_": "rft.Uniform"}},
            rollout={"file": f"/cache/{seed}/x"},
            prepare={"folder": f"/cache/{seed}"},
        )
    comparison = compare([tmp_path])
    assert [(arm.label, len(arm.members)) for arm in comparison.arms] == [
        ("Uniform", 2),
        ("Target rho=0.0", 2),
        ("Target rho=0.1", 2),
    ]
    assert comparison.baseline == "Uniform"


def test_labels_are_as_few_keys_as_tell_arms_apart() -> None:
    settings = [
        {"a.x": "1", "a.y": "1", "b.z": "1"},
        {"a.x": "1", "a.y": "2", "b.z": "1"},
        {"a.x": "2", "a.y": "3", "b.z": "1"},
    ]
    assert labels(settings) == ["y=1", "y=2", "y=3"]
    assert labels([{}, {"transforms.thin._target_": "rft.Balance"}])[1] == "Balance"
    both = [{"a.x": str(i), "b.x": str(j)} for i in range(2) for j in range(2)]
    assert labels(both)[1] == "a.x=0 b.x=1" or labels(both)[1] == "b.x=1 a.x=0"
    assert len(set(labels(both))) == 4
    of_one_name = [{"a._target_": "rft.Uniform"}, {"a._target_": "mine.Uniform"}]
    assert labels(of_one_name) == ["a._target_=rft.Uniform", "a._target_=mine.Uniform"]


def test_without_a_baseline_there_are_no_ratios_and_a_note(runs: Path) -> None:
    for folder in runs.glob("uniform-*"):
        (folder / "config.yaml").write_text(
            (folder / "config.yaml").read_text().replace("arm: uniform", "arm: easy")
        )
    comparison = compare([runs])
    assert comparison.baseline is None
    assert [table.title for table in comparison.tables] == [
        "What was spent, and the effective task ratio (ETR)",
        "test: accuracy, %",
    ]
    assert said(comparison, "no ratios", "--baseline")
    named = compare([runs], baseline="easy")
    assert row(table_of(named, "at equal steps"), "bots")["TTB 100%"].found == 2


# ---- bad input


def test_a_target_never_reached_is_not_averaged_away(runs: Path) -> None:
    make_run(runs / "bots-2", [0.2, 0.2, 0.2, 0.3, 0.3], "bots", 2)
    make_run(runs / "uniform-2", UNIFORM[0], "uniform", 2)
    table = table_of(compare([runs]), "at equal steps")
    assert str(row(table, "bots")["TTB 100%"]) == "0.56 [0.50, 0.62] (2/3)"
    assert table.notes == (
        "Never reached – bots: TTB 50%, TTB 75%, TTB 100% (seed 2). Means are over the other runs, "
        "and so too favourable.",
    )


def test_a_run_without_its_baseline_has_no_ratios(runs: Path) -> None:
    make_run(runs / "bots-7", BOTS[0], "bots", 7)
    comparison = compare([runs])
    assert str(row(table_of(comparison, "at equal steps"), "bots")["BSF 25%"]).endswith("(2/3)")
    assert str(row(table_of(comparison, "accuracy"), "bots")["last"]).endswith("(3)")
    assert said(comparison, "no run of the same seed, model and pool", "(seed 7)")


def test_evaluation_sets_are_measured_apart_and_those_missing_are_missing(runs: Path) -> None:
    make_run(runs / "bots-2", BOTS[0], "bots", 2, sets=("other",))
    make_run(runs / "uniform-2", UNIFORM[0], "uniform", 2, sets=("test", "other"))
    comparison = compare([runs])
    cells = {t.set: row(t, "bots")["last"] for t in comparison.tables if "accuracy" in t.title}
    assert (cells["test"].found, cells["other"].found) == (2, 1)
    assert said(comparison, "Not evaluated on it", "bots", "(seed 2)")
    assert {t.set for t in compare([runs], only="other").tables} == {"", "other"}
    with pytest.raises(RftError, match=r"evaluated on --set othr; did you mean 'other'"):
        compare([runs], only="othr")


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": {"train": {"source": "/pools/train.jsonl"},
                   "evaluation": {"test": {"source": "/pools/easier.jsonl"}}}},
        {"evaluation": {"every": 10, "samples": 1, "temperature": 0.0, "max_tasks": 0}},
    ],
)  # fmt: skip
def test_another_set_of_the_same_name_is_not_compared(
    runs: Path, change: dict[str, object]
) -> None:
    make_run(runs / "greedy", [0.5, 0.6, 0.7, 0.8, 0.9], "greedy", 0, **change)
    comparison = compare([runs])
    assert set(shown(table_of(comparison, "accuracy"), "greedy")) == {"–"}
    assert said(comparison, "greedy", "another source or is evaluated in another way")


def test_crashed_runs_are_named_and_in_no_mean(runs: Path) -> None:
    lines = (runs / "bots-1" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "bots-1" / "metrics.jsonl").write_text("".join(lines[:17]))
    at_once = runs / "bots-2"
    at_once.mkdir()
    (at_once / "config.yaml").write_text((runs / "bots-1" / "config.yaml").read_text())
    (at_once / ".lock").touch()
    comparison = compare([runs])
    assert str(row(table_of(comparison, "accuracy"), "bots")["last"]) == "70.0 (1)"
    assert said(comparison, "bots-1 is left out", "17 of 40 steps")
    assert said(comparison, "bots-2 is left out", "holds no run")
    assert said(comparison, "One run only", "bots")


def test_runs_of_unequal_length(runs: Path) -> None:
    make_run(runs / "short-0", [0.2, 0.4, 0.6], "short", 0)
    make_run(runs / "bots-2", BOTS[0][:3], "bots", 2)
    comparison = compare([runs])
    assert said(comparison, "unequal length", "short 20", "uniform 40")
    cells = row(table_of(comparison, "at equal steps"), "short")
    assert cells["BSF 50%"].mean == pytest.approx(0.6 / 0.4)
    assert cells["BSF 100%"].mean == pytest.approx(0.6 / 0.6)
    assert said(comparison, "Ends before", "short: BSF 100%")
    assert said(comparison, "bots-2 is left out", "20 steps", "bots have 40")


def test_the_same_run_twice_counts_once(runs: Path) -> None:
    make_run(runs / "bots-1-again", BOTS[1], "bots", 1)
    make_run(runs / "bots-1-other", BOTS[0], "bots", 1)
    comparison = compare([runs])
    assert str(row(table_of(comparison, "accuracy"), "bots")["last"]).endswith("(2)")
    assert said(comparison, "bots-1-again is left out", "bots-1 is", "agrees exactly")
    assert said(comparison, "bots-1-other is left out", "differs")


def test_one_label_for_different_configs_is_said(runs: Path) -> None:
    make_run(runs / "bots-2", BOTS[0], "bots", 2, learner={"lr": 0.1})
    comparison = compare([runs])
    assert said(comparison, "bots has runs of different configs", "learner.lr is", "0.1 (bots-2)")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evals.jsonl", "scheduler/journal.jsonl"])
def test_a_corrupt_line_is_named_and_its_run_left_out(runs: Path, name: str) -> None:
    add_rollouts(runs / "bots-0", 1, {"a": [0.0, 1.0]})
    path = runs / "bots-0" / name
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, "{not json\n", *others[1:]]))
    comparison = compare([runs])
    assert said(comparison, "bots-0 is left out", str(path), "line 2")
    assert str(row(table_of(comparison, "accuracy"), "bots")["last"]).endswith("(1)")


def test_damaged_rollouts_are_named(runs: Path) -> None:
    add_rollouts(runs / "bots-0", 1, {"a": [0.0, 1.0]})
    path = runs / "bots-0" / "rollouts" / "step_000001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert said(compare([runs]), "bots-0 is left out", str(path), "not what a run wrote")


def test_arms_that_are_evaluated_unequally_often_are_said(runs: Path) -> None:
    assert not said(compare([runs]), "unequally often")
    lines = (runs / "bots-0" / "evals.jsonl").read_text().splitlines(keepends=True)
    (runs / "bots-0" / "evals.jsonl").write_text("".join([*lines[:2], *lines[3:]]))
    assert said(compare([runs]), "On test", "unequally often", "uniform 5, bots 4 or 5 times")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evals.jsonl", "3\n4\n"),
        ("evals.jsonl", '{"step": 0}\n{"step": 10}\n'),
        ("evals.jsonl", '{"step": 10, "set": "test", "accuracy": null}\n'),
        ("evals.jsonl", 2 * '{"step": 10, "set": "test", "accuracy": 0.5}\n'),
        ("metrics.jsonl", '{"step": 40}\n{"step": 40}\n'),
        ("metrics.jsonl", '{"steps": 40}\n{"steps": 41}\n'),
        ("metrics.jsonl", '{"step": 40, "time/step": "soon"}\n'),
        ("config.yaml", "a: [\n"),
        ("config.yaml", "seed: 0\nsteps: 40\nmodel:\ntasks:\n"),
        ("config.yaml", "- 1\n"),
        ("config.yaml", ""),
    ],
)
def test_files_that_no_run_writes_are_no_crash(runs: Path, name: str, text: str) -> None:
    (runs / "bots-0" / name).write_text(text)
    comparison = compare([runs])
    assert said(comparison, "bots-0 is left out")
    assert str(row(table_of(comparison, "accuracy"), "bots")["last"]).endswith("(1)")


def test_what_cannot_be_compared_at_all_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RftError, match="holds no run"):
        compare([tmp_path / "empty"])
    with pytest.raises(RftError, match="nowhere is not a folder"):
        compare([tmp_path / "nowhere"])
    with pytest.raises(RftError, match=r"no arm --baseline 'unifrom'; did you mean 'uniform'"):
        compare([runs], baseline="unifrom")
    for folder in runs.iterdir():
        (folder / "config.yaml").unlink()
    assert report.main([str(runs), "--out", str(tmp_path / "out")]) == 2
    assert "none of 4 runs can be compared; bots-0 is left out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_time_and_tokens_that_were_not_recorded_are_missing(runs: Path) -> None:
    for folder in runs.glob("bots-*"):
        for name, key in (("metrics.jsonl", "time/step"), ("evals.jsonl", "tokens_so_far")):
            path = folder / name
            path.write_text(path.read_text().replace(key, "mine"))
    comparison = compare([runs])
    for clock in ("tokens", "seconds"):
        assert set(shown(table_of(comparison, f"at equal {clock}"), "bots")) == {"–"}
    assert said(comparison, "Not recorded by the run or its baseline", "bots")
    assert str(row(table_of(comparison, "spent"), "bots")["seconds"]) == "–"
    comparison.figures["Learning curves"]("light")


# ---- files


def test_csv_has_every_number_in_full(runs: Path, tmp_path: Path) -> None:
    make_run(runs / "a, b|c-7", BOTS[0], 'a, "b" | c', 7)
    comparison = compare([runs])
    write(comparison, tmp_path)
    read = rows_of(tmp_path / "table.csv")
    cells = [(label, cell) for t in comparison.tables for label, of in t.rows for cell in of]
    assert len(read) == len(cells)
    for line, (label, cell) in zip(read, cells, strict=True):
        assert line["arm"] == label
        assert float(line["mean"] or "nan") == pytest.approx(cell.mean, rel=0, nan_ok=True)
        assert (int(line["found"]), int(line["pairs"])) == (cell.found, cell.pairs)
    values = rows_of(tmp_path / "runs.csv")
    (one,) = [
        line
        for line in values
        if (line["run"], line["measure"], line["clock"]) == ("bots-1", "TTB 75%", "steps")
    ]
    assert (float(one["value"]), one["seed"], one["remark"]) == (pytest.approx(2 / 3), "1", "")
    means: dict[tuple[str, ...], list[float]] = {}
    for line in values:
        if line["value"]:
            key = tuple(line[k] for k in ("arm", "set", "clock", "measure"))
            means.setdefault(key, []).append(float(line["value"]))
    for line in read:
        of = means.get(tuple(line[k] for k in ("arm", "set", "clock", "measure")), [])
        assert len(of) == int(line["found"])
        if of:
            assert sum(of) / len(of) == pytest.approx(float(line["mean"]))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_curves_are_there_to_compute_every_cell_again(runs: Path, tmp_path: Path) -> None:
    write(compare([runs]), tmp_path)
    found = [row for row in rows_of(tmp_path / "curves.csv") if row["run"] == "bots-1"]
    assert [float(row["accuracy"]) for row in found] == BOTS[1]
    assert [float(row["steps"]) for row in found] == [0, 10, 20, 30, 40]
    assert [float(row["tokens"]) for row in found] == [0, 2000, 4000, 6000, 8000]
    assert [float(row["seconds"]) for row in found] == [0, 10, 20, 30, 40]
    assert {(row["arm"], row["pair"], row["set"]) for row in found} == {("bots", "seed 1", "test")}


def test_settings_have_every_key_and_no_path_of_this_machine(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = f"/home/me/letters-{seed}"
        made = {"folder": folder, "seed": seed}
        model = {"path": f"{folder}/base"}
        for arm, rate in (("uniform", 1e-4), ("bots", 2e-4)):
            make_run(
                tmp_path / f"{arm}-{seed}",
                BOTS[0],
                arm,
                seed,
                prepare=made,
                model=model,
                learner={"lr": rate},
                runs_dir="/home/me/runs",
            )
    write(compare([tmp_path]), tmp_path / "out")
    rows = {row["key"]: row for row in rows_of(tmp_path / "out" / "settings.csv")}
    assert rows["model.path"] == {
        "key": "model.path",
        "uniform": "${prepare.folder}/base",
        "bots": "${prepare.folder}/base",
    }
    assert (rows["learner.lr"]["uniform"], rows["learner.lr"]["bots"]) == ("0.0001", "0.0002")
    assert rows["seed"]["bots"] == rows["prepare.seed"]["bots"] == "0 | 1"
    assert "/home/me" not in (tmp_path / "out" / "settings.csv").read_text()


def test_what_runs_ran_on_is_said(runs: Path) -> None:
    about = {
        "date": "2026-11-30T09:14:25+0000",
        "rft": "0.1.0",
        "python": "3.11.7",
        "platform": "Linux",
        "processor": "Old",
        "cores": 2,
        "packages": {"torch": "2.13.0"},
    }
    for name in ("uniform-0", "bots-0"):
        (runs / name / "environment.json").write_text(json.dumps(about))
    later = about | {"date": "2026-12-01T00:14:25+0000"}
    (runs / "uniform-1" / "environment.json").write_text(json.dumps(later))
    notes = compare([runs]).notes
    machine = "2 x Old, Linux, Python 3.11.7, rft 0.1.0, torch 2.13.0."
    assert f"3 runs, made 2026-11-30 to 2026-12-01: {machine}" in notes
    assert any("1 run, made some day: on what is not known" in note for note in notes)
    assert any("should not be compared" in note for note in notes)
    moved = about | {"processor": "New", "device": "H100", "earlier": [about]}
    (runs / "bots-1" / "environment.json").write_text(json.dumps(moved))
    notes = compare([runs]).notes
    assert any("2 x Old, Linux" in note and "resumed on H100, 2 x New" in note for note in notes)
    (runs / "bots-1" / "environment.json").write_text(json.dumps(about))
    notes = compare([runs]).notes
    assert f"4 runs, made 2026-11-30 to 2026-12-01: {machine}" in notes
    assert not any("should not be compared" in note for note in notes)


def test_text_means_nothing_to_latex_or_markdown() -> None:
    cell = Cell(1.5, 1.0, 2.0, 4, 5)
    label = r"50% of_a & b $x$ #1 {~^\} <i> | `c`"
    table = Table(label, ("TTB 50%",), ((label, (cell,)), ("b", (Cell(0, 0, 0, 0, 5),))), (label,))
    text = latex(table)
    escaped = (
        r"50\% of\_a \& b \$x\$ \#1 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\} "
        r"\textless{}i\textgreater{} \textbar{} `c`"
    )
    assert text.count(escaped) == 3
    assert escaped + r" & 1.50 {\scriptsize [1.00, 2.00]} (4/5) \\" in text
    assert r"b & -- \\" in text
    assert r"arm & TTB 50\% \\" in text
    lines = markdown(table).splitlines()
    assert lines[2] == "| arm | TTB 50% |"
    assert lines[4] == r"| 50% of\_a & b $x$ #1 {~^\\} \<i\> \| \`c\` | 1.50 [1.00, 2.00] (4/5) |"
    assert lines[5] == "| b | – |"


def test_a_missing_number_is_an_empty_field_of_csv() -> None:
    table = Table("t", ("x",), (("a", (Cell(math.nan, math.nan, math.nan, 0, 2),)),))
    assert as_csv(summary_rows([table])).splitlines()[1] == "a,,,x,,,,0,2"


@pytest.mark.parametrize("with_rollouts", [False, True])
def test_figures_are_drawn_of_much_and_of_little(runs: Path, with_rollouts: bool) -> None:
    if with_rollouts:
        for folder in runs.iterdir():
            for step in (1, 20, 40):
                add_rollouts(folder, step, {"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [-1.0, 0.0]})
    comparison = compare([runs])
    assert len(comparison.figures) == (6 if with_rollouts else 3)
    for title, draw in comparison.figures.items():
        assert draw("dark").startswith(b"\x89PNG"), title


def test_rollouts_are_counted_by_difficulty(runs: Path) -> None:
    from rft.tracking.curves import by_difficulty
    from rft.tracking.run import read_run

    rates = {"never": [0.0] * 8, "quarter": [1.0, 1.0, *[0.0] * 6], "more": [1.0] * 3 + [0.0] * 5,
             "most": [1.0] * 7 + [0.0], "always": [1.0] * 8}  # fmt: skip
    add_rollouts(runs / "bots-0", 3, rates)
    run = read_run(runs / "bots-0")
    assert run.groups.tolist() == [[3, 8, rate] for rate in (0, 0.25, 0.375, 0.875, 1)]
    assert by_difficulty(run.groups) == pytest.approx([0.2, 0.2, 0.2, 0.0, 0.2, 0.2])
    assert len(run.lengths) == 40


def test_a_run_without_a_journal_does_not_thin_the_others_of_its_arm(runs: Path) -> None:
    add_rollouts(runs / "bots-0", 3, {"a": [0.0, 1.0], "b": [1.0, 1.0]})
    drawn = []

    def stacked(axes: object, arms: object, values: object, *_: object) -> None:
        drawn.append(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rft.reporting.figures._stacked", stacked)
        compare([runs]).figures["Rollouts by difficulty"]("light")
    assert drawn[0].sum() == pytest.approx(100)


def test_of_large_files_the_first_rollouts_are_measured(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rft.tracking import run

    for step in range(1, 31):
        add_rollouts(runs / "bots-0", step, {str(i): [0.0, 1.0] for i in range(500)})
    assert len(run.read_run(runs / "bots-0").lengths) == 24 * 1000
    monkeypatch.setattr(run, "READ", 24 * 100)
    assert len(run.read_run(runs / "bots-0").lengths) == 24


def test_an_arm_that_is_told_pass_rates_is_said(runs: Path) -> None:
    make_run(runs / "oracle", BOTS[0], "oracle", 0, scheduler={"survey_every": 5})
    assert said(compare([runs]), "oracle: told the pass rates")


def test_runs_of_several_pools_are_said(runs: Path) -> None:
    tasks = {"train": {"source": "/pools/half.jsonl"},
             "evaluation": {"test": {"source": "/pools/test.jsonl"}}}  # fmt: skip
    make_run(runs / "uniform-half", UNIFORM[0], "uniform", 0, tasks=tasks)
    assert said(compare([runs]), "seed 0 half.jsonl, seed 0 train.jsonl", "different pools")


def test_runs_without_evaluations_have_no_curves(tmp_path: Path) -> None:
    for arm in ("uniform", "bots"):
        make_run(tmp_path / arm, BOTS[0], arm, sets=())
    written = write(compare([tmp_path]), tmp_path / "out")
    assert "curves.csv" not in {path.name for path in written}
    assert (tmp_path / "out" / "table.md").exists()


def test_a_sweep_beside_a_run_of_its_name_is_found(tmp_path: Path) -> None:
    make_run(tmp_path / "mine", BOTS[0])
    make_run(tmp_path / "mine" / "seed=1", BOTS[0])
    make_run(tmp_path / "mine" / "evaluations" / "x", BOTS[0])
    found = find_runs([tmp_path / "mine"])
    assert [path.name for path in found] == ["mine", "seed=1"]


def test_what_evaluations_depend_on_besides_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "u", BOTS[0], "uniform", rollout={"max_tokens": 20})
    make_run(tmp_path / "b", BOTS[0], "bots", rollout={"max_tokens": 40, "staleness": 2})
    comparison = compare([tmp_path])
    assert said(comparison, "runs differ in rollout.max_tokens (uniform: 20, bots: 40)")
    assert said(comparison, "bots: rollouts are made ahead, also during evaluations")
    assert not said(comparison, "uniform: rollouts are made ahead")


def test_a_config_of_an_older_version_had_what_it_lacks_at_its_default(tmp_path: Path) -> None:
    from rft.config.schema import SchedulerConfig

    make_run(tmp_path / "old", BOTS[0], seed=0)
    known = {"survey_every": SchedulerConfig().survey_every}
    make_run(tmp_path / "new", BOTS[0], seed=1, scheduler=known)
    make_run(tmp_path / "other", BOTS[0], seed=1, learner={"lr": 1.0})
    pools = {"test": {"source": "/pools/test.jsonl", "split": "train"}}
    tasks = {"train": {"source": "/pools/train.jsonl"}, "evaluation": pools}
    make_run(tmp_path / "newer", BOTS[0], seed=2, tasks=tasks)
    comparison = compare([tmp_path])
    assert sorted(len(arm.members) for arm in comparison.arms) == [1, 3]
    assert not said(comparison, "another source")


def test_pools_of_one_source_are_told_apart(tmp_path: Path) -> None:
    for files in ("math*", "code*"):
        for arm in ("uniform", "bots"):
            train = {"source": "/guru", "files": files}
            tasks = {"train": train, "evaluation": {"test": {"source": "/pools/test.jsonl"}}}
            make_run(tmp_path / f"{arm}-{files[:4]}", BOTS[0], arm, tasks=tasks)
    comparison = compare([tmp_path])
    assert [len(arm.members) for arm in comparison.arms] == [2, 2]
    assert not said(comparison, "left out")


def test_a_baseline_is_found_whatever_its_case(runs: Path) -> None:
    assert compare([runs], "Uniform").baseline == "uniform"
    make_run(runs / "x", BOTS[0], "Uniform")
    assert compare([runs], "Uniform").baseline == "Uniform"
    assert compare([runs], "uniform").baseline == "uniform"


def test_a_label_may_look_like_a_formula(runs: Path, tmp_path: Path) -> None:
    make_run(runs / "x", BOTS[0], r"put it in $\boxed{}$", sets=("test",))
    add_rollouts(runs / "x", 3, {"a": [0.0, 1.0]})
    write(compare([runs]), tmp_path / "out")


@pytest.mark.parametrize("label", ["a", "uniform lr=0.0001", "BOTS with a name that says it all"])
def test_a_legend_stays_in_its_figure(label: str) -> None:
    figure = Figure((6.4, 3.6), layout="constrained")
    figure.subplots()
    _legend(figure, [Arm(f"{label} {i}", ()) for i in range(9)])
    figure.draw_without_rendering()
    around = figure.legends[0].get_window_extent()
    assert 0 <= around.x0 < around.x1 <= figure.bbox.width


def test_rollouts_without_tokens_have_no_length(runs: Path) -> None:
    from rft.tracking.run import read_run

    folder = runs / "bots-0" / "rollouts"
    folder.mkdir()
    (folder / "step_000001.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert len(read_run(runs / "bots-0").lengths) == 0


def test_the_command(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rft.report", str(runs), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    names = [Path(line).name for line in done.stdout.split()]
    assert {"table.md", "table.csv", "runs.csv", "table.tex", "curves.png"} < {*names}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| bots | 0.50 [0.50, 0.50] (2) |" in text
    assert "- TTB q: when a run gets q of the way" in text


def test_comparing_needs_neither_torch_nor_vllm() -> None:
    code = "import rft.report, sys; assert not {'torch', 'vllm', 'ray'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_one_arm_that_spends_much_more_does_not_squeeze_the_others() -> None:
    def arm(label: str, tokens: float) -> Any:
        curve = Curve(np.array([0.2, 0.5]), {clock: np.array([0.0, tokens]) for clock in CLOCKS})
        return SimpleNamespace(label=label, members=[SimpleNamespace(curves={"test": curve})])

    figure = Figure()
    _curves(figure, [arm("a", 1000.0), arm("b", 1100.0), arm("c", 50_000.0)], ["test"])
    assert figure.axes[1].get_xlim()[1] == pytest.approx(1650.0)
    assert figure.axes[1].get_xlabel() == "tokens (the longest arm: 50,000)"
    figure = Figure()
    _curves(figure, [arm("a", 1000.0), arm("b", 1100.0)], ["test"])
    assert figure.axes[1].get_xlabel() == "tokens"
