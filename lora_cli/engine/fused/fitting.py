"""Which modules of a model the fused arithmetic fits, by what they are made of, and putting it in their place.

A module that looks right may still compute something else (Gemma's norms add one to their weight, Granite scales its
residuals), so what fits is tried on a small copy before it is used: `engine.selftest`. A module's own code stays where
it is and runs whenever a call asks for more: evaluation, generation with a cache, a disabled or merged adapter, a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

from lora_cli.engine.fused import card
from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.gated import GatedBlock
from lora_cli.engine.fused.layer import DecoderLayer, FusedLayer, Norm
from lora_cli.engine.fused.linear import Adapted, LoraLinear
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.fused.native.layer import NativeLayer, takes
from lora_cli.engine.fused.pointwise import GELU_TANH, SILU, Activation

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from peft.tuners.lora.layer import Linear as PeftLinear

    from lora_cli.config import QuantizationConfig
    from lora_cli.engine.target import Target

Fusion = Literal["native", "layers", "linears"]
"""`layers`: whole decoder layers, and adapted linear layers outside of them. `native`: the same on compiled kernels.
`linears`: adapted linear layers alone."""

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": card.DTYPES}
_PEFT_4BIT = ("Linear4bit", "peft.tuners.lora.bnb")
_LINEAR_4BIT = ("Linear4bit", "bitsandbytes.nn.modules")
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


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


def plain_lora(module: nn.Module) -> PeftLinear | None:
    """The module as PEFT's plain LoRA around a frozen linear layer, with one adapter in use; None for anything else.

    DoRA and other variants, dropout, a trained bias, 8-bit bases, Conv1D: PEFT's own code runs them.
    """
    if not _is_lora(module) or not _is_linear(module.base_layer) or module.fan_in_fan_out:
        return None
    if len(module.lora_A) != 1 or len(module.active_adapters) != 1 or module.active_adapters[0] not in module.lora_A:
        return None
    name = module.active_adapters[0]
    if module.lora_variant.get(name) is not None or not isinstance(module.lora_dropout[name], nn.Identity):
        return None
    if type(module.lora_A[name]) is not nn.Linear or module.lora_B[name].bias is not None:
        return None
    if any(p.requires_grad for p in module.base_layer.parameters()):
        return None
    return module


def _adapted(module: nn.Module) -> Adapted | None:
    """The layer's parts at this moment, adapted or frozen and plain; None when it is something else."""
    lora = plain_lora(module)
    if lora is not None:
        if lora.disable_adapters or lora.merged:
            return None
        name = lora.active_adapters[0]
        base = cast(nn.Linear, lora.base_layer)
        a, b = cast(nn.Linear, lora.lora_A[name]), cast(nn.Linear, lora.lora_B[name])
        return Adapted(base.weight, base.bias, a.weight, b.weight, float(lora.scaling[name]), _state(base))
    if _is_linear(module) and not any(p.requires_grad for p in module.parameters()):
        return Adapted(module.weight, module.bias, None, None, state=_state(module))
    return None


def _is_lora(module: nn.Module) -> TypeGuard[PeftLinear]:
    from peft.tuners.lora.layer import Linear as PeftLinear

    return type(module) is PeftLinear or (type(module).__name__, type(module).__module__) == _PEFT_4BIT


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """PyTorch's, or bitsandbytes' for 4 bits with its weight quantized; by name, so that it needn't be there."""
    if type(module) is nn.Linear:
        return True
    return (type(module).__name__, type(module).__module__) == _LINEAR_4BIT and _state(module) is not None


def _state(linear: nn.Module) -> QuantState | None:
    """bitsandbytes' account of the layer's weight, if it is packed."""
    found: QuantState | None = vars(cast(nn.Linear, linear).weight).get("quant_state")
    return found


def layer_of(module: nn.Module) -> DecoderLayer | None:
    """The module's parts at this moment when it is made as Llama's decoder layers are; None for anything else."""
    children = dict(module.named_children())
    if children.keys() != _LAYER:
        return None
    attention, mlp = dict(children["self_attn"].named_children()), dict(children["mlp"].named_children())
    if attention.keys() != _ATTENTION or mlp.keys() != _MLP:
        return None
    linears = {name: _adapted(part) for name, part in (*attention.items(), *mlp.items()) if name != "act_fn"}
    norms = [norm_of(children["input_layernorm"]), norm_of(children["post_attention_layernorm"])]
    activation = _activation(mlp["act_fn"])
    settings = vars(children["self_attn"])
    size, scale = settings.get("head_dim"), settings.get("scaling")
    if activation is None or None in norms or None in linears.values():
        return None
    if not isinstance(size, int) or not isinstance(scale, float) or settings.get("attention_dropout"):
        return None
    found = cast(dict[str, Adapted], linears)
    first, second = cast(list[Norm], norms)
    return DecoderLayer(
        attention_norm=first,
        query=found["q_proj"],
        key=found["k_proj"],
        value=found["v_proj"],
        output=found["o_proj"],
        block_norm=second,
        block=GatedBlock(found["gate_proj"], found["up_proj"], found["down_proj"], activation),
        head_size=size,
        scale=scale,
    )


def norm_of(module: nn.Module) -> Norm | None:
    """An RMS norm with one frozen weight, whatever its class is called."""
    parameters = dict(module.named_parameters())
    eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
    if parameters.keys() != {"weight"} or not isinstance(eps, float) or parameters["weight"].requires_grad:
        return None
    return Norm(parameters["weight"], eps)


def _activation(module: nn.Module) -> Activation | None:
    from transformers.activations import GELUTanh, SiLUActivation

    if isinstance(module, nn.SiLU | SiLUActivation):
        return SILU
    return GELU_TANH if isinstance(module, GELUTanh) else None


def _layer_forward(
    module: nn.Module, own: Callable[..., Any], hidden_states: Tensor, *args: Any, recompute: bool, **kwargs: Any
) -> Any:
    layer = layer_of(module)
    call = None if layer is None else plain_call(module, layer, hidden_states, args, kwargs)
    if layer is None or call is None:
        if recompute and module.training:
            return cast(Any, module)._gradient_checkpointing_func(partial(own, **kwargs), hidden_states, *args)
        return own(hidden_states, *args, **kwargs)
    with torch.autocast(hidden_states.device.type, enabled=False):
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
        out: Tensor = NativeLayer.apply(hidden_1TM.squeeze(0), layer, *call, *layer.trained)  # type: ignore[no-untyped-call]
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
    return cos[0].contiguous(), sin[0].contiguous(), Documents(lengths, kwargs.get("cu_seq_lens_q"))


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
    layer = _adapted(module) if plain else None
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
