"""scripts/bench_step.py at a size that only shows that it runs."""

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
        timeout=280,
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
    assert sum(m["trained"] for m in ours) < sum(m["tokens"] for m in ours), "no variance, no work"
    for measured in ours:
        phases = sum(v for k, v in measured.items() if k not in ("step", "tokens", "trained"))
        assert abs(phases - measured["step"]) < 0.02 * measured["step"] + 0.01
