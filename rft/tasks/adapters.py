"""One small function a dataset: from a row as it was released to one with our columns.

A pool names its adapter in `adapt`; rft/configs/pool has a preset for each. A row that is not what
its dataset's rows are raises, and the pool's error says where it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rft.rewards.answers import last_boxed

Row = Mapping[str, Any]

DAPO_BEFORE = re.compile(r"\s*Solve the following math problem step by step\.[^\n]*\n\s*")
DAPO_AFTER = re.compile(
    r"\n\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*\Z"
)
BOXED_AFTER = re.compile(r"\s*(?:please|let's)[^.\n]*\\boxed\s*\{\s*\}\.?\s*\Z", re.IGNORECASE)
BARE_BOX = re.compile(r"\\boxed\s+([^\s$.]+)")
TAIL = 300
"""Characters at a prompt's end in which an instruction is looked for."""


def gsm8k(row: Row) -> dict[str, Any]:
    """Grade-school word problems (Cobbe et al., 2021): the answer is what follows `####`, without
    the commas that group its digits."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no ####")
    return {"prompt": row["question"], "answer": answer.strip().replace(",", "")}


def gsm8k_recorded(row: Row) -> dict[str, Any]:
    """GSM8K with what its authors' models answered, where that was recorded: the pass rates are of
    the models of 6B and of 175B parameters, one answer each of a finetuned and a verified one."""
    if "ground_truth" not in row:
        return gsm8k(row)
    solution, _, answer = row["ground_truth"].rpartition("A:")
    adapted = gsm8k({"question": row["question"], "answer": f"{solution}####{answer}"})
    for column, size in (("weak", "6b"), ("strong", "175b")):
        right = [row[f"{size}_{way}"]["is_correct"] for way in ("finetuning", "verification")]
        adapted[column] = sum(right) / len(right)
    return adapted


def math(row: Row) -> dict[str, Any]:
    """Competition problems (Hendrycks et al., 2021): the answer is the solution's last \\boxed,
    which a few solutions write without braces."""
    answer = last_boxed(row["solution"]) or next(iter(BARE_BOX.findall(row["solution"])[-1:]), None)
    if answer is None:
        raise ValueError("the solution has no \\boxed{...}")
    return {"prompt": row["problem"], "answer": answer}


def dapo(row: Row) -> dict[str, Any]:
    """DAPO-Math-17k (Yu et al., 2025): its own instruction, to end with `Answer: ...`, is taken
    off, so that the pool's `user` says how to answer and duplicates elsewhere are recognised."""
    question = DAPO_BEFORE.sub("", row["prompt"][-1]["content"], count=1)
    question = question[:-TAIL] + DAPO_AFTER.sub("", question[-TAIL:])
    return {
        "prompt": [*row["prompt"][:-1], {"role": "user", "content": question.strip()}],
        "answer": row["reward_model"]["ground_truth"],
    }


def humaneval(row: Row) -> dict[str, Any]:
    """Functions to write from their docstrings (Chen et al., 2021).

    The task's head goes before the completion as `prefix`: its imports and helpers are there for a
    completion that writes the whole function anew, which takes the place of the head's empty one,
    and a completion that only goes on from the head finds it as well.
    """
    tests = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return {
        "id": row["task_id"],
        "prompt": f"```python\n{row['prompt'].rstrip()}\n```",
        "answer": json.dumps({"functional": tests, "prefix": row["prompt"]}),
    }


def mbpp(row: Row) -> dict[str, Any]:
    """Mostly basic Python problems (Austin et al., 2021), full or sanitized: the tests are part of
    the prompt, as in the paper, for only they say what the function is called."""
    text = row.get("text") or row["prompt"]
    tests = list(row["test_list"])
    setup = [row.get("test_setup_code") or "", *(row.get("test_imports") or [])]
    shown = "\n".join(tests)
    return {
        "id": f"mbpp/{row['task_id']}",
        "prompt": f"{text.strip()}\n\nYour code should pass these tests:\n\n{shown}",
        "answer": json.dumps({"functional": "\n".join([*filter(None, setup), *tests]) + "\n"}),
    }


def guru(row: Row) -> dict[str, Any]:
    """A row of GURU (LLM360/guru-RL-92k; Cheng et al., 2025) of any domain, with its pass rates.

    The verifier is the row's `data_source`, as GURU routes its rewards. The domain is what that
    begins with, but for the ARC grids, which GURU counts as logic. Code's tests come with the
    prefix that goes before the completion; puzzles' tables and grids stay what they are. Math's
    last sentence, how to write the answer, stays in the prompt and is no part of the question.
    """
    source: str = row["data_source"]
    truth = row["reward_model"]["ground_truth"]
    domain = source.partition("__")[0]
    adapted = {
        "prompt": row["prompt"],
        "answer": truth,
        "verifier": source,
        "domain": "logic" if source.startswith(("simulation__arc", "simulation__barc")) else domain,
        "weak": row.get("qwen2.5_7b_pass_rate"),
        "strong": row.get("qwen3_30b_pass_rate"),
    }
    if domain == "codegen":
        tests = json.loads(truth)
        prefix = (row.get("extra_info") or {}).get("prefix")
        adapted["answer"] = json.dumps(tests | {"prefix": prefix} if prefix else tests)
    if domain == "math":
        said = row["prompt"][-1]["content"]
        adapted["question"] = said[:-TAIL] + BOXED_AFTER.sub("", said[-TAIL:])
    return adapted
