"""scripts/bench_learner.py at a size that only shows that it runs. A minute on two
cores, most of it imports: every contestant is a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import ENV, HERE, check

SCRIPTS = HERE.parent / "scripts"
TRL = ["TRL GRPOTrainer", "TRL, its defaults"]
OURS = ["ours, auto"]
SIZES = {"prompts": 3, "group": 4, "rows": 4, "warmup": 1, "repeats": 2, "device": "cpu"}
SIZES |= {"model": "tiny", "vocabulary": 40_000, "hidden": 16, "scored": 1024, "threads": 1}


def test_it_times_one_and_the_same_step_and_the_memory_of_log_probs(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    what = ["--layouts", "auto", "--json", str(file), *sizes]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_learner.py"), *what],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=900,
    )
    check(done)
    ratios = dict(re.findall(r"^(.+ / .+?) +(\d+\.\d+)$", done.stdout, re.M))
    pairs = [pair for ours in OURS for pair in (*(f"{t} / {ours}" for t in TRL), f"{ours} / plain")]
    heads = "whole logits / scoring head"
    assert [*ratios] == [*pairs, f"{heads}, peak memory", f"{heads}, time"]
    assert all(float(ratio) > 0 for ratio in ratios.values())

    stored = json.loads(file.read_text())
    steps = stored["step"]
    assert [*steps] == [*TRL, *OURS, "plain"]
    assert all(len(measured) == 2 for measured in steps.values()), "each as often as the others"
    measured = [one for of in steps.values() for one in of]
    for what in ("loss", "norm"):
        found = [one[what] for one in measured]
        assert found == pytest.approx([found[0]] * len(found), rel=1e-4)
        assert abs(found[0]) > 1e-4, "the guard compares nothing with nothing"
    assert all(one["peak"] > 0 and one["step"] > 0 for one in measured)
    computed = {name: of[0]["padded"] for name, of in steps.items()}
    assert computed["ours, auto"] < computed["plain"], "a prompt is computed once a group"
    assert max(computed.values()) == computed[TRL[0]], "which pads to the longest of all"
    for name in OURS:
        for one in steps[name]:
            phases = sum(v for key, v in one.items() if key.startswith("phase/"))
            assert phases == pytest.approx(one["step"])

    whole, fused = (max(s["peak"] for s in of) for of in reversed(stored["logprobs"].values()))
    logits = 4 * SIZES["vocabulary"] * SIZES["scored"]
    assert whole > 2 * logits, "log-probs of the vocabulary, and their gradients"
    assert fused < 1.5 * logits, "buffers"


def test_it_reports_nothing_of_contestants_that_do_different_work() -> None:
    code = (
        "from turns import same_work\n"
        "same = {'loss': 0.02, 'norm': 0.5}\n"
        "same_work({'a': same, 'b': dict(same, norm=0.50001)}, 'float32')\n"
        "same_work({'a': same, 'b': dict(same, norm=0.501)}, 'float32')\n"
    )
    path = os.pathsep.join([str(SCRIPTS), ENV["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "norm of b is 0.501, but 0.5 of a" in done.stderr
