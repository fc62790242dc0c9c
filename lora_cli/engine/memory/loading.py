"""A base model on `meta` that has gone through what loading does to the card's memory.

The order is that of transformers' loader: one block as large as all weights, taken and given back so that later
requests are served from it; then tensor by tensor in the order of their names, each quantized on the card where the
config says so, by bitsandbytes' own code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from lora_cli.config import QuantizationConfig
from lora_cli.engine.memory.scratch import register_bitsandbytes
from lora_cli.engine.memory.tracer import Tracer
from lora_cli.model.architecture import build_on_meta
from lora_cli.model.weights import bitsandbytes_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_on_meta(
    architecture: PretrainedConfig,
    tracer: Tracer,
    *,
    dtype: torch.dtype,
    attention: str,
    quantization: QuantizationConfig | None = None,
    trust_remote_code: bool = False,
    warm_up: bool = True,
    ahead: int = 0,
) -> PreTrainedModel:
    """The base, frozen; call it while `tracer` records and `meta` pretends to be the target.

    Args:
        warm_up: loaded with a `device_map`, as our trainer does; without one, weights go to the card one by one.
        ahead: weights that threads have brought to the card before their turn. None where transformers quantizes, in
            the releases that this project runs with; older ones had four threads.
    """
    with tracer.aside():
        model = build_on_meta(architecture, trust_remote_code=trust_remote_code, dtype=dtype, attention=attention)
        model.requires_grad_(False)
        names = _place_quantized_layers(model, quantization, dtype) if quantization is not None else set()
    if warm_up:
        # The loader counts tied weights once, and half a byte for each value of a 4-bit weight.
        packed_bytes = 1.0 if quantization is not None and quantization.type == "int8" else 0.5
        sizes = (p.numel() * (packed_bytes if n in names else p.element_size()) for n, p in model.named_parameters())
        tracer.take_and_give_back([int(sum(sizes)) // 2 * 2], "transformers' warm-up")
    parameters = list(model.named_parameters())
    if warm_up:
        parameters.sort(key=lambda item: _natural(item[0]))
    arrived: deque[Tensor] = deque()
    with _own_tables(bool(names)):
        for position, (name, _) in enumerate(parameters):
            while len(arrived) <= ahead and position + len(arrived) < len(parameters):
                coming, parameter = parameters[position + len(arrived)]
                arrived.append(_arrive(model, coming, parameter, dtype, tracer, quantized=coming in names))
            if name in names:
                _quantize(model.get_submodule(name.rpartition(".")[0]), arrived.popleft())
            else:
                arrived.popleft()
    tracer.register(model.buffers(), "other weights")
    label_weights(model, tracer)
    return model


def label_weights(model: nn.Module, tracer: Tracer) -> None:
    """Tell the tracer which storages hold weights, and of which sort."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            tracer.register([parameter], "trained weights" if all(trained) else "adapters")
            continue
        state = _quantization_state(parameter)
        tracer.register([parameter], "quantized weights" if state else "other weights")
        tracer.register(state, "quantization state")


def _place_quantized_layers(model: PreTrainedModel, quantization: QuantizationConfig, dtype: torch.dtype) -> set[str]:
    """Exchange the layers that bitsandbytes takes; the names of their weights."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    register_bitsandbytes()
    settings = bitsandbytes_config(quantization, dtype)
    keep = model._keep_in_fp32_modules
    kept = HfQuantizer.get_modules_to_not_convert(model, None, None if keep is None else list(keep))
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    if quantization.type != "int8":
        setattr(model, "is_loaded_in_4bit", True)  # noqa: B010 - PEFT reads it
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


def _arrive(
    model: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype, tracer: Tracer, *, quantized: bool
) -> Tensor:
    """One weight comes to the card: as it will stay, or in the compute dtype, to be quantized there."""
    if not quantized:
        tracer.register([parameter], "other weights")
        return parameter
    module = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(module, nn.Linear)
    return torch.empty((module.out_features, module.in_features), dtype=dtype, device="meta")


def _quantize(module: nn.Module, values: Tensor) -> None:
    """What loading does with one weight that is quantized; its `values` then go."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit

    if isinstance(module, Linear8bitLt):
        scales = torch.empty(values.shape[0], dtype=torch.float32, device="meta")
        packed = torch.empty(values.shape, dtype=torch.int8, device="meta")
        module.weight = Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
        return
    assert isinstance(module, nn.Linear)
    old: Any = module.weight
    packed, state = functional.quantize_4bit(
        values,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    same: Any = {name: vars(old)[name] for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    module.weight = Params4bit(packed, quant_state=state, module=cast(Any, module), bnb_quantized=True, **same)
    vars(module)["quant_state"] = state


@contextmanager
def without_initial_values() -> Iterator[None]:
    """Within it, new modules are left as they come: PEFT makes adapters on the CPU, and nobody will read these."""

    def leave(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    names = ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_", "orthogonal_")
    left: dict[str, Any] = dict.fromkeys(names, leave)
    with mock.patch.multiple("torch.nn.init", **left):
        yield


@contextmanager
def _own_tables(quantized: bool) -> Iterator[None]:
    """bitsandbytes keeps a table on the device that first asks for it: one on `meta` must not stay behind."""
    if not quantized:
        yield
        return
    from bitsandbytes import functional

    with mock.patch.dict(functional.name2qmap):
        functional.name2qmap.pop("dynamic", None)
        yield


def _quantization_state(parameter: nn.Parameter) -> list[Tensor]:
    """Scales and tables that belong to a quantized weight; nothing for other weights."""
    found: list[Any] = []
    state = vars(parameter).get("quant_state")
    if state is not None:
        found += [state.absmax, state.code, state.offset]
        if state.nested:
            found += [state.state2.absmax, state.state2.code]
    found.append(vars(parameter).get("SCB"))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
