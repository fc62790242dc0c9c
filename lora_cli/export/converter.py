"""llama.cpp's own converter, for architectures and tokenizers that aren't known here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lora_cli.errors import ModelError

_NAME = "convert_hf_to_gguf.py"


def find_converter() -> Path | None:
    """The converter in LLAMA_CPP_DIR or on the PATH, if it is there."""
    folder = os.environ.get("LLAMA_CPP_DIR")
    if folder and (Path(folder).expanduser() / _NAME).is_file():
        return Path(folder).expanduser() / _NAME
    found = shutil.which(_NAME)
    return Path(found) if found else None


def convert(converter: Path, folder: Path, path: Path, type_name: str) -> None:
    """The model in `folder` as a GGUF file at `path`.

    Raises:
        ModelError: the converter gave up; with its last words.
    """
    command = [sys.executable, str(converter), str(folder), "--outfile", str(path), "--outtype", type_name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ModelError(f"{converter} failed: {said[-1] if said else f'exit code {done.returncode}'}")
