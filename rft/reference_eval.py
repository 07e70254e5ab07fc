"""Pass rates of a reference model, as a column of the training pool.

    python -m rft.reference_eval +experiment=math_bots name=weak model=qwen2.5_7b_instruct \\
        evaluation.samples=16
    python -m rft.train +experiment=math_bots +tasks.train.rates.weak=runs/weak/rates.parquet

Samples every task of `tasks.train` with the experiment's engine, template and verifier, at
`evaluation.temperature`. Interrupted, the same command goes on where it was and gives the same
column. `rates.parquet` has a row a task, by id: rate, samples, errors, timeouts, tokens; and in its
metadata, how they were made. A check that ended in an error says nothing of a task, and one whose
every check did has no rate; a timeout counts as wrong.
What the pool's own columns say of tasks that are not in the file stays as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.cli import Command, compose_and

if TYPE_CHECKING:
    from rft.config.schema import Config
    from rft.records import Request
    from rft.tasks.pool import TaskPool


def main() -> None:
    """Collect the rates that the command line describes."""
    compose_and(Command("rft.reference_eval", _job, _check))


def _check(config: Config) -> None:
    from rft.config.validate import validate

    validate(config, training=False)


def _job(config: Config) -> int:
    _check(config)
    path = collect(config)
    print(f"written: {path}; use it with +tasks.train.rates.weak={path} (or .strong)")
    return 0


def collect(config: Config) -> Path:
    """Sample the training pool of `config` and write its rates; where to."""
    from rft.cluster.place import place_sampling
    from rft.config.parts import build
    from rft.pools import verifier_names
    from rft.run import owned
    from rft.sample_files import same_settings, sampled, tasks_a_part
    from rft.sampling import Sampler, sample_requests
    from rft.tasks.pool import load_pool
    from rft.tasks.prompts import PromptEncoder
    from rft.tracking.environment import write_environment

    if config.prepare is not None:
        build(config.prepare)
    encoder = PromptEncoder(config.model.path, config.tasks)
    pool = load_pool(config.tasks.train, config.tasks, encoder, key="tasks.train")
    print(pool.summary)
    folder = (Path(config.runs_dir) / config.name).resolve()
    made = provenance(config, pool)
    tally = Tally(pool)
    with owned(folder):
        same_settings(folder, made)
        with place_sampling(config, verifier_names(pool), folder) as (engines, verifiers):
            write_environment(folder, verifiers=verifiers.about())

            def requests(tasks: Sequence[str]) -> list[Request]:
                return sample_requests(config, pool, tasks, "reference")

            sampler = Sampler(engines, verifiers)
            parts = sampled(folder, "train", pool, requests, sampler, tasks_a_part(config), print)
            for part in parts:
                for one in part:
                    tally.add(one)
        tally.write(folder / "rates.parquet", made | {"date": time.strftime("%Y-%m-%d")})
    print(tally.said())
    return Path(config.runs_dir) / config.name / "rates.parquet"


class Tally:
    """What is known of each task so far."""

    def __init__(self, pool: TaskPool) -> None:
        import numpy as np

        ids = self._ids = pool.ids
        self._content = pool.content
        self._place = {task: i for i, task in enumerate(ids)}
        self._reward = np.zeros(len(ids))
        self._count = {
            name: np.zeros(len(ids), np.int64)
            for name in ("samples", "errors", "timeouts", "tokens")
        }

    def add(self, sample: Any) -> None:
        """Count one sample."""
        i = self._place[sample.task]
        self._reward[i] += sample.reward
        self._count["samples"][i] += 1
        self._count["errors"][i] += sample.reason == "error"
        self._count["timeouts"][i] += sample.reason == "timeout"
        self._count["tokens"][i] += sample.tokens

    def rates(self) -> Any:
        """Mean reward of each task's checks that came to a verdict [N]; NaN where none did."""
        import numpy as np

        known = self._count["samples"] - self._count["errors"]
        return np.where(known > 0, self._reward / np.maximum(known, 1), np.nan)

    def write(self, path: Path, made: dict[str, Any]) -> None:
        """The table, with `made` as metadata, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from rft.state import write_atomic

        rates = self.rates()
        columns: dict[str, Any] = {
            "id": pa.array(list(self._ids), pa.string()),
            "rate": pa.array(rates, pa.float64(), from_pandas=True),  # NaN becomes null
            "content": pa.array(self._content),
        }
        columns |= {name: pa.array(count) for name, count in self._count.items()}
        made = made | {"tokens": int(self._count["tokens"].sum())}
        table = pa.table(columns).replace_schema_metadata({"rft": json.dumps(made)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomic(path, sink.getvalue().to_pybytes())

    def said(self) -> str:
        """A line on the rates."""
        import numpy as np

        rates = self.rates()
        known = rates[~np.isnan(rates)]
        if not len(known):
            return "no task has a rate: every check failed; see samples/ for why"
        return (
            f"{len(known):,} of {len(rates):,} tasks have a rate: mean {known.mean():.3f}, "
            f"{np.mean(known == 0):.1%} never solved, {np.mean(known == 1):.1%} always"
        )


def provenance(config: Config, pool: TaskPool) -> dict[str, Any]:
    """How the rates are made: what else they would depend on is the code."""
    from dataclasses import asdict

    from rft import __version__
    from rft.config.compose import plain
    from rft.evaluate import sampling_keys

    tasks = asdict(config.tasks)
    made: dict[str, Any] = plain(
        {
            "rft": __version__,
            "model": config.model.path,
            "revision": revision(config.model.path),
            "dtype": config.model.dtype,
            "engine": config.rollout.engine,
            "samples": config.evaluation.samples,
            "temperature": config.evaluation.temperature,
            "sampling": sampling_keys(config),
            "seed": config.seed,
            "pool": tasks["train"],
            "content": pool.digest,
            "template": {key: tasks[key] for key in ("chat", "system", "thinking", "assistant")},
            "verifier": config.reward.verifier,
        }
    )
    return made


def revision(model: str) -> str:
    """Which weights: the hub's commit, or a hash of a local folder's files."""
    import xxhash
    from transformers import AutoConfig

    folder = Path(model)
    if not folder.is_dir():
        return str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None))
    found = xxhash.xxh3_128()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        found.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return f"xxh3:{found.hexdigest()}"


if __name__ == "__main__":
    main()
