"""FlashAttention 4 without a card: what a rehearsal sees of it, and when a run would take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from lora_cli.config import Config
from lora_cli.engine.fused import documents, flash4
from lora_cli.engine.fused.documents import Documents, attend, attend_back
from lora_cli.engine.memory.need import Rehearsals
from lora_cli.engine.memory.operations import flops_of
from lora_cli.engine.memory.pretend import pretend
from lora_cli.engine.memory.scratch import Scratch
from lora_cli.engine.selftest import prove_run
from lora_cli.engine.target import Target

HOPPER = Target("cuda", (9, 0))


def rows(tokens: int, heads: int, size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(tokens, heads, size, dtype=dtype, device="meta")


class Called(TorchDispatchMode):
    """Which operators run, and with how much work and scratch memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.flops = 0
        self.scratch: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        self.flops += flops_of(func, args, kwargs or {}, result)
        self.scratch += Scratch(HOPPER).sizes(func, args)
        return result


def both_ways(lengths: tuple[int, ...], *, there: bool, target: Target = HOPPER, size: int = 128) -> Called:
    tokens = sum(lengths)
    query, key = rows(tokens, 8, size), rows(tokens, 2, size)
    starts = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    where = Documents(lengths, starts, flash4=there)
    with pretend(target), Called() as called:
        out, kept = attend(query, key, torch.empty_like(key), where, 1.0)
        grads = attend_back(torch.empty_like(out), out, kept, where, 1.0)
    assert [tuple(t.shape) for t in (out, *grads)] == [(tokens, heads, size) for heads in (8, 8, 2, 2)]
    return called


# Sizes that version 4.0.0b36 asks for in _flash_attn_bwd, on Hopper: tokens, documents, heads, key heads, head size.
ASKED = [
    ((4096, 2, 32, 8, 128), [69_206_016, 540_672, 540_672, 17_825_792, 17_825_792]),
    ((160, 2, 32, 32, 64), [4_194_304, 65_536, 65_536]),
    ((100, 2, 16, 8, 128), [2_097_152, 16_384, 16_384, 1_572_864, 1_572_864]),
    ((6000, 300, 32, 8, 128), [413_138_944, 3_227_648, 3_227_648, 181_927_936, 181_927_936]),
]


@pytest.mark.parametrize(("shape", "asked"), ASKED)
def test_scratch_memory_is_what_the_package_asks_for(shape: tuple[int, ...], asked: list[int]) -> None:
    tokens, documents, heads, keys, size = shape
    query, key, starts = rows(tokens, heads, size), rows(tokens, keys, size), torch.empty(documents + 1, device="meta")
    with pretend(HOPPER):
        assert flash4.scratch_bytes((query, query, key, key, query, None, starts)) == asked


def test_the_same_work_is_counted() -> None:
    lengths = (900, 124)
    old, new = both_ways(lengths, there=False), both_ways(lengths, there=True)
    assert "lora_cli::flash4" in new.names
    assert "lora_cli::flash4_back" in new.names
    assert not any("flash4" in name for name in old.names)
    assert new.flops == old.flops > 0
    assert sum(new.scratch) < sum(old.scratch), "PyTorch's kernel expands keys and values over grouped heads"


@pytest.mark.parametrize(
    ("lengths", "target", "size"),
    [
        ((100, 30, 60), HOPPER, 128),  # short documents: slower
        ((2000,), Target("cuda", (8, 0)), 128),
        ((2000,), Target("cuda", (12, 0)), 128),
        ((2000,), Target("cuda", (10, 0)), 192),
        ((2000,), HOPPER, 68),
    ],
)
def test_pytorchs_kernel_does_what_it_cannot_or_does_slowly(lengths: Any, target: Target, size: int) -> None:
    assert not any("flash4" in name for name in both_ways(lengths, there=True, target=target, size=size).names)


def test_what_it_is_tried_on_is_long_enough() -> None:
    assert flash4.pays(flash4._LENGTHS)  # or PyTorch's kernel would be compared with itself


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        (lambda out: out, None),
        (lambda out: out * 1.1, "its results are "),
        (lambda out: out.index_fill(0, torch.tensor([7]), float("nan")), "its results are inf from those of"),
        (lambda out: out.no_such_thing, "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    ],
)
def test_what_is_wrong_is_said(broken: Any, verdict: str | None) -> None:
    def attend_differently(query: Any, key: Any, value: Any, where: Documents, scale: float) -> Any:
        out, kept = attend(query, key, value, where, scale)
        return (broken(out) if where.flash4 else out), kept

    with mock.patch.object(documents, "attend", attend_differently):
        found = flash4.prove(flash4.Heads(4, 2, 32), torch.float32, torch.device("cpu"))
    assert found == verdict if verdict is None else (found or "").startswith(verdict)


def test_it_is_known_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    assert not flash4.installed(), "as flash-attn 2 leaves it"
    (tmp_path / "flash_attn_4-4.0.0b36.dist-info").mkdir()
    (tmp_path / "flash_attn_4-4.0.0b36.dist-info" / "METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0b36\n")
    assert flash4.installed()


def run_config(**train: Any) -> tuple[Config, LlamaConfig]:
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    architecture = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1)
    written = {
        "model": {"name_or_path": "here", "dtype": "bfloat16"},
        "data": {"train": "rows.jsonl", "max_length": 512},
        "train": {"micro_batch_tokens": 1024, "gradient_checkpointing": False, "activation_offloading": False, **train},
        "output_dir": "run",
    }
    return Config.model_validate(written), architecture


def test_a_rehearsal_sees_what_was_proven() -> None:
    config, architecture = run_config()
    proof = prove_run(config, architecture)
    needs = [Rehearsals(architecture, replace(proof, flash4=one)).need(config, HOPPER) for one in (False, True)]
    operators = [{birth.operator for birth in need.trace.births} for need in needs]
    assert not any("flash4" in name for name in operators[0])
    assert {"lora_cli::flash4", "lora_cli::flash4_back", "lora_cli.flash4_back.default"} <= operators[1]


def on_card(
    config: Config, architecture: LlamaConfig, verdict: str | None, *, installed: bool = True
) -> tuple[Any, Any]:
    """The proof as on a card where the package gives this verdict, and how often it was asked."""
    with (
        mock.patch.object(flash4, "installed", return_value=installed),
        mock.patch.object(flash4, "takes", lambda size, dtype, card: dtype != torch.float32),
        mock.patch.object(flash4, "prove", return_value=verdict) as asked,
    ):
        return prove_run(config, architecture, torch.device("cuda")), asked


def test_a_run_takes_it_where_it_is_right() -> None:
    config, architecture = run_config()
    proof, asked = on_card(config, architecture, None)
    assert proof.flash4
    assert asked.call_args.args[0] == flash4.Heads(4, 1, 64, None)


def test_a_run_says_why_it_does_not() -> None:
    proof, _ = on_card(*run_config(), "its results are wrong")
    assert not proof.flash4
    assert proof.notes[-1] == "PyTorch's attention kernels: flash-attn-4 is installed, but its results are wrong"


def test_nobody_asks_where_it_is_off_or_not_there() -> None:
    off, architecture = run_config(flash_attention_4=False)
    assert not on_card(off, architecture, None)[0].flash4
    assert not on_card(*run_config(), None, installed=False)[0].flash4
    config, _ = run_config()
    single = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    proof, asked = on_card(single, architecture, None)
    assert not proof.flash4
    assert not asked.called
    assert not proof.notes
