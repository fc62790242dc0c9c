"""The demo: a tiny GPT-2 learns to write dates in ISO 8601, with LoRA and with 4-bit QLoRA.

    make demo

Needs two CPU cores, about two minutes and no network. The base, pre-trained here, repeats whatever it is told; after
fine-tuning it answers "Rent is due on the 3rd of March, 1987." with "1987-03-03". All are asked for 200 dates that none
was trained on. Writes .demo/tiny-gpt2, .demo/lora and .demo/qlora, anew each time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("lora", "qlora")
HELDOUT = Path("scripts/demo/heldout.jsonl")
SHOWN = 4

# Two threads are what the demo promises to need. They don't spin while they wait: where other programs want the
# cores as well, that makes work in small pieces like this several times slower.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    start = time.monotonic()
    os.chdir(ROOT)
    for folder in ("tiny-gpt2", *KINDS):
        shutil.rmtree(Path(".demo", folder), ignore_errors=True)

    run("python scripts/make_tiny_gpt2.py .demo/tiny-gpt2")
    for kind in KINDS:
        run(f"lora train configs/demo-{kind}.yaml")
        run(f"lora eval .demo/{kind} --generate")

    show_answers()
    print(f"\n  {time.monotonic() - start:.0f} s in all")


def run(command: str) -> None:
    """Run a command of this environment as a user would type it; end with its exit code if it fails."""
    print(f"\n$ {command}\n", flush=True)
    program, *arguments = command.split()
    arguments = arguments if program == "python" else ["-m", "lora_cli", *arguments]
    code = subprocess.run([sys.executable, *arguments], env={**os.environ, **THREADS}, check=False).returncode
    if code:
        sys.exit(code)


def show_answers() -> None:
    """What the base and both adapters answered, one under the other, and how often they were right."""
    import pyarrow.parquet as parquet

    tables = {kind: parquet.read_table(f".demo/{kind}/eval/validation/rows.parquet").to_pydict() for kind in KINDS}
    answers = {"base": tables["lora"]["base_answer"], **{kind: tables[kind]["adapter_answer"] for kind in KINDS}}
    heldout = [json.loads(line)["messages"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()]

    for row, (question, _) in enumerate(heldout[:SHOWN]):
        print(f"\n  {'asked':<8} {question['content']}")
        for name, given in answers.items():
            print(f"  {name:<8} {given[row]}")

    print(f"\n  right, of {len(heldout)} held-out dates")
    for name, given in answers.items():
        right = sum(text.strip() == answer["content"] for text, (_, answer) in zip(given, heldout, strict=True))
        print(f"  {name:<8} {right:>3}")


if __name__ == "__main__":
    main()
