"""The benchmarks in scripts/ at a size that only shows that they run."""

import json
import re
import subprocess
import sys
from pathlib import Path

from running import ENV, HERE, check

SIZES = {"prompts": 4, "group": 4, "max-tokens": 6, "rows": 8, "warmup": 1, "repeats": 2}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


def test_it_times_ours_trl_and_the_limit_and_prints_both_ratios(tmp_path: Path) -> None:
    script, file = HERE.parent / "scripts/bench_step.py", tmp_path / "bench.json"
    what = ["--engine", "transformers", "--settings", "skip", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(script), *what, *TINY],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=900,
    )
    check(done)
    ratios = re.findall(
        r"(TRL / ours|ours, transformers / limit).*? (\d+\.\d+)$", done.stdout, re.M
    )
    assert [name for name, _ in ratios] == ["TRL / ours", *["ours, transformers / limit"] * 2]
    assert all(float(ratio) > 0 for _, ratio in ratios)

    steps = json.loads(file.read_text())["settings"]["skip"]
    assert all(len(measured) == 2 for measured in steps.values()), "each as often as the others"
    assert {m["tokens"] for measured in steps.values() for m in measured} == {4 * 4 * 6}
    ours = steps["ours, transformers"]
    trained = sum(m["trained"] for m in ours)
    assert 0 < trained < sum(m["tokens"] for m in ours), "no variance, no work"
    for measured in ours:
        phases = sum(v for k, v in measured.items() if k not in ("step", "tokens", "trained"))
        assert abs(phases - measured["step"]) < 0.02 * measured["step"] + 0.01


def test_it_times_selection_by_ours_and_by_others_and_prints_a_table(tmp_path: Path) -> None:
    script, figure = HERE.parent / "scripts/bench_scheduler.py", tmp_path / "scaling.png"
    sizes = ["--tasks", "2e4", "6e3", "--warmup", "2", "--rounds", "3", "--figure", str(figure)]
    done = subprocess.run(
        [sys.executable, str(script), *sizes], env=ENV, capture_output=True, text=True, timeout=120
    )
    check(done)
    pools = re.findall(r"^== ([\d,]+) tasks, (\w+) references, 3 rounds$", done.stdout, re.M)
    kinds = ["grid", "continuous"]
    assert pools == [(size, kind) for size in ("20,000", "6,000") for kind in kinds]

    theirs = ["numpy"] + ["trinity-rft"] * ("trinity-rft not installed" not in done.stdout)
    names = [*theirs, "ours", "scheduler"]
    rows = re.findall(r"^(\S+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+ +([\d.]+)$", done.stdout, re.M)
    assert [name for name, *_ in rows] == names * 4
    for name, select, update, both, size in rows:
        assert float(select) > 0
        assert float(update) > 0
        assert max(float(select), float(update)) <= float(both) + 0.002
        assert name not in ("ours", "scheduler") or float(size) <= 64, "bytes a task"
    ratios = re.findall(r"^(\S+ / \S+) +(\d+\.\d+)$", done.stdout, re.M)
    pairs = [f"{above} / {below}" for below in ("ours", "scheduler") for above in theirs]
    assert [pair for pair, _ in ratios] == pairs * 4
    assert all(float(ratio) > 0 for _, ratio in ratios)
    assert figure.read_bytes().startswith(b"\x89PNG")
