"""Proofs at start-up, on a small random copy of the model: does it pack, is the chunked loss the model's own, and
does the fused arithmetic compute what the layers compute?

Packing is proven twice: replacing the first document of a row leaves the second one's logits where they were, and
packed logits equal those of the document alone under the model's own attention (wrong positions show only there).
The loss is proven against transformers' own, with the gradients of everything that is trained, and so is the fused
arithmetic against the modules' own code. A model that fails runs the next best way, and the reason is kept.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from lora_cli.config import AdapterConfig, Config, QuantizationConfig
from lora_cli.engine import attention
from lora_cli.engine.batch import FlatBatch, flatten
from lora_cli.engine.computation import Computation, Packing
from lora_cli.engine.distance import distance
from lora_cli.engine.fused import flash4
from lora_cli.engine.fused.fitting import Fusion, fits_target, fuse
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.fused.native.proof import Sizes, holds
from lora_cli.engine.head import NoHead
from lora_cli.engine.miniature import NoMiniature, miniature
from lora_cli.engine.target import Target
from lora_cli.errors import ModelError
from lora_cli.model.adapter import attach_adapter
from lora_cli.model.dtypes import resolve_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-5
"""Relative. Another pack differs by 5e-7 in float32; the smallest real leak that was seen is 3.5e-4."""

UNKNOWN = float("nan")
"""What couldn't be measured."""

_LENGTHS = (11, 9, 14)


@dataclass(frozen=True)
class Proof:
    """What was proven of a model, and how it will run."""

    packing: Packing
    loss: Literal["chunked", "full"]
    attention: str
    """The model's own attention in transformers' names."""
    notes: tuple[str, ...]
    """Why something runs the slower way."""
    leak: float
    """Largest relative change of a document's logits when the one before it is replaced, in the packing that runs;
    where none could be proven, in the one that came last."""
    difference: float
    """Largest relative difference between packed logits and those of a document alone, as `leak`."""
    loss_error: float
    """Relative difference between the chunked loss and transformers' own, or between their gradients."""
    fusion: Fusion | None = None
    """What the fused arithmetic fits, and whether on compiled kernels; `fusion_on` says where it runs."""
    flash4: bool = False
    """Whether FlashAttention 4's kernels are installed and right on this card."""

    def fusion_on(self, target: Target, dtype: torch.dtype, quantization: QuantizationConfig | None) -> Fusion | None:
        """What of it runs in this dtype on a CPU or card."""
        if not fits_target(target, dtype, quantization):
            return None
        return "layers" if self.fusion == "native" and target.kind != "cpu" else self.fusion


def prove(
    config: PretrainedConfig,
    adapter: AdapterConfig | None,
    *,
    attn_implementation: str = "auto",
    wanted_loss: Literal["chunked", "full"] = "chunked",
    fused: bool = True,
    native: torch.dtype | None = None,
) -> Proof:
    """Find the best way to run a model that can be proven right.

    Args:
        native: try compiled kernels as well, for training in this dtype; the first time, they are compiled.
    """
    try:
        with _quiet():
            model = miniature(config)
            own = attn_implementation if attn_implementation not in ("auto", "documents") else _own_attention(model)
    except (NoMiniature, ModelError) as error:
        note = f"no small copy to prove packing on ({error}): one document per row, full loss"
        return Proof("single", "full", _auto(attn_implementation), (note,), UNKNOWN, UNKNOWN, UNKNOWN)
    with _quiet():
        proof = _prove_packing(model, own, attn_implementation)
        proof = _prove_loss(model, adapter, proof, wanted_loss)
        if not fused or adapter is None:
            return proof
        return replace(proof, fusion=_prove_fusion(model, proof, native if _kernels_hold(config, native) else None))


def prove_run(config: Config, architecture: PretrainedConfig, device: torch.device | None = None) -> Proof:
    """`prove` with what a config says of adapter, attention and loss, for training on `device`, where there is one."""
    on_cpu = device is not None and device.type == "cpu" and config.model.quantization is None
    proof = prove(
        architecture,
        config.adapter,
        attn_implementation=config.model.attn_implementation,
        wanted_loss=config.train.loss,
        fused=config.train.fused,
        native=resolve_dtype(config.model.dtype, device) if device is not None and on_cpu else None,
    )
    asked = config.train.flash_attention_4 and proof.packing == "documents"
    on_card = device is not None and device.type == "cuda" and flash4.installed()
    if device is None or not asked or not on_card:
        return proof
    return _prove_flash4(proof, architecture, resolve_dtype(config.model.dtype, device), device)


