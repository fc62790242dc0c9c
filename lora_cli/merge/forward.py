"""Logits of a model that need not fit into memory: each module's weights are there while it runs, and only then.

All arithmetic is float32, so that what two passes differ by is what their weights differ by. Knows nothing about
files: a function gives the weights, by the names that the base has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_cli.merge.adapter import AdaptedModel, Unit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Weights = Callable[[str], Tensor]
"""A parameter of the base, by its name, in any dtype."""


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool, device: torch.device) -> PreTrainedModel:
    """A model whose buffers are real and whose parameters are on `meta`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    model.eval()
    return model


def plain_logits(model: PreTrainedModel, weights: Weights, input_ids: Tensor) -> Tensor:
    """[B, L, V] logits of `model` with these weights."""

    def fill(name: str, module: nn.Module) -> AbstractContextManager[None]:
        return _filled(module, {leaf: f"{name}.{leaf}" for leaf in module._parameters}, weights, input_ids.device)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                hooks.enter_context(_hooked(module, lambda name=name, module=module: fill(name, module)))  # type: ignore[misc]
        return _run(model, input_ids)


def adapted_logits(adapted: AdaptedModel, weights: Weights, input_ids: Tensor) -> Tensor:
    """[B, L, V] logits of the base with its adapter beside it, not merged; `adapted` lies over a skeleton."""
    device = input_ids.device

    def of_base(name: str) -> Tensor:
        if name in adapted.replaced:
            return adapted.values[adapted.replaced[name]]
        return weights(name)

    def fill_unit(unit: Unit) -> AbstractContextManager[None]:
        names = () if isinstance(unit.module, ModulesToSaveWrapper) else adapted.base_parameters(unit)
        return adapted.filled(unit, {name: of_base(name).to(device, torch.float32) for name in names}, device)

    with ExitStack() as hooks:
        inside: set[int] = set()
        for unit in adapted.units:
            inside.update(id(module) for module in unit.module.modules())
            hooks.enter_context(_hooked(unit.module, lambda unit=unit: fill_unit(unit)))  # type: ignore[misc]
        for module in adapted.model.modules():
            path = adapted.base_paths.get(id(module))
            if id(module) in inside or path is None or not any(p is not None for p in module._parameters.values()):
                continue
            names = {leaf: f"{path}.{leaf}" for leaf in module._parameters}
            hooks.enter_context(
                _hooked(module, lambda module=module, names=names: _filled(module, names, of_base, device))  # type: ignore[misc]
            )
        return _run(adapted.model.get_base_model(), input_ids)


def _run(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()


@contextmanager
def _hooked(module: nn.Module, fill: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within it, `module` is filled whenever it runs."""
    running: list[AbstractContextManager[None]] = []

    def before(*_: object) -> None:
        running.append(fill())
        running[-1].__enter__()

    def after(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _filled(module: nn.Module, names: dict[str, str], weights: Weights, device: torch.device) -> Iterator[None]:
    held = dict(module._parameters)
    try:
        for leaf, parameter in held.items():
            if parameter is not None:
                value = weights(names[leaf]).to(device, torch.float32)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        module._parameters.update(held)
