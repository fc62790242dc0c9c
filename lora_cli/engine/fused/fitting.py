"""Putting the fused arithmetic in the place of modules that it fits, by what they are made of (`parts`).

A module that looks right may still compute something else (Gemma's norms add one to their weight, Granite scales its
residuals), so what fits is tried on a small copy before it is used: `engine.selftest`. A module's own code stays where
it is and runs whenever a call asks for more: evaluation, generation with a cache, a disabled or merged adapter, a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from lora_cli.engine.fused import card
from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.layer import DecoderLayer, FusedLayer
from lora_cli.engine.fused.linear import LoraLinear
from lora_cli.engine.fused.native import kernels, tiled
from lora_cli.engine.fused.native.layer import NativeLayer, takes
from lora_cli.engine.fused.native.tiled import TiledLayer
from lora_cli.engine.fused.parts import adapted, layer_of, plain_lora
from lora_cli.engine.offloading import offloading_of

if TYPE_CHECKING:
    from lora_cli.config import QuantizationConfig
    from lora_cli.engine.target import Target

Fusion = Literal["native", "layers", "linears"]
"""`layers`: whole decoder layers, and adapted linear layers outside of them. `native`: the same on compiled kernels.
`linears`: adapted linear layers alone."""

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": card.DTYPES}


def fuse(model: nn.Module, fusion: Fusion | None) -> int:
    """Put the fused arithmetic in place of what it fits, or with None the modules' own code back; how many it fitted.

    0 with `layers` and `native` when no whole layer fits, whatever its linear layers do.
    """
    for module in model.modules():
        if is_fused_layer(module):
            _hand_back(module)
        elif _is_ours(module):
            del module.forward
    if fusion is None:
        return 0
    fitted, within = 0, set[int]()
    if fusion == "native" and not kernels.available():
        return 0
    if fusion != "linears":
        for module in model.modules():
            if layer_of(module) is not None:
                forward = _native_forward if fusion == "native" else _layer_forward
                _replace(module, forward, recompute=_take_over(module))
                within.update(id(inner) for inner in module.modules())
                fitted += 1
        if not fitted:
            return 0
    for module in model.modules():
        if id(module) not in within and plain_lora(module) is not None:
            _replace(module, _linear_forward)
            fitted += 1
    return fitted


def fits_target(target: Target, dtype: torch.dtype, quantization: QuantizationConfig | None) -> bool:
    """Whether the arithmetic runs in this dtype on a CPU or card, and pays there.

    On a card with Triton from Ampere on, in 16 bits, whose attention kernel it needs; on a CPU, whose products make no
    use of 4 bits, not on quantized weights.
    """
    if dtype not in _DTYPES[target.kind]:
        return False
    if target.kind == "cpu":
        return quantization is None
    here = torch.cuda.is_available()  # where it isn't, this is about another machine
    return target.capability >= (8, 0) and (card.available() or not here)


def _layer_forward(
    module: nn.Module, own: Callable[..., Any], hidden_states: Tensor, *args: Any, recompute: bool, **kwargs: Any
) -> Any:
    layer = layer_of(module)
    call = None if layer is None else plain_call(module, layer, hidden_states, args, kwargs)
    if layer is None or call is None:
        if recompute and module.training:
            return cast(Any, module)._gradient_checkpointing_func(partial(own, **kwargs), hidden_states, *args)
        return own(hidden_states, *args, **kwargs)
    offloading = offloading_of(module) if recompute else None
    kept = nullcontext() if offloading is None else offloading.keeping(hidden_states)
    with kept, torch.autocast(hidden_states.device.type, enabled=False):
        out: Tensor = FusedLayer.apply(hidden_states.squeeze(0), layer, *call, recompute, *layer.trained)  # type: ignore[no-untyped-call]
    return out.unsqueeze(0)


def _native_forward(
    module: nn.Module, own: Callable[..., Any], hidden_states: Tensor, *args: Any, recompute: bool, **kwargs: Any
) -> Any:
    layer = layer_of(module)
    call = None if layer is None else plain_call(module, layer, hidden_states, args, kwargs)
    if layer is None or call is None or not takes(layer, hidden_states, call[2].lengths):
        return _layer_forward(module, own, hidden_states, *args, recompute=recompute, **kwargs)
    run = partial(_run_native, layer=layer, call=call)
    return cast(Any, module)._gradient_checkpointing_func(run, hidden_states) if recompute else run(hidden_states)


def _run_native(hidden_1TM: Tensor, *, layer: DecoderLayer, call: tuple[Tensor, Tensor, Documents]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        kind = TiledLayer if tiled.fits(layer) else NativeLayer
        out: Tensor = kind.apply(hidden_1TM.squeeze(0), layer, *call, *layer.trained)  # type: ignore[no-untyped-call]
    return out.unsqueeze(0)


def _take_over(module: nn.Module) -> bool:
    """Keep transformers from checkpointing the layer, which checkpoints itself; whether it has to.

    Some releases do it around `forward`, which is replaced, others around the call: left to them, a layer would be
    recomputed never or twice.
    """
    asked = bool(vars(module).get("gradient_checkpointing"))
    if asked:
        vars(module)["gradient_checkpointing"] = False
    return asked


def _hand_back(module: nn.Module) -> None:
    if module.__dict__.pop("forward").keywords["recompute"]:
        vars(module)["gradient_checkpointing"] = True


def plain_call(
    module: nn.Module, layer: DecoderLayer, hidden_1TM: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Documents] | None:
    """cos, sin [T, E] and the documents of a training call; None when it asks for more than is fused."""
    lengths, positions = kwargs.get("document_lengths"), kwargs.get("position_embeddings")
    plain = not args and kwargs.get("past_key_values") is None and kwargs.get("attention_mask") is None
    if not (plain and lengths and positions and torch.is_grad_enabled() and module.training):
        return None
    cos, sin = positions
    if not _takes(layer, hidden_1TM, cos) or _window(module) < max(lengths):
        return None
    where = Documents(lengths, kwargs.get("cu_seq_lens_q"), flash4=bool(kwargs.get("flash4")))
    return cos[0].contiguous(), sin[0].contiguous(), where


def _takes(layer: DecoderLayer, hidden_1TM: Tensor, cos_1TE: Tensor) -> bool:
    """Whether everything has one dtype that is multiplied here, and positions turn the whole of each head."""
    dtypes = {linear.dtype for linear in layer.linears} | {hidden_1TM.dtype, cos_1TE.dtype}
    fits = len(dtypes) == 1 and hidden_1TM.dtype in _DTYPES[hidden_1TM.device.type]
    return fits and hidden_1TM.shape[0] == 1 and cos_1TE.shape[-1] == layer.head_size


def _window(module: nn.Module) -> float:
    """The longest document that no sliding window cuts: some keep it with the layer, Mistral in its config."""
    attention = cast(nn.Module, module.self_attn)
    found = [
        vars(attention).get("sliding_window"),
        vars(vars(attention).get("config", attention)).get("sliding_window"),
    ]
    return min((window for window in found if isinstance(window, int)), default=float("inf"))


def _linear_forward(module: nn.Module, own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    plain = torch.is_grad_enabled() and module.training and not args and not kwargs
    layer = adapted(module) if plain else None
    if layer is None or layer.a is None or x.dtype != layer.dtype or x.dtype not in _DTYPES[x.device.type]:
        return own(x, *args, **kwargs)
    with torch.autocast(x.device.type, enabled=False):
        return LoraLinear.apply(x, layer, *layer.trained)  # type: ignore[no-untyped-call]


def _replace(module: nn.Module, forward: Callable[..., Any], **settings: Any) -> None:
    # A partial, so that a copied model calls its own parts.
    module.forward = partial(forward, module, module.forward, **settings)


def is_fused_layer(module: nn.Module) -> bool:
    """Whether the module runs as a whole fused layer wherever it can."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func in (_native_forward, _layer_forward)


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func in (_native_forward, _layer_forward, _linear_forward)
