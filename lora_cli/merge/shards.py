"""Safetensors files byte by byte: what tensors they hold and where, read one at a time, written in one pass.

A shard is read front to back and never mapped, so that memory is one tensor, and a tensor that stays as it is never
becomes one at all: the kernel copies its bytes from file to file. Knows nothing about models.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import ModelError, UserError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses larger ones, too."""
_FLUSH_EVERY = 128 * 2**20
"""Bytes after which a flush begins, so that the last one finds little left to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        tensor = torch.empty(self.num_bytes, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            _read_into(file, tensor.numpy().data, self.file)
        return tensor.view(self.dtype).view(self.shape)

    def announce(self) -> None:
        """Let the system read ahead."""
        with open(self.file, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.offset, self.num_bytes, os.POSIX_FADV_WILLNEED)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order in which they lie.

    Raises:
        ModelError: the file is cut short, or isn't safetensors.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise ModelError(f"{file.absolute()} is no safetensors file, or is cut short ({size:,} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file.absolute()}: its header can't be read: {error}") from error
    end = max((tensor.offset + tensor.num_bytes for tensor in found), default=8 + length)
    if end != size:
        raise ModelError(
            f"{file.absolute()} has {size:,} bytes; its header promises {end:,}",
            remedy="Copy or download it again; nothing was written.",
        )
    return sorted(found, key=lambda tensor: (tensor.offset, tensor.name))


def _stored(file: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if end - start != byte_size(dtype, shape) or start < 0:
        raise ValueError(f"{name} has {end - start} bytes for {entry['dtype']} {list(shape)}")
    return StoredTensor(name, dtype, shape, file, data_start + start, end - start)


def byte_size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return byte_size(self.dtype, self.shape)


class ShardWriter:
    """One safetensors file, written front to back: the header first, as every size is known, then its tensors."""

    def __init__(self, path: Path, slots: Iterable[Slot], flush: Callable[[int], None]) -> None:
        """`flush` is given the file's descriptor now and then, to begin writing out what was written so far."""
        self.path = path
        self._slots = list(slots)
        self._next = 0
        self._flush = flush
        self._unflushed = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for slot in self._slots:
            end = offset + slot.num_bytes
            header[slot.name] = {
                "dtype": _NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # what follows stays aligned
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - it outlives this function
        self._write(struct.pack("<Q", len(text)) + text)

    def close(self) -> None:
        """Flush and close the file; every tensor is in it."""
        assert self._next == len(self._slots), f"{len(self._slots) - self._next} tensors were never written"
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise explain(error, self.path) from error
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file as it is; it will be thrown away."""
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        slot = self._take(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (slot.dtype, slot.shape), f"{name} is not as planned"
        if slot.num_bytes:
            self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def copy(self, source: StoredTensor) -> None:
        """The next tensor, byte for byte from another file."""
        slot = self._take(source.name)
        assert (source.dtype, source.shape) == (slot.dtype, slot.shape), f"{source.name} is not as planned"
        left, offset = source.num_bytes, source.offset
        with open(source.file, "rb", buffering=0) as file:
            while left:
                try:
                    count = os.sendfile(self._file.fileno(), file.fileno(), offset, min(left, _FLUSH_EVERY))
                except OSError as error:
                    raise explain(error, self.path) from error
                if count == 0:
                    raise _cut_short(source.file)
                left, offset = left - count, offset + count
                self._written(count)

    def _take(self, name: str) -> Slot:
        slot = self._slots[self._next]
        assert slot.name == name, f"{name} was written where {slot.name} belongs"
        self._next += 1
        return slot

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                count = self._file.write(view[:_FLUSH_EVERY])
            except OSError as error:
                raise explain(error, self.path) from error
            view = view[count:]
            self._written(count or 0)

    def _written(self, count: int) -> None:
        self._unflushed += count
        if self._unflushed >= _FLUSH_EVERY:
            self._flush(self._file.fileno())
            self._unflushed = 0


def explain(error: OSError, path: Path) -> UserError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full: {path.parent.absolute()}",
            remedy="Nothing is left under the name asked for. Free some space, or give another --output.",
        )
    return UserError(f"{path.absolute()} can't be written: {error.strerror}")


def _read_into(file: Any, view: memoryview, path: Path) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise _cut_short(path)
        view = view[count:]


def _cut_short(path: Path) -> ModelError:
    return ModelError(f"{path.absolute()} was cut short while it was read")
