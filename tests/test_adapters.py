"""Presets: every one composes, and reads rows as its dataset was released."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pools_for_tests import jsonl, parquet, save_model, text_of

from rft.config.compose import explain, to_config
from rft.config.schema import Config, PoolConfig, TasksConfig
from rft.errors import RftError
from rft.tasks import adapters
from rft.tasks.overlap import check_overlap
from rft.tasks.pool import TaskPool, load_pool
from rft.tasks.prompts import PromptEncoder
from rft.tasks.sources import patterns

FOLDER = Path(__file__).parent.parent / "rft/configs/pool"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "custom")
TASKS = TasksConfig(max_prompt_tokens=4096)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder(save_model(tmp_path_factory.mktemp("model")), TASKS)


def composed(*overrides: str) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("rft.configs", version_base="1.3"):
        return to_config(compose("train", ["name=n", "model.path=m", *overrides]))


def preset(name: str) -> PoolConfig:
    return composed("tasks.train.source=s", f"+pool@tasks.evaluation.it={name}").tasks.evaluation[
        "it"
    ]


def read(name: str, source: Path, encoder: PromptEncoder, **changes: Any) -> TaskPool:
    """The pool of a preset with the source that is given."""
    pool = replace(preset(name), source=str(source), **changes)
    return load_pool(pool, TASKS, encoder, key="tasks.train")


def answer(pool: TaskPool, index: int = 0) -> Any:
    return json.loads(pool[index].answer)


# ---- composing


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_for_training_and_for_evaluation(name: str) -> None:
    config = composed(f"pool@tasks.train={name}", f"+pool@tasks.evaluation.{name}={name}")
    assert config.tasks.train == config.tasks.evaluation[name]
    assert "/" in config.tasks.train.source
    assert patterns(config.tasks.train.files)
    pool = config.tasks.train
    assert pool.verifier or pool.adapt == "rft.tasks.adapters.guru"
    assert pool.domain or pool.adapt == "rft.tasks.adapters.guru"
    if pool.adapt:
        assert callable(getattr(adapters, pool.adapt.rpartition(".")[2]))
    elsewhere = composed(f"pool@tasks.train={name}", "tasks.train.source=/data")
    assert elsewhere.tasks.train == replace(pool, source="/data")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("tasks.train.sorce=x", "did you mean 'tasks.train.source'?"),
        ("+tasks.train.sorce=x", "did you mean 'tasks.train.source'?"),
        ("+tasks.evaluation.math500.flies=x", "flies"),
    ],
)
def test_a_key_that_a_pool_does_not_have_is_refused(override: str, hint: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, RftError)) as caught:
        composed("pool@tasks.train=gsm8k", "+pool@tasks.evaluation.math500=math500", override)
    assert hint in explain(caught.value)


# ---- GURU


def guru(source: str, content: str, truth: Any, **more: Any) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "ability": source.partition("__")[0],
        "apply_chat_template": True,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0, "split": "train", **more},
        "qwen2.5_7b_pass_rate": 0.25,
        "qwen3_30b_pass_rate": float("nan"),
    }


BOXED = " Please output the final answer within \\boxed{}."


def test_guru_math(tmp_path: Path, encoder: PromptEncoder) -> None:
    row = guru("math__combined", f"What is $x$ if $x + 1 = 2$?{BOXED}", "1")
    parquet(tmp_path, row, name="train/math__combined_54.4k.parquet")
    pool = read("guru_math", tmp_path, encoder)
    task = pool[0]
    assert task.prompt == tuple(row["prompt"])
    assert (task.answer, task.weak, task.verifier, task.domain) == (
        *("1", 0.25, "math__combined"),
        "math",
    )
    assert np.isnan(task.strong)
    row = {"unique_id": "e", "problem": "What is x if x+1=2", "answer": "1"}
    held_out = read("math500", jsonl(tmp_path, row), encoder)
    with pytest.raises(RftError, match="1 of 1 training tasks are evaluated on too"):
        check_overlap(pool, {"math500": held_out}, "error")


def test_guru_code(tmp_path: Path, encoder: PromptEncoder) -> None:
    functional = json.dumps({"functional": "assert f(1) == '\ud800é'"})
    stdio = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    parquet(
        tmp_path,
        guru("codegen__leetcode2k", "Write f.", functional, prefix="import math\n"),
        guru("codegen__taco", "Add one.", stdio, prefix=None),
        name="train/codegen__mixed.parquet",
    )
    pool = read("guru_code", tmp_path, encoder)
    assert answer(pool) == {"functional": "assert f(1) == '\ud800é'", "prefix": "import math\n"}
    assert answer(pool, 1) == {"inputs": ["1\n"], "outputs": ["2\n"]}
    assert [task.verifier for task in pool] == ["codegen__leetcode2k", "codegen__taco"]
    assert pool.domain_names == ("codegen",)


TABLE = {"header": ["Position", "Pet"], "rows": [["1", "cat"], ["2", "dog"]]}


def test_guru_logic(tmp_path: Path, encoder: PromptEncoder) -> None:
    """Every file's truths are of another type."""
    for name, row in {
        "logic__zebra_puzzle_1.3k": guru("logic__zebra_puzzle_800", "Who has the cat?", TABLE),
        "logic__ordering_puzzle_1.9k": guru("logic__ordering_puzzle", "Order!", ["crow", "hawk"]),
        "logic__graph_logical_1.2k": guru("logic__graph_logical", "Where to?", "lemon"),
        "logic__arcagi1_111": guru("simulation__arcagi1", "Grid 1", [[1, 0], [0, 1]]),
        "logic__barc_1.6k": guru("simulation__barc", "Grid 2", [[3]]),
    }.items():
        parquet(tmp_path, row, name=f"train/{name}.parquet")
    parquet(tmp_path, guru("math__x", "p", "1"), name="train/math__combined_54.4k.parquet")
    pool = read("guru_logic", tmp_path, encoder)
    answers = {task.verifier: task.answer for task in pool}
    assert json.loads(answers.pop("logic__zebra_puzzle_800")) == TABLE
    assert answers == {
        "logic__ordering_puzzle": '["crow", "hawk"]',
        "logic__graph_logical": "lemon",
        "simulation__arcagi1": "[[1, 0], [0, 1]]",
        "simulation__barc": "[[3]]",
    }
    assert pool.domain_names == ("logic",)


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        (
            "livecodebench",
            "codegen__livecodebench_279",
            guru("codegen__livecodebench", "Write f.", '{"functional": "f()"}'),
        ),
        ("zebra", "logic__zebra_puzzle_dataset_200", guru("logic__zebra_puzzle", "Who?", TABLE)),
        ("arc_agi", "logic__arcagi1_200", guru("simulation__arcagi1", "Grid", [[1]])),
    ],
)
def test_guru_evaluation_sets(
    tmp_path: Path, encoder: PromptEncoder, name: str, file: str, row: dict[str, Any]
) -> None:
    """They have no pass rates."""
    row = {key: value for key, value in row.items() if not key.startswith("qwen")}
    parquet(tmp_path, row, name=f"online_eval/{file}.parquet")
    pool = read(name, tmp_path, encoder)
    assert pool[0].verifier == row["data_source"]
    assert np.isnan(pool.weak[0])


