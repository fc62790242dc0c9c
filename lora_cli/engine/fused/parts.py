"""What a module is made of, at this moment: plain LoRA, frozen linear layers, RMS norms, whole decoder layers.

Modules change while a run goes on: adapters are switched off, merged, exchanged. So a layer is read anew in each pass,
unless nothing that was read has changed since: to see that takes a thirteenth of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lora_cli.engine.fused.gated import GatedBlock
from lora_cli.engine.fused.layer import DecoderLayer, Norm
from lora_cli.engine.fused.linear import Adapted
from lora_cli.engine.fused.pointwise import GELU_TANH, SILU, Activation

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from peft.tuners.lora.layer import Linear as PeftLinear

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PEFT_4BIT = ("Linear4bit", "peft.tuners.lora.bnb")
_LINEAR_4BIT = ("Linear4bit", "bitsandbytes.nn.modules")


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


def adapted(module: nn.Module) -> Adapted | None:
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
    known = _read.get(module)
    if known is not None and known.holds():
        return known.layer
    layer = _layer(module)
    if layer is None:
        _read.pop(module, None)
    else:
        _read[module] = _Reading(layer, list(_places(module)), _frozen(module), _sizes(module))
    return layer


@dataclass(frozen=True, eq=False)
class _Reading:
    """A layer, and what was read to find it."""

    layer: DecoderLayer
    places: list[tuple[dict[str, Any], str, Any]]
    """Dictionary, key, and the object that was there."""
    frozen: list[Tensor]
    """Weights that get no gradient."""
    sizes: list[tuple[Sized, int]]
    """Of children, of each layer's adapters, and of those that are merged into it: none."""

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return (
            all(place.get(key) is value for place, key, value in self.places)
            and not any(tensor.requires_grad for tensor in self.frozen)
            and all(len(found) == size for found, size in self.sizes)
        )


_read: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()
"""By module, as it was last."""
Readings = Mapping[nn.Module, _Reading]
"""By decoder layer, what it was made of."""


def readings(model: nn.Module) -> Readings:
    """What has been read of a model's layers, as far as it still holds."""
    own = set(model.modules())
    return {layer: reading for layer, reading in _read.items() if layer in own and reading.holds()}


def remember(readings: Readings) -> None:
    """Take up what was read before: it is used where it still holds."""
    _read.update(readings)


def _places(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Whatever `_layer` looks at in a layer that it knows: children, parameters, settings."""
    attention, mlp = cast(nn.Module, layer.self_attn), cast(nn.Module, layer.mlp)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    for module in (layer, attention, mlp):
        yield from _all_of(cast(dict[str, Any], module._modules))
    for norm in cast(tuple[nn.Module, ...], norms):
        yield from _all_of(norm._parameters)
        yield from _named(vars(norm), "variance_epsilon", "eps")
    yield from _named(vars(attention), "head_dim", "scaling", "attention_dropout")
    for linear in _linears(layer):
        if _is_lora(linear):
            yield from _places_of_lora(linear)
        else:
            yield from _places_of_linear(linear)


def _places_of_lora(lora: PeftLinear) -> Iterator[tuple[dict[str, Any], str, Any]]:
    name = lora.active_adapters[0]
    own, children = vars(lora), cast(dict[str, Any], lora._modules)
    names = ("_active_adapter", "_disable_adapters", "fan_in_fan_out", "merged_adapters", "scaling", "lora_variant")
    yield from _named(own, *names)
    yield from _named(children, "base_layer", "lora_A", "lora_B", "lora_dropout")
    yield from _named(lora.scaling, name)
    yield from _named(lora.lora_variant, name)
    yield from _places_of_linear(lora.base_layer)
    for parts in (lora.lora_A, lora.lora_B, lora.lora_dropout):
        yield from _all_of(cast(dict[str, Any], parts._modules))
    for part in (lora.lora_A[name], lora.lora_B[name]):
        yield from _all_of(part._parameters)


def _places_of_linear(linear: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    yield from _all_of(linear._parameters)
    yield from _named(vars(linear.weight), "quant_state")


def _all_of(place: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    return _named(place, *place)


def _named(place: dict[str, Any], *keys: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for key in keys:
        yield place, key, place.get(key)


def _linears(layer: nn.Module) -> Iterator[nn.Module]:
    for part in (layer.self_attn, layer.mlp):
        yield from (child for child in cast(nn.Module, part).children() if _is_lora(child) or _is_linear(child))


def _frozen(layer: nn.Module) -> list[Tensor]:
    bases = [linear.base_layer if _is_lora(linear) else linear for linear in _linears(layer)]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    return [parameter for part in (*bases, *norms) for parameter in cast(nn.Module, part).parameters()]


def _sizes(layer: nn.Module) -> list[tuple[Sized, int]]:
    parts = cast(tuple[nn.Module, ...], (layer, layer.self_attn, layer.mlp))
    found: list[Sized] = [part._modules for part in parts]
    for linear in _linears(layer):
        if _is_lora(linear):
            found += [linear.lora_A, linear.merged_adapters]
    return [(each, len(each)) for each in found]


def _layer(module: nn.Module) -> DecoderLayer | None:
    children = dict(module.named_children())
    if children.keys() != _LAYER:
        return None
    attention, mlp = dict(children["self_attn"].named_children()), dict(children["mlp"].named_children())
    if attention.keys() != _ATTENTION or mlp.keys() != _MLP:
        return None
    linears = {name: adapted(part) for name, part in (*attention.items(), *mlp.items()) if name != "act_fn"}
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
