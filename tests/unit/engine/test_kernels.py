"""The Triton kernels without a card: interpreted on a CPU, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds")
HERE = Path(__file__).parent


def test_interpreted_kernels_compute_what_pytorch_does() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_kernels_compile_for_cards() -> None:
    """For an A100, an H100 and a B200, in bfloat16, without any of them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lora_cli.engine.fused import kernels

    values, floats = {"x", "residual", "weight", "normed", "grad", "more", "cos", "sin", "gate", "up", "out"}, {"scale"}
    constants = {"SIZE": 64, "SIZE_2": 256, "ADD": True, "HALF": 64, "HEADS": 32, "GELU": True, "VOCABULARY": 128_256}
    names = ("rms_norm", "rms_norm_again", "rms_norm_back", "rotate", "gated", "gated_back", "cross_entropy")
    names += ("unpack_4_bits",)
    for name in names:
        kernel = getattr(kernels, name)
        known = {"BLOCK": 64 if name == "rotate" else 4096, **constants}
        signature, fixed = {}, {}
        for index, argument in enumerate(kernel.arg_names):
            if argument in known:
                signature[argument], fixed[(index,)] = "constexpr", known[argument]
            elif argument in values or argument == "logits":
                signature[argument] = "*bf16"
            elif argument in floats or argument in ("losses", "code", "code_2", "absmax_2", "offset"):
                signature[argument] = "*fp32"
            else:
                signature[argument] = {
                    "targets": "*i64",
                    "packed": "*u8",
                    "absmax": "*u8",
                    "eps": "fp32",
                    "sign": "fp32",
                }.get(argument, "i32")
        for capability in (80, 90, 100):
            target = GPUTarget("cuda", capability, 32)
            compiled = compile(ASTSource(kernel, signature, fixed), target=target, options={"num_warps": 8})
            assert compiled.asm["cubin"], name
