"""A fingerprint of a model's weights, cheap enough to take at every run: names, shapes, and a sample of each shard.

Two checkpoints of one architecture, or two revisions of one model, have different ones; reading all weights would
say no more and take minutes. Knows nothing about what the weights mean.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files in `folder`: sizes, beginnings with the header, samples spread over each."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(file, "rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