# ---- mathematics


def test_gsm8k(tmp_path: Path, encoder: PromptEncoder) -> None:
    row = {"question": "How many?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}
    for name, file in (("gsm8k", "train"), ("gsm8k_test", "test")):
        parquet(tmp_path, row, name=f"main/{file}-00000-of-00001.parquet")
        pool = read(name, tmp_path, encoder)
        assert (pool[0].prompt, pool[0].answer, pool[0].verifier) == (
            "How many?",
            "1200",
            "gsm8k",
        )
        assert text_of(pool.prompt_ids[0]).startswith("How many?\n\nPlease reason step by step")
        assert text_of(pool.prompt_ids[0]).endswith("within \\boxed{}.")


def test_math(tmp_path: Path, encoder: PromptEncoder) -> None:
    rows = [
        {"problem": "Half?", "solution": "So $\\boxed{3}$, no: $\\boxed{\\frac{1}{2}}$."},
        {"problem": "Two?", "solution": "So $\\boxed 2$."},
    ]
    for i, row in enumerate(rows):
        more = {"level": "Level 1", "type": "Algebra"}
        parquet(tmp_path, row | more, name=f"subject{i}/train-00000-of-00001.parquet")
        parquet(tmp_path, row | more, name=f"subject{i}/test-00000-of-00001.parquet")
    pool = read("math", tmp_path, encoder)
    assert [task.answer for task in pool] == ["\\frac{1}{2}", "2"]
    row = {"problem": "Half?", "solution": "So."}
    parquet(tmp_path, row, name="subject0/train-00000-of-00001.parquet")
    with pytest.raises(RftError, match=r"row 1: tasks\.train\.adapt=.*no \\boxed"):
        read("math", tmp_path, encoder)


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}"
    "\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def test_dapo_math_counts_each_of_its_repeated_rows_once(
    tmp_path: Path, encoder: PromptEncoder
) -> None:
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": DAPO.format(f"What is {i}+1?")}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(i + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{i}-{copy}"},
        }
        for copy in range(100)
        for i in range(17)
    ]
    parquet(tmp_path, *rows, name="data/dapo-math-17k.parquet")
    pool = read("dapo_math", tmp_path, encoder)
    assert len(pool) == 17
    assert pool[0].prompt == ({"role": "user", "content": "What is 0+1?"},)
    assert (pool[0].answer, pool[0].verifier) == ("1", "math")
    assert text_of(pool.prompt_ids[0]).startswith("<user>What is 0+1?\n\nPlease reason")
    assert "17 tasks of 1,700 rows, without 1,683 duplicates" in pool.summary


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        (
            "math500",
            "test.jsonl",
            {"problem": "P?", "solution": "s", "answer": "7", "subject": "Algebra", "level": 2}
            | {"unique_id": "test/algebra/1.json"},
        ),
        (
            "aime24",
            "data/train-00000-of-00001.parquet",
            {"id": 60, "problem": "P?", "solution": "s", "answer": "7", "url": "u", "year": "2024"},
        ),
        ("aime25", "test.jsonl", {"problem": "P?", "answer": "7", "id": "0"}),
        (
            "amc23",
            "test-00000-of-00001.parquet",
            {"id": 0, "answer": 7.0, "question": "P?", "url": "u"},
        ),
    ],
)
def test_mathematics_evaluation_sets(
    tmp_path: Path, encoder: PromptEncoder, name: str, file: str, row: dict[str, Any]
) -> None:
    write = jsonl if file.endswith(".jsonl") else parquet
    source = write(tmp_path, row, name=file)
    for place in (tmp_path, source):  # the folder, or the file by itself
        task = read(name, place, encoder)[0]
        assert (task.prompt, task.answer) == ("P?", "7")
        assert (task.verifier, task.domain) == ("math", "math")
        assert task.id == str(row.get("unique_id", row.get("id")))


