"""What a process takes of a card besides PyTorch's allocator: CUDA's context with the kernels that it has loaded.

With lazy loading, CUDA 12's default, it grows with the kernels in use.
"""

from __future__ import annotations

from lora_cli.engine.target import Target

_MIB = 2**20

_MEASURED = {(7, 5): 141 * _MIB, (9, 0): 751 * _MIB}
"""After training steps. Tesla T4, CUDA 12.8 and 13.0, PyTorch 2.10 and 2.14: 140.9 MiB, in 48 published runs (fitcheck
0.3.1). H200, CUDA 13.0, PyTorch 2.11: 750.8 MiB with LoRA, NF4 and in full, alone on the card, of which 526.8 lie there
before the first kernel (docs/measurements/memory-nvidia-h200.json)."""

_ASSUMED = 512 * _MIB
"""Where no training was measured. Above what is reported for a context alone: RTX 3090 256 MiB (PyTorch 2.7, CUDA 12.8;
invoke-ai/InvokeAI issue 9413), RTX 6000 Ada 426 MiB (PyTorch 2.10, CUDA 13.0; unslothai/unsloth-zoo pull request 1053),
"around 400 MB" in general (pytorch/pytorch issue 109888). The kernels that training loads come on top, on the H200 224
MiB of them: so it may be too low."""


def context_bytes(target: Target) -> int:
    if target.kind == "cpu":
        return 0
    return _MEASURED.get(target.capability, _ASSUMED)


def context_measured(target: Target) -> bool:
    return target.kind == "cpu" or target.capability in _MEASURED
