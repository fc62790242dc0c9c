"""The C of this folder as a shared library, compiled at first use and kept in the cache folder.

A library is named by a hash of the sources, the compiler, its version and flags, and the processor, so that a home
folder that several machines share holds one for each. It is written under a temporary name and renamed when complete:
of two processes that start at once, both compile and either's is good. Silent: whatever fails, there is no library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from lora_cli.data.cache import cache_folder

HERE = Path(__file__).parent
SOURCES = ("pointwise.c", "attention.c", "strips.c", "tiles.c", "tiles_back.c", "layer.c", "head.c")
HEADERS = (
    *("vectors.h", "rows.h", "pieces.h", "blocks.h", "strips.h", "tiles.h", "planes.h", "powers.h", "slopes.h"),
    *("panels.h", "packing.h", "group.h", "pass.h"),
)
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-fvisibility=hidden")
WIDE = "-mprefer-vector-width=512"
"""Only for x86-64."""
_SECONDS = 120
"""No compiler takes that long unless something is wrong."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, compiled if need be; None where it can't be had. PyTorch is loaded first: its OpenMP is used."""
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        place = cache_folder().parent / "native" / f"{_key(compiler)}.so"
        if not place.is_file():
            _compile(compiler, place)
        return _load(place)
    except (OSError, subprocess.SubprocessError):
        return None


def _compiler() -> str | None:
    """The C compiler, `CC` first; what isn't GCC fails on its vector extensions. Linux alone: elsewhere OpenMP comes in
    other ways."""
    if sys.platform != "linux":
        return None
    names = (os.environ.get("CC", ""), "cc", "gcc")
    return next((found for name in names if name and (found := shutil.which(name)) is not None), None)


def _flags() -> tuple[str, ...]:
    return (*FLAGS, WIDE) if platform.machine() in ("x86_64", "AMD64") else FLAGS


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
    texts = [(HERE / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    texts += [version, " ".join(_flags()).encode(), _processor()]
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:24]


def _processor() -> bytes:
    """What the processor can do: its flags, as Linux lists them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = [line for line in lines if line.split("\t")[0] in ("flags", "Features", "model name")]
    return "\n".join(sorted(set(flags))).encode()


def _compile(compiler: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".compiling-") as folder:
        made = Path(folder) / place.name
        sources = [str(HERE / name) for name in SOURCES]
        command = [compiler, *_flags(), "-shared", "-o", str(made), *sources, "-lm"]
        subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True, cwd=folder)
        os.replace(made, place)


def _load(place: Path) -> ctypes.CDLL | None:
    """The library, if it shares PyTorch's threads: a second OpenMP would fight with it for the same cores."""
    import torch  # noqa: F401 - brings its OpenMP along, under the name that the library asks for

    before = _runtimes()
    found = ctypes.CDLL(str(place))
    return found if _runtimes() == before else None


def _runtimes() -> set[str]:
    """The OpenMP libraries in this process."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {path for path in paths if any(name in path.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp"))}
