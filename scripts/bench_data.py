"""Tokenizing speed and memory of lora's data room beside `datasets.map`, on the same rows with the same tokenizer.

    python scripts/bench_data.py                      200,000 short conversations, about two minutes on two cores
    python scripts/bench_data.py --rows 1000000       what the memory bound is for
    python scripts/bench_data.py --rows 2000          a smoke test; its figures mean nothing

Both read the same JSON Lines file from disk and end with token ids on disk. `datasets.map` renders each conversation
with the chat template and tokenizes in batches of 1,000, which is what a tutorial writes; it makes no loss mask.
lora makes the mask, accounts for every row and looks for duplicates. Both may use as many processes as lora would.
The memory is the peak resident size of the process less what it had after its imports; that of a worker is all of it,
imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from lora_cli.data.parallel import workers_for

WORDS = (
    "the",
    "rent",
    "is",
    "due",
    "on",
    "a",
    "day",
    "of",
    "may",
    "when",
    "we",
    "met",
    "at",
    "noon",
    "and",
    "it",
    "rained",
)
BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--only", choices=["lora", "datasets"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure = {"lora": tokenize_with_lora, "datasets": tokenize_with_datasets}[arguments.only]
        print(json.dumps(measure(arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "rows.jsonl", arguments.rows)
        make_tokenizer(folder / "tokenizer")
        results = {one: run(one, folder) for one in ("lora", "datasets")}
    processes = workers_for(arguments.rows)
    print(
        f"{arguments.rows:,} rows, {results['lora']['tokens']:,} tokens, {processes} processes, {os.cpu_count()} cores"
    )
    for name, result in results.items():
        rate = arguments.rows / result["seconds"]
        memory = result["memory_bytes"] / 2**20
        worker = result["worker_bytes"] / 2**20
        print(
            f"  {name:<9}{rate:>9,.0f} rows/s  {result['seconds']:>7.1f} s  {memory:>7.0f} MiB, {worker:.0f} a worker"
        )
    print(f"  again    {results['lora']['again_seconds']:.2f} s from lora's cache")
    print(f"  ratio    {results['datasets']['seconds'] / results['lora']['seconds']:.2f}")
    assert results["lora"]["tokens"] == results["datasets"]["tokens"], "both must tokenize the same text"


def make_rows(path: Path, count: int) -> None:
    """Conversations of one question and one answer, of about ten words each."""
    random = Random(0)
    with path.open("w") as file:
        for number in range(count):
            asked, said = (" ".join(random.choices(WORDS, k=random.randint(4, 16))) for _ in range(2))
            turns = [{"role": "user", "content": f"{number}: {asked}"}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with ChatML, trained here."""
    from make_tiny_gpt2 import build_tiny_gpt2

    build_tiny_gpt2(folder, n_embd=8, n_layer=1, n_head=1, n_positions=64)


def run(which: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", which, "--folder", str(folder)]
    environment = {**os.environ, "LORA_CACHE_DIR": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def tokenize_with_lora(folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from lora_cli.config import DataConfig
    from lora_cli.data.loading import load_examples

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = DataConfig.model_validate({"train": str(folder / "rows.jsonl")})
    before, start = peak_bytes(), time.perf_counter()
    examples, _ = load_examples(data, tokenizer, frozenset({tokenizer.eos_token_id}), seed=1)
    seconds, memory = time.perf_counter() - start, peak_bytes() - before
    start = time.perf_counter()
    load_examples(data, tokenizer, frozenset({tokenizer.eos_token_id}), seed=1)
    again = time.perf_counter() - start
    tokens = examples.account.num_tokens
    return {
        "seconds": seconds,
        "again_seconds": again,
        "memory_bytes": memory,
        "worker_bytes": worker_bytes(),
        "tokens": tokens,
    }


def tokenize_with_datasets(folder: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokenized(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    before, start = peak_bytes(), time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    processes = workers_for(len(rows))
    options = {"num_proc": processes} if processes > 1 else {}
    table = rows.map(tokenized, batched=True, batch_size=BATCH, remove_columns=["messages"], **options)
    seconds, memory = time.perf_counter() - start, peak_bytes() - before
    tokens = sum(len(ids) for ids in table["input_ids"])
    return {"seconds": seconds, "memory_bytes": memory, "worker_bytes": worker_bytes(), "tokens": tokens}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker_bytes() -> int:
    """Of the largest child that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
