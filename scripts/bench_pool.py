"""What a pool costs: to prepare, to open from the cache, to use, and in memory.

    python scripts/bench_pool.py --rows 54000
    python scripts/bench_pool.py --rows 1000000

Rows are chats of about 185 tokens under a chat template like Qwen's and a byte-level BPE that is
trained on them first; a twentieth are duplicates. Each stage is a process of its own, started with
what it needs already imported. Memory "of its own" leaves out what is mapped from files: that is
the page cache's, which the system takes back at will. Files go to a temporary folder, or --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

TEMPLATE = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = 4000
LOOKUPS = 20_000


def write_rows(path: Path, rows: int) -> None:
    """Word problems without sense, as GURU's files have them: struct columns and pass rates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(WORDS)]
    writer: pq.ParquetWriter | None = None
    for start in range(0, rows, 10_000):
        batch = []
        for i in range(start, min(rows, start + 10_000)):
            which = i if i % 10 else i // 2  # a twentieth was there before
            own = random.Random(which)
            said = " ".join(own.choices(words, k=60)) + f" {which} + $x^2 = {own.random():.3f}$?"
            batch.append(
                {
                    "prompt": [{"role": "user", "content": said}],
                    "reward_model": {"style": "rule", "ground_truth": str(which)},
                    "weak": own.randint(0, 8) / 8,
                    "domain": "math",
                }
            )
        table = pa.Table.from_pylist(batch)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def memory(kind: str) -> float:
    """MiB of this process: `RssAnon` is its own, `VmRSS` has the page cache's part besides."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(kind)


class Peak:
    """The most memory of its own that this process has meanwhile, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.own, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.own = max(self.own, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def stage(folder: Path) -> None:
    """Load the pool and use it, in this process."""
    from rft.config.schema import PoolConfig, TasksConfig
    from rft.tasks.pool import load_pool
    from rft.tasks.prompts import PromptEncoder

    tasks = TasksConfig()
    encoder = PromptEncoder(str(folder / "model"), tasks)
    encoder.encode(({"role": "user", "content": "x"},))
    config = PoolConfig(
        source=str(folder / "rows.parquet"), columns={"answer": "reward_model.ground_truth"}
    )
    own, start = memory("RssAnon"), time.perf_counter()
    with Peak() as peak:
        pool = load_pool(config, tasks, encoder, key="tasks.train")
    seconds = time.perf_counter() - start
    print(f"  {pool.summary}")
    print(
        f"  load_pool: {seconds:.2f} s; memory of its own {own:.0f} MiB before, at most "
        f"{peak.own:.0f}, {memory('RssAnon'):.0f} after"
    )
    places = np.random.default_rng(0).integers(0, len(pool), LOOKUPS).tolist()
    ids = [pool.ids[i] for i in places]
    for name, use, items in (
        ("prompt_ids[i]", pool.prompt_ids.__getitem__, places),
        ("ids[i]", pool.ids.__getitem__, places),
        ("index(id)", pool.index, ids),
        ("pool[i]", pool.__getitem__, places),
    ):
        start = time.perf_counter()
        for item in items:
            use(item)
        print(f"  {name}: {(time.perf_counter() - start) / len(items) * 1e6:.1f} us")
    start = time.perf_counter()
    known = np.isfinite(pool.weak).sum() + pool.lengths.sum() + pool.domains.sum()
    print(f"  a pass over weak, lengths and domains: {time.perf_counter() - start:.3f} s ({known})")
    print(f"  memory of its own after that {memory('RssAnon'):.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a pool costs in time and memory.")
    parser.add_argument("--rows", type=int, default=54_000)
    parser.add_argument("--folder", type=Path, help="where to keep rows and cache")
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        stage(args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "rows.parquet", args.rows)
        import pyarrow.parquet as pq

        first = next(pq.ParquetFile(folder / "rows.parquet").iter_batches(2000)).to_pylist()
        write_tokenizer(folder / "model", [row["prompt"][0]["content"] for row in first])
        print(json.dumps({"rows": args.rows, "cores": len(os.sched_getaffinity(0))}))
        command = [sys.executable, __file__, "--stage", "--folder", str(folder)]
        for name in ("prepared", "from the cache"):
            print(name)
            sys.stdout.flush()
            environment = os.environ | {"RFT_CACHE": str(folder / "cache")}
            subprocess.run(command, env=environment, check=True)
        size = sum(path.stat().st_size for path in (folder / "cache/pools").iterdir())
        print(f"on disk: {size / 2**20:.0f} MiB, {size / args.rows:.0f} bytes a row")


if __name__ == "__main__":
    main()
