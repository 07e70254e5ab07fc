"""GSM8K as a pool, in full, where it is at hand: see test_gsm8k."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pools_for_tests import save_model
from test_adapters import read
from test_gsm8k import DATA, needs_data

from rft.config.schema import TasksConfig
from rft.tasks.overlap import check_overlap
from rft.tasks.prompts import PromptEncoder

pytestmark = needs_data


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder(save_model(tmp_path_factory.mktemp("model")), TasksConfig())


def test_gsm8k_is_read_in_full(encoder: PromptEncoder) -> None:
    train = read("gsm8k", DATA, encoder, files="train.jsonl")
    test = read("gsm8k_test", DATA / "test.jsonl", encoder)
    assert (len(train), len(test)) == (7473, 1319)
    for pool in (train, test):
        assert len(set(pool.ids)) == len(pool)
        assert all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", task.answer) for task in pool)
        assert {task.verifier for task in pool} == {"gsm8k"}
    assert test[0].answer == "18"
    assert check_overlap(train, {"test": test}, "error") == (train, None)
    assert "from the cache" in read("gsm8k", DATA, encoder, files="train.jsonl").summary


def test_measured_rates_join_gsm8k(tmp_path: Path, encoder: PromptEncoder) -> None:
    plain = read("gsm8k", DATA, encoder, files="train.jsonl")
    rates = np.random.default_rng(0).integers(0, 9, len(plain)) / 8
    order = np.random.default_rng(1).permutation(len(plain))[:7000]
    table = pa.table(
        {
            "id": [plain.ids[int(i)] for i in order],
            "rate": rates[order],
            "samples": np.full(len(order), 8),
        }
    )
    path = str(tmp_path / "weak.parquet")
    pq.write_table(table.replace_schema_metadata({"rft": "{}"}), path)
    pool = read("gsm8k", DATA, encoder, files="train.jsonl", rates={"weak": path})
    assert np.array_equal(pool.weak[order], rates[order])
    assert int(np.isnan(pool.weak).sum()) == len(plain) - 7000
    assert f"weak of 7,000 tasks from {path}" in pool.summary
