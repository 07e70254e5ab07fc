"""Letters: its tasks, its tokenizer, and a whole folder made in small."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from rft.errors import RftError
from rft.records import Task
from rft.tasks import letters
from rft.tasks.letters import FAMILIES, LENGTHS, make_tasks, prepare, right_answer, wrong_answer

TINY = {"train_tasks": 2, "held_out_tasks": 1, "base_steps": 12, "strong_steps": 2, "samples": 2}


def word(task: Task) -> str:
    assert isinstance(task.prompt, str)
    return task.prompt[1:-1]


def every(sets: dict[str, list[Task]]) -> list[Task]:
    return [task for tasks in sets.values() for task in tasks]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made with TINY settings."""
    folder = tmp_path_factory.mktemp("letters") / "tiny"
    prepare(str(folder), seed=3, **TINY)
    return folder


# ---- tasks


def test_every_set_has_its_count_of_each_family_and_length() -> None:
    sets = make_tasks(seed=0, train_tasks=20, held_out_tasks=8)
    sizes = {name: len(tasks) for name, tasks in sets.items()}
    assert sizes == {"train": 600, "validation": 240, "test": 240, "mislabelled": 1200}
    for name, each in (("train", 20), ("validation", 8), ("test", 8)):
        counts = Counter((task.domain, len(word(task))) for task in sets[name])
        assert counts == {(family, length): each for family in FAMILIES for length in LENGTHS}


def test_no_prompt_and_no_id_occurs_twice_in_all_sets() -> None:
    sets = make_tasks(0, 20, 8)
    tasks = sets["mislabelled"] + sets["validation"] + sets["test"]
    assert len({task.prompt for task in tasks}) == len({task.id for task in tasks}) == len(tasks)


def test_answers_are_words_reversed_or_sorted() -> None:
    sets = make_tasks(0, 20, 8)
    for task in sets["train"] + sets["validation"] + sets["test"]:
        if task.domain == "rev":
            assert task.prompt == f"r{task.answer[::-1]}="
        else:
            assert isinstance(task.prompt, str)
            assert task.prompt.startswith("s")
            assert list(task.answer) == sorted(word(task))


def test_a_seed_gives_the_same_tasks_again_and_another_seed_others() -> None:
    # Unknown pass rates are NaN, which equals nothing: ids stand for the tasks.
    ids = [[task.id for task in every(make_tasks(seed, 20, 8))] for seed in (0, 0, 1)]
    assert ids[0] == ids[1]
    assert len(set(ids[0]) & set(ids[2])) < 100  # the short words that there are few of


def test_the_first_tasks_of_a_set_are_of_all_lengths() -> None:
    first = make_tasks(0, 20, 8)["test"][:60]
    assert len({len(task.answer) for task in first}) > 10


def test_half_of_the_mislabelled_pool_are_the_training_tasks() -> None:
    sets = make_tasks(0, 20, 8)
    assert len(sets["mislabelled"]) == 1200
    right = {task.id for task in sets["mislabelled"] if not task.id.endswith("-wrong")}
    assert right == {task.id for task in sets["train"]}


def test_mislabelled_answers_have_one_wrong_letter_and_are_of_no_known_strategy() -> None:
    tasks = make_tasks(0, 20, 8)["mislabelled"]
    wrong = [task for task in tasks if task.id.endswith("-wrong")]
    assert len(wrong) == 600
    for task in wrong:
        pairs = zip(task.answer, right_answer(task.domain, word(task)), strict=True)
        assert sum(a != b for a, b in pairs) == 1
        for family in FAMILIES:
            assert task.answer != right_answer(family, word(task))
            assert task.answer != wrong_answer(family, word(task))


def test_more_tasks_than_short_words_are_refused() -> None:
    with pytest.raises(RftError, match=r"104 different words of 2 letters, there are 100; lower"):
        make_tasks(0, train_tasks=44, held_out_tasks=8)


# ---- tokenizer and demonstrations


