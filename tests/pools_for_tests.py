"""Tiny tokenizers and pools for the tests of rft.tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rft.config.schema import PoolConfig, TasksConfig
from rft.tasks.pool import TaskPool, load_pool
from rft.tasks.prompts import PromptEncoder

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who is nobody?') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
THINKING = TEMPLATE + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"


def save_model(folder: Path, template: str | None = TEMPLATE) -> str:
    """A tokenizer that makes a token of every character, as a base model's folder has it."""
    import tokenizers
    import transformers

    words = {chr(code): code for code in range(128)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


def text_of(ids: tuple[int, ...]) -> str:
    """What the tokenizer of `save_model` read."""
    return "".join(map(chr, ids))


def load(
    source: Path | str, encoder: PromptEncoder, tasks: TasksConfig | None = None, **pool: Any
) -> TaskPool:
    """The pool of a source; `pool` are keys of PoolConfig."""
    config = PoolConfig(source=str(source), **pool)
    return load_pool(config, tasks or TasksConfig(), encoder, key="tasks.train")


def jsonl(folder: Path, *rows: object, name: str = "pool.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path, *rows: dict[str, Any], name: str = "pool.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path
