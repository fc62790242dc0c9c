"""Libraries' workspaces and kernels' own memory: when they come, and that it doesn't matter what was traced before."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from lora_cli.engine.memory import scratch
from lora_cli.engine.memory.scratch import Scratch, register_bitsandbytes, workspace_bytes
from lora_cli.engine.memory.tracer import Tracer
from lora_cli.engine.target import CPU, Target

KIB, MIB = 2**10, 2**20
T4 = Target("cuda", (7, 5))


@pytest.mark.parametrize(
    ("capability", "size"), [((7, 5), 8320 * KIB), ((8, 9), 8320 * KIB), ((9, 0), 32 * MIB), ((12, 0), 32 * MIB)]
)
def test_cublas_workspace_by_architecture(capability: tuple[int, int], size: int) -> None:
    assert workspace_bytes(Target("cuda", capability)) == size


def test_bitsandbytes_is_known_to_a_scratch_that_was_made_before_it() -> None:
    with mock.patch.dict(scratch._PARTS_ON_CUDA, clear=True):
        made_before = Scratch(T4)
        register_bitsandbytes()
        assert made_before.parts(torch.ops.bitsandbytes.gemm_4bit.default) is not None
        assert Scratch(CPU).parts(torch.ops.bitsandbytes.gemm_4bit.default) is None


def test_each_thread_takes_a_workspace_with_its_first_product() -> None:
    left = torch.empty(64, 64, device="meta", requires_grad=True)
    bias = torch.empty(64, device="meta")
    with Tracer("meta", T4) as tracer:
        tracer.begin("forward")
        product = left @ left
        sizes = [birth.size_bytes for birth in tracer.trace.births]
        assert sizes == [64 * 64 * 4, 8320 * KIB], "born with the first product, after its output"
        torch.addmm(bias, product, left)
        assert tracer.trace.births[-1].size_bytes == MIB, "cuBLASLt's, for a product with a bias"
        torch.addmm(bias, product, left)
        product.sum().backward()
    workspaces = [birth for birth in tracer.trace.births if birth.kind == "workspace"]
    assert [birth.phase for birth in workspaces] == ["forward", "forward", "backward"]
    assert not [event for event in tracer.trace.events if event < 0 and tracer.trace.births[-event - 1] in workspaces]