def _prove_flash4(proof: Proof, architecture: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Proof:
    """Whether FlashAttention 4 is right on this card at the model's sizes; of others nothing is said."""
    sizes = Sizes.of(architecture)
    if sizes is None or not flash4.takes(sizes.head, dtype, device):
        return proof
    window = getattr(architecture.get_text_config(), "sliding_window", None)
    wrong = flash4.prove(flash4.Heads(sizes.query_heads, sizes.key_heads, sizes.head, window), dtype, device)
    if wrong is None:
        return replace(proof, flash4=True)
    return replace(proof, notes=(*proof.notes, f"PyTorch's attention kernels: flash-attn-4 is installed, but {wrong}"))


def _auto(name: str) -> str:
    return "sdpa" if name in ("auto", "documents") else name


def _own_attention(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


def _prove_packing(model: PreTrainedModel, own: str, wanted: str) -> Proof:
    packings: tuple[Packing, ...] = ("documents", "mask") if wanted in ("auto", "documents") else ("mask",)
    if own.startswith("flash"):  # its kernels run on CUDA alone; tests/gpu tries them
        return Proof("mask", "chunked", own, (), UNKNOWN, UNKNOWN, UNKNOWN)
    try:
        alone = Computation("single", "full", torch.float32, own)
        expected = torch.cat([_logits(model, alone, [document]) for document in _documents(0)])
    except Exception as error:
        note = f"its own forward failed on a small copy: {_line(error)}"
        return Proof("single", "full", own, (note,), UNKNOWN, UNKNOWN, UNKNOWN)
    failures: dict[str, str] = {}
    leak = difference = UNKNOWN
    for packing in packings:
        computation = Computation(packing, "full", torch.float32, own)
        try:
            packed = _logits(model, computation, _documents(0))
            replaced = _logits(model, computation, [_documents(1)[0], *_documents(0)[1:]])
        except Exception as error:  # an architecture's own code may fail in any way on a packed row
            failures[packing] = _line(error)
            continue
        first = _LENGTHS[0]
        leak = distance(packed[first:], replaced[first:])
        difference = distance(packed, expected)
        if leak <= TOLERANCE and difference <= TOLERANCE:
            reasons = (f"packs under a block-diagonal mask: {failures['documents']}",) if failures else ()
            return Proof(packing, "chunked", own, reasons, leak, difference, UNKNOWN)
        failures[packing] = "documents see each other" if leak > TOLERANCE else "its layers mask more than documents"
    different = len(set(failures.values())) > 1
    why = "; ".join(f"by {way}, {reason}" for way, reason in failures.items()) if different else failures["mask"]
    return Proof("single", "chunked", own, (f"one document per row: {why}",), leak, difference, UNKNOWN)


def _prove_loss(
    model: PreTrainedModel, adapter: AdapterConfig | None, proof: Proof, wanted: Literal["chunked", "full"]
) -> Proof:
    if wanted == "full" or proof.loss == "full":
        return replace(proof, loss="full")
    trained = _with_random_adapter(model, adapter)
    own = "eager" if proof.attention.startswith("flash") else proof.attention  # the loss is the same under any
    computation = Computation(proof.packing, "full", torch.float32, own)
    batch = _batch(_documents(0)[:1] if proof.packing == "single" else _documents(0))
    try:
        computation.prepare(model)
        full = _loss_and_gradient(model, trained, computation, batch)
    except Exception as error:  # nothing to compare with: the model runs as plainly as it can
        note = f"one document per row, full loss: its own loss failed on a small copy: {_line(error)}"
        return replace(proof, packing="single", loss="full", notes=(*proof.notes, note))
    try:
        chunked = _loss_and_gradient(model, trained, replace(computation, loss="chunked"), batch)
    except Exception as error:
        return replace(proof, loss="full", notes=(*proof.notes, f"full loss, {_line(error)}"))
    # Apart from each other: the loss is a sum over tokens, and next to it every gradient would look small.
    apart = max(distance(one, other) for one, other in zip(chunked, full, strict=True))
    if apart <= TOLERANCE:
        return replace(proof, loss="chunked", loss_error=apart)
    note = f"full loss, the chunked one differs by {apart:.1e}"
    return replace(proof, loss="full", notes=(*proof.notes, note), loss_error=apart)


def _kernels_hold(config: PretrainedConfig, native: torch.dtype | None) -> bool:
    """Whether there are compiled kernels, right at the model's sizes."""
    sizes = None if native is None else Sizes.of(config)
    return native is not None and sizes is not None and kernels.available() and holds(sizes, native)


def _prove_fusion(model: PreTrainedModel, proof: Proof, native: torch.dtype | None) -> Fusion | None:
    """The most of the fused arithmetic that gives the loss and the gradients of the modules' own code.

    `model` is the copy with its random adapter. What doesn't hold is no slower than without it, and needs no note.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    own = "eager" if proof.attention.startswith("flash") else proof.attention
    computation = Computation(proof.packing, proof.loss, torch.float32, own)
    batch = _batch(_documents(0)[:1] if proof.packing == "single" else _documents(0))
    ways: tuple[Fusion, ...] = ("native", "layers", "linears") if native is not None else ("layers", "linears")
    if proof.packing != "documents":
        ways = ("linears",)
    model.train()  # the fused arithmetic steps aside in evaluation
    try:
        computation.prepare(model)
        expected = _loss_and_gradient(model, trained, computation, batch)
        for fusion in ways:
            if not fuse(model, fusion):
                continue
            found = _loss_and_gradient(model, trained, replace(computation, fusion=fusion), batch)
            if max(distance(one, other) for one, other in zip(found, expected, strict=True)) > TOLERANCE:
                continue
            if fusion != "native" or native == torch.float32 or _holds_in(native, model, computation, batch, expected):
                return fusion
    except Exception:  # an architecture's own code may fail in any way, the fused arithmetic on what it didn't expect
        return None
    finally:
        fuse(model, None)
        model.eval()
    return None


def _holds_in(
    dtype: torch.dtype | None,
    model: PreTrainedModel,
    computation: Computation,
    batch: FlatBatch,
    expected: tuple[Tensor, Tensor],
) -> bool:
    """Whether compiled kernels in 16 bits are about as near to float32's loss and gradient as the modules' own code."""
    if dtype is None:
        return False
    narrow = copy.deepcopy(model)
    for parameter in narrow.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    trained = [p for p in narrow.parameters() if p.requires_grad]
    apart = []
    for fusion in (None, "native"):
        way = replace(computation, dtype=dtype, fusion=fusion)
        way.prepare(narrow)
        found = _loss_and_gradient(narrow, trained, way, batch)
        apart.append([float((f.float() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)])
    return all(ours <= 2 * own + 0.01 for own, ours in zip(*apart, strict=True))


def _with_random_adapter(model: PreTrainedModel, adapter: AdapterConfig | None) -> list[torch.nn.Parameter]:
    """What will be trained, with no adapter matrix left at zero: a zero B hides every gradient of A."""
    if adapter is None:
        return list(model.requires_grad_(True).parameters())
    model.requires_grad_(False)
    # Some settings speak of layers that the copy doesn't have.
    plain = adapter.model_copy(update={"layers_to_transform": None, "path": None})
    try:
        attached = attach_adapter(model, plain, seed=0)
    except ModelError:  # the copy names its layers as the model does, but may be too short for an expression
        return list(model.requires_grad_(True).parameters())
    trained = [p for p in attached.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return trained


def _loss_and_gradient(
    model: PreTrainedModel, trained: list[torch.nn.Parameter], computation: Computation, batch: FlatBatch
) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient as one vector."""
    total = computation.loss_sum(model, batch)
    grads = torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
    return total.detach(), torch.cat([grad.flatten() for grad in grads])


def _logits(model: PreTrainedModel, computation: Computation, documents: list[np.ndarray]) -> Tensor:
    """[T, V] logits of documents in one row."""
    computation.prepare(model)
    batch = _batch(documents)
    extra = attention.boundaries(batch) if computation.packing == "documents" else {}
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False, **extra
        ).logits[0]
    return logits


def _documents(seed: int) -> list[np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(seed))
    return [draw.integers(3, 60, length) for length in _LENGTHS]


def _batch(documents: list[np.ndarray]) -> FlatBatch:
    return flatten(documents, [np.ones(len(d), dtype=bool) for d in documents], torch.device("cpu"))


def _line(error: Exception) -> str:
    known = isinstance(error, attention.UnsupportedAttention | NoHead)
    text = str(error).splitlines()[0] if str(error) else ""
    return text if known else f"{type(error).__name__}: {text}"[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that building and trying a copy gives; they speak of the copy."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