def test_the_tokenizer_puts_bos_first_and_gives_the_text_back(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    ids = tokenizer("rabc=").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert len(ids) == 6
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == "rabc="
    assert tokenizer.decode([1, 2, 0]) == "<bos><eos><pad>"
    assert all(tokenizer.convert_ids_to_tokens(i) is not None for i in range(64))


def test_demonstrations_are_wrong_where_words_are_long_and_avoid_what_they_should() -> None:
    from rft.tasks.letters_model import demonstrations

    avoid = {"ra=", "sj="}
    shown = list(islice(demonstrations(0, 0.985, avoid), 4000))
    assert not avoid & {prompt for prompt, _ in shown}
    families = {"r": "rev", "s": "sort"}
    right = [(len(a), a == right_answer(families[p[0]], p[1:-1])) for p, a in shown]
    for lengths, low, high in (((1, 2, 3), 0.95, 1.0), ((6,), 0.3, 0.5), ((12, 16), 0.0, 0.1)):
        share = [is_right for length, is_right in right if length in lengths]
        assert low <= sum(share) / len(share) <= high
    for prompt, answer in islice(demonstrations(0, 0.0, ()), 500):
        assert answer == right_answer(families[prompt[0]], prompt[1:-1])


def test_only_answers_and_their_end_are_learnt_however_rows_are_padded() -> None:
    import torch

    from rft.tasks.letters_model import _loss_sum, make_model, make_tokenizer

    model, tokenizer = make_model(0), make_tokenizer()
    pairs = [("rabcdef=", "fedcba"), ("sb=", "b")]
    alone = 0.0
    for prompt, answer in pairs:
        ids = torch.tensor([[*tokenizer(prompt + answer).input_ids, 2]])
        logp = torch.log_softmax(model(ids).logits[0], -1)
        places = range(len(prompt) + 1, ids.shape[1])
        alone -= sum(logp[t - 1, ids[0, t]].item() for t in places)
    assert math.isclose(_loss_sum(model, pairs).item(), alone, rel_tol=1e-5)


# ---- the folder


def test_the_folder_has_models_that_load_and_end_at_eos(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("base", "strong"):
        model = AutoModelForCausalLM.from_pretrained(tiny / name)
        assert model.generation_config.eos_token_id == 2
        assert 0.6e6 < sum(p.numel() for p in model.parameters()) < 0.8e6


def test_the_task_files_have_all_columns_and_measured_pass_rates(tiny: Path) -> None:
    sets = make_tasks(3, TINY["train_tasks"], TINY["held_out_tasks"])
    for name, tasks in sets.items():
        rows = [json.loads(line) for line in (tiny / f"{name}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [task.id for task in tasks]
        for row, task in zip(rows, tasks, strict=True):
            assert list(row) == ["id", "prompt", "answer", "weak", "strong", "domain"]
            assert (row["prompt"], row["answer"]) == (task.prompt, task.answer)
            assert row["weak"] in (0, 0.5, 1)
            assert row["strong"] in (0, 0.5, 1)


def test_the_manifest_and_readme_say_what_was_made(tiny: Path) -> None:
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert manifest["settings"] == {"seed": 3, **TINY}
    assert {"train", "test", "2 letters", "16 letters"} <= set(manifest["accuracy"])
    readme = (tiny / "README.md").read_text()
    assert "systematically wrong" in readme
    assert "| 16 letters | 0." in readme
    assert "end in `-wrong`" in readme


def test_a_second_call_does_nothing_and_imports_no_torch(tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [tiny, *tiny.rglob("*")]}
    code = (
        "import sys; from rft.tasks.letters import prepare;"
        f"prepare({str(tiny)!r}, seed=3, **{TINY}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert before == {path: path.stat().st_mtime_ns for path in [tiny, *tiny.rglob("*")]}


def test_a_folder_of_other_settings_is_refused_and_kept(tiny: Path) -> None:
    with pytest.raises(RftError, match="was made with seed=3, not 4; remove it"):
        prepare(str(tiny), seed=4, **TINY)
    assert (tiny / "manifest.json").is_file()


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RftError, match=r"holds no manifest.json"):
        prepare(str(tmp_path), **TINY)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RftError, match=r"cannot make .*/file/folder .*; name a folder"):
        prepare(str(tmp_path / "file" / "folder"), **TINY)


def test_a_count_below_one_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RftError, match="samples=0 for the letters tasks; it must be at least 1"):
        prepare(str(tmp_path / "folder"), **{**TINY, "samples": 0})
    assert not list(tmp_path.iterdir())


def test_no_held_out_prompt_is_shown_in_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rft.tasks import letters_model

    avoided: set[object] = set()

    def stop(*arguments: object) -> None:
        avoided.update(*(argument for argument in arguments if isinstance(argument, set)))
        raise KeyboardInterrupt

    monkeypatch.setattr(letters_model, "make_models", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path / "folder"), seed=3, **TINY)
    sets = make_tasks(3, TINY["train_tasks"], TINY["held_out_tasks"])
    assert avoided == {task.prompt for task in sets["validation"] + sets["test"]}


def test_an_interrupted_build_leaves_no_folder_and_the_next_is_the_same_bit_for_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rft.tasks import letters_model

    folder = tmp_path / "folder"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(letters_model, "pass_rates", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(folder), seed=3, **TINY)
    assert not folder.exists()
    prepare(str(folder), seed=3, **TINY)
    assert hashes(folder) == hashes(tiny)


def test_who_waits_for_another_build_uses_what_it_made(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    folder = tmp_path / "folder"
    monkeypatch.setattr(
        letters, "Console", lambda **_: SimpleNamespace(print=lambda _: waits.set())
    )
    monkeypatch.setattr(letters, "_build", lambda *_: pytest.fail("it was there already"))
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / ".folder.lock"):
            second = pool.submit(prepare, str(folder), seed=3, **TINY)
            assert waits.wait(20)
            shutil.copytree(tiny, folder)
        second.result(timeout=20)


def test_a_lock_that_is_never_given_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters, "PATIENCE", 0.1)
    with (
        FileLock(tmp_path / ".folder.lock"),
        pytest.raises(RftError, match=r"\.folder\.lock has been locked .* end the process"),
    ):
        prepare(str(tmp_path / "folder"), **TINY)
