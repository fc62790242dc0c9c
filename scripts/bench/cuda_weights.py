"""Random bf16 weights, drawn on the card and copied into safetensors files by several threads.

Saving a model of 16 GB by the library's own means takes longer than training it does here.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def drawn_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of this name, on the card if there is one; threads may draw in any order."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0.0, 0.02, generator=generator)


def write_safetensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], weight: Any, shards: int) -> None:
    """bf16 tensors into `shards` files of about one size, a thread for each, through memory maps.

    Args:
        weight: name and shape to a tensor on any device.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    filled = [0] * shards
    for name, shape in sorted(shapes.items(), key=lambda item: -math.prod(item[1])):
        least = filled.index(min(filled))
        groups[least][name] = shape
        filled[least] += 2 * math.prod(shape)
    groups = [group for group in groups if group]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    with ThreadPoolExecutor(len(groups)) as pool:
        done = [
            pool.submit(_write_shard, folder / name, group, weight) for name, group in zip(names, groups, strict=True)
        ]
        for each in done:
            each.result()
    index = {
        "metadata": {"total_size": sum(filled)},
        "weight_map": {name: file for file, group in zip(names, groups, strict=True) for name in group},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], weight: Any) -> None:
    """The format: eight bytes of length, a header of JSON, the tensors."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    mapped = torch.from_file(str(path), shared=True, size=8 + len(text) + end, dtype=torch.uint8)
    body = mapped[8 + len(text) :]
    apart = torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext()
    with apart:  # copies on one stream would wait for each other
        for name, shape in shapes.items():
            begin, past = header[name]["data_offsets"]
            body[begin:past].view(torch.bfloat16).view(shape).copy_(weight(name, shape))
