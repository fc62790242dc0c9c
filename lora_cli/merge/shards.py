"""Safetensors files byte by byte: what tensors they hold and where, read in parts, written to places known beforehand.

A shard is never mapped, so that memory is what is being worked on, and a tensor that stays as it is never becomes one
at all: the kernel copies its bytes from file to file. Knows nothing about models.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
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
_CHUNK = 32 * 2**20
"""Bytes that the kernel copies at a time."""
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What it says where it can't: from one file system to another, on an old kernel, on some network drives."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def packed(self) -> bool:
        """Whether its bytes are something else than its numbers."""
        return False

    @property
    def read_dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return self.dtype

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        tensor = torch.empty(self.num_bytes, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            self.read_bytes(file.fileno(), 0, tensor)
        return tensor.view(self.dtype).view(self.shape)

    def read_bytes(self, descriptor: int, start: int, into: Tensor) -> None:
        """Its bytes from `start` on, from its open file into a flat uint8 tensor."""
        view = into.numpy().data
        offset = self.offset + start
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise _cut_short(self.file)
            view, offset = view[count:], offset + count

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


class ShardFile:
    """One safetensors file that is filled in any order: as every size is known, so is every place.

    Several threads may write at a time, each to places of its own.
    """

    def __init__(self, path: Path, slots: Iterable[Slot]) -> None:
        self.path = path
        self._closed = False
        self._places: dict[str, tuple[Slot, int]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for slot in slots:
            end = offset + slot.num_bytes
            header[slot.name] = {"dtype": _NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": [offset, end]}
            self._places[slot.name] = (slot, offset)
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # what follows stays aligned
        self._start = 8 + len(text)
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise explain(error, path) from error
        self._write(struct.pack("<Q", len(text)) + text, 0)

    def write(self, name: str, data: Tensor, at: int = 0) -> int:
        """`data`, contiguous, `at` bytes into a tensor's place; how many bytes that were."""
        slot, offset = self._places[name]
        view = data.view(-1).view(torch.uint8).numpy().data
        assert data.dtype == slot.dtype and at + len(view) <= slot.num_bytes, f"{name} is not as planned"
        self._write(view, self._start + offset + at)
        return len(view)

    def copy(self, source: StoredTensor) -> int:
        """A tensor's place, byte for byte from another file."""
        slot, place = self._places[source.name]
        assert (source.dtype, source.shape) == (slot.dtype, slot.shape), f"{source.name} is not as planned"
        left, offset, place = source.num_bytes, source.offset, self._start + place
        with open(source.file, "rb", buffering=0) as file:
            while left:
                try:
                    count = os.copy_file_range(file.fileno(), self.descriptor, min(left, _CHUNK), offset, place)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise explain(error, self.path) from error
                    data = os.pread(file.fileno(), min(left, _CHUNK), offset)
                    self._write(data, place)
                    count = len(data)
                if count == 0:
                    raise _cut_short(source.file)
                left, offset, place = left - count, offset + count, place + count
        return source.num_bytes

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self.descriptor, view, offset)
            except OSError as error:
                raise explain(error, self.path) from error
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Onto the disk, and closed; once."""
        if self._closed:
            return
        self._closed = True
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise explain(error, self.path) from error
        finally:
            os.close(self.descriptor)


def explain(error: OSError, path: Path) -> UserError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full: {path.parent.absolute()}",
            remedy="Nothing is left under the name asked for. Free some space, or give another --output.",
        )
    return UserError(f"{path.absolute()} can't be written: {error.strerror}")


def _cut_short(path: Path) -> ModelError:
    return ModelError(f"{path.absolute()} was cut short while it was read")