# ---- code


def test_humaneval_tests_find_the_function_however_it_was_written(
    tmp_path: Path, encoder: PromptEncoder
) -> None:
    head = 'from typing import List\n\n\ndef double(x: int) -> List[int]:\n    """Twice x."""\n'
    row = {
        "task_id": "HumanEval/0",
        "prompt": head,
        "canonical_solution": "    return [2 * x]\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == [4]\n",
        "entry_point": "double",
    }
    parquet(tmp_path, row, name="openai_humaneval/test-00000-of-00001.parquet")
    pool = read("humaneval", tmp_path, encoder)
    assert (pool[0].id, pool[0].verifier) == ("HumanEval/0", "code")
    assert "one ```python block" in text_of(pool.prompt_ids[0])
    parts = answer(pool)
    whole = "def double(x: int) -> List[int]:\n    return [2 * x]\n"
    for completion in (whole, row["canonical_solution"]):
        exec("\n".join([parts["prefix"], completion, parts["functional"]]), {})  # our own text
    with pytest.raises(TypeError):  # the head's empty function is there, and is not right
        exec("\n".join([parts["prefix"], "", parts["functional"].replace("== [4]", "+ 1")]), {})


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Write a function to add.", "test_setup_code": "import math"}
        | {"challenge_test_list": ["assert False"]},
        {"prompt": "Write a function to add.", "test_imports": ["import math"]},
    ],
    ids=["full", "sanitized"],
)
def test_mbpp(tmp_path: Path, encoder: PromptEncoder, row: dict[str, Any]) -> None:
    tests = ["assert add(1, 2) == math.floor(3.5)", "assert add(0, 0) == 0"]
    row |= {"task_id": 11, "code": "def add(a, b): ...", "test_list": tests}
    source = parquet(tmp_path, row, name="full/test-00000-of-00001.parquet")
    pool = read("mbpp", source, encoder)
    assert pool[0].id == "mbpp/11"
    assert isinstance(pool[0].prompt, str)
    assert pool[0].prompt.endswith(f"pass these tests:\n\n{tests[0]}\n{tests[1]}")
    exec("def add(a, b):\n    return a + b\n" + answer(pool)["functional"], {})  # our own text
