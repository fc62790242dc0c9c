"""The demo: a tiny GPT-2 learns to write dates in ISO 8601, with LoRA and with 4-bit QLoRA.

    make demo

Needs two CPU cores, a few minutes and no network. The base is pre-trained here and repeats whatever it is told;
after fine-tuning it answers "Rent is due on the 3rd of March, 1987." with "1987-03-03". Both are asked about held-out
dates. Everything is written under .demo and made again by the next run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = Path(".demo/tiny-gpt2")
THREADS = os.environ.get("OMP_NUM_THREADS") or str(min(4, os.cpu_count() or 1))
"""More than a few only get in each other's way on matrices this small."""


def say(text: str) -> None:
    print(f"\n$ {text}\n", flush=True)


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS, "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


def lora(*arguments: str) -> None:
    say(f"lora {' '.join(arguments)}")
    run("-m", "lora_cli", *arguments)


def main() -> None:
    start = time.monotonic()
    shutil.rmtree(ROOT / ".demo", ignore_errors=True)

    say(f"python scripts/make_tiny_gpt2.py {BASE}")
    run("scripts/make_tiny_gpt2.py", str(BASE))
    for kind in ("lora", "qlora"):
        lora("train", f"configs/demo-{kind}.yaml")
        lora("eval", f".demo/{kind}", "--generate")

    print(f"\nAll of it took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
