"""The lines of a text file, possibly compressed, with an error that names the line when there is one.

Knows bytes and encodings; knows nothing about what the lines mean.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from lora_cli.errors import DataError

_BLOCK_BYTES = 2**16
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

# The first bytes of files that are often given a text file's name.
_SIGNATURES = {
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"BZh": ("compressed with bzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("compressed with xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", ".zst"),
    b"PAR1": ("a Parquet file", ".parquet"),
    b"PK\x03\x04": ("a zip archive", None),
}


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line with its number, from 1, and its newline, so that a missing one can be seen.

    Raises:
        DataError: the file can't be read, is compressed under a plain name, or isn't UTF-8.
    """
    for number, raw in enumerate(raw_lines(path), start=1):
        try:
            # A byte-order mark at the head of the file is not part of its first line.
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path.name}:{number}: not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}",
                remedy=f"Convert the file, as with: iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}",
            ) from error


def raw_lines(path: Path) -> Iterator[bytes]:
    """Every line as bytes, decompressed.

    Raises:
        DataError: the file can't be read, or is compressed under a plain name.
    """
    _refuse_disguised(path)
    number = 0
    try:
        with open_binary(path) as stream:
            for raw in stream:
                number += 1
                yield raw
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(
            f"{path}: can't be read past line {number}: {error}",
            remedy="The file may be half-written or damaged; write it anew.",
        ) from error


def open_binary(path: Path) -> IO[bytes]:
    """The decompressed bytes of a file, by its name's ending."""
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix == ".bz2":
        return cast("IO[bytes]", bz2.open(path, "rb"))
    if path.suffix == ".xz":
        return cast("IO[bytes]", lzma.open(path, "rb"))
    if path.suffix == ".zst":
        return cast("IO[bytes]", io.BufferedReader(_Zstandard(path), _BLOCK_BYTES))
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """A decompressed Zstandard file, which must end where a frame does: the library's own reader takes a cut one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{path}: reading Zstandard needs a package that isn't installed",
                remedy="Install it with: pip install zstandard",
            ) from error
        self._library = zstandard
        self._file = open(path, "rb")  # noqa: SIM115 - closed when this is
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data or self._file.read(_BLOCK_BYTES)
            if self._frame.eof:
                self._frame, self._begun = self._library.ZstdDecompressor().decompressobj(), False
            if not packed:
                if self._begun:
                    raise EOFError("the file ends before its data does")
                return 0
            self._begun = True
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _refuse_disguised(path: Path) -> None:
    if path.suffix in COMPRESSED:
        return
    with open(path, "rb") as stream:
        head = stream.read(8)
    for signature, (what, suffix) in _SIGNATURES.items():
        if head.startswith(signature):
            remedy = f"Name it {path.name}{suffix}." if suffix else "Unpack it first."
            if suffix == ".parquet":
                remedy = f"Name it {path.with_suffix(suffix).name}."
            raise DataError(f"{path}: {what}, although its name says {path.suffix}", remedy=remedy)
