"""FlashAttention 4 on the card: as near to exact attention as PyTorch's kernel is, with the memory that is foretold."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from lora_cli.config import Config
from lora_cli.engine.fused import flash4
from lora_cli.engine.fused.documents import Documents, attend, attend_back
from lora_cli.engine.selftest import prove_run

CARD = torch.device("cuda")
LENGTHS = (1, 7, 64, 130, 1400, 33)


@pytest.fixture(autouse=True)
def needs_the_package():
    if not flash4.installed():
        pytest.skip("flash-attn-4 is not installed")


def drawn(query, key, size, lengths=LENGTHS, dtype=torch.bfloat16):
    generator = torch.Generator(CARD).manual_seed(1)
    starts = torch.tensor([0, *lengths], device=CARD).cumsum(0).int()
    counts = (query, key, key, query)
    draw = [torch.randn(sum(lengths), n, size, device=CARD, generator=generator).to(dtype) for n in counts]
    return draw, starts


def both_ways(draw, where, scale):
    query, key, value, grad = draw
    out, kept = attend(query, key, value, where, scale)
    return out, *attend_back(grad, out, kept, where, scale)


def exact(draw, lengths, scale, window):
    """Attention and its gradients in float64, document by document."""
    query, key, value = (t.double().requires_grad_() for t in draw[:3])
    groups, start, outputs = query.shape[1] // key.shape[1], 0, []
    for length in lengths:
        q, k, v = (t[start : start + length].transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        row, column = torch.arange(length, device=CARD)[:, None], torch.arange(length, device=CARD)[None]
        hidden = (column > row) | (column <= row - (window or length + 1))
        weights = torch.softmax((q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf")), -1)
        outputs.append((weights @ v).transpose(0, 1))
        start += length
    out = torch.cat(outputs)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), draw[3].double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("query", "key", "size"), [(8, 2, 128), (4, 4, 64), (2, 1, 96)])
def test_it_is_as_exact_as_pytorchs_kernel(query, key, size, window, dtype):
    draw, starts = drawn(query, key, size, dtype=dtype)
    expected = exact(draw, LENGTHS, size**-0.5, window)
    apart = []
    for there in (False, True):
        found = both_ways(draw, Documents(LENGTHS, starts, window, there), size**-0.5)
        apart.append([float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)])
    assert all(new <= 1.2 * old + 1e-4 for old, new in zip(*apart, strict=True)), apart


@pytest.mark.parametrize(("query", "key", "size"), [(32, 8, 128), (16, 16, 64)])
def test_its_memory_is_foretold(query, key, size):
    lengths = (1000, 3000, 96)
    draw, starts = drawn(query, key, size, lengths)
    where = Documents(lengths, starts, flash4=True)
    out, kept = attend(*draw[:3], where, 1.0)
    attend_back(draw[3], out, kept, where, 1.0)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()[
        "requested_bytes.all.current"
    ]  # what was asked for, not what a block leaves over
    torch.cuda.reset_peak_memory_stats()
    grads = attend_back(draw[3], out, kept, where, 1.0)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    results = sum(grad.numel() * grad.element_size() for grad in grads)
    assert taken == results + sum(flash4.scratch_bytes((draw[3], *draw[:3], out, kept[3], starts)))


def test_a_run_takes_it_where_it_is_right_and_says_why_where_not(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture = LlamaConfig(**sizes, vocab_size=99)
    config = Config.model_validate(
        {"model": {"name_or_path": str(tmp_path)}, "adapter": {"r": 4}, "data": {"train": "x.jsonl"}}
        | {"output_dir": str(tmp_path / "run")}
    )
    assert prove_run(config, architecture, CARD).flash4
    off = config.model_copy(update={"train": config.train.model_copy(update={"flash_attention_4": False})})
    assert not prove_run(off, architecture, CARD).flash4

    with mock.patch.object(flash4, "TOLERANCE", -1.0):
        refused = prove_run(config, architecture, CARD)
    assert not refused.flash4
    assert "flash-attn-4 is installed, but its results are" in refused.notes[-1]


def test_its_compiled_kernels_stay_in_the_cache_folder():
    assert flash4.prove(flash4.Heads(4, 2, 64), torch.bfloat16, CARD) is None
    from lora_cli.data.cache import cache_folder

    assert any(path.is_file() for path in Path(cache_folder().parent / "flash4").rglob("*"))
