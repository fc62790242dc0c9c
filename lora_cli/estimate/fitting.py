"""What would make a run fit: changes in the order of what they cost the user, each rehearsed and not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_cli.config import Config
from lora_cli.config.schema import QuantizationConfig
from lora_cli.report.estimated import Change

if TYPE_CHECKING:
    from lora_cli.engine.memory.need import Need
    from lora_cli.estimate.estimation import Question

Changes = dict[str, dict[str, object]]
"""New values by section and key."""


def changes_that_fit(question: Question, need: Need) -> tuple[Change, ...]:
    """Changes added one by one until the run fits; the last one fits unless none does.

    A change that saves nothing is left out.
    """
    assert question.card is not None
    card_bytes, found = question.card.memory_bytes, []
    before, settings = need, list(_resolved(question.config, need.config))
    for setting, costs, changes in _steps(need.config):
        after = question.rehearsals.need(_with(before.config, changes), need.target)
        if after.process_bytes >= before.process_bytes:
            continue
        keys = {key for key, _, _ in (item.partition("=") for item in setting)}
        settings = [item for item in settings if item.partition("=")[0] not in keys] + list(setting)
        fits = after.fits(card_bytes)
        saves = before.process_bytes - after.process_bytes
        found.append(Change(tuple(settings), after.process_bytes_on(card_bytes), saves, costs, fits))
        before = after
        if fits:
            break
    return tuple(found)


def _steps(config: Config) -> Iterator[tuple[tuple[str, ...], str, Changes]]:
    """Settings that save memory, the cheapest first: the `--set` arguments, what they cost, and the change."""
    train, model, data = config.train, config.model, config.data
    if train.loss == "full":
        yield ("train.loss=chunked",), "same result", {"train": {"loss": "chunked"}}
    tokens = int(train.micro_batch_tokens)
    while tokens > data.max_length:
        tokens = max(data.max_length, tokens // 2)
        yield (f"train.micro_batch_tokens={tokens}",), "same result", {"train": {"micro_batch_tokens": tokens}}
    if not train.gradient_checkpointing:
        setting = "train.gradient_checkpointing=true"
        yield (setting,), "same result, a third more time", {"train": {"gradient_checkpointing": True}}
    if not train.activation_offloading:
        setting = "train.activation_offloading=true"
        both: dict[str, object] = {"gradient_checkpointing": True, "activation_offloading": True}
        yield (setting,), "same result, layers' inputs in host memory", {"train": both}
    if train.optim in ("adamw_torch", "adamw_torch_fused"):
        yield ("train.optim=adamw_8bit",), "optimizer state in 8 bits", {"train": {"optim": "adamw_8bit"}}
    if config.adapter is not None and model.quantization is None:
        nf4 = QuantizationConfig(type="nf4")
        yield ("model.quantization={type: nf4}",), "base weights in 4 bits", {"model": {"quantization": nf4}}
    elif model.quantization is not None and not model.quantization.double_quant and model.quantization.type != "int8":
        twice = model.quantization.model_copy(update={"double_quant": True})
        yield ("model.quantization.double_quant=true",), "scales in 8 bits", {"model": {"quantization": twice}}
    length = data.max_length
    while length > 256:
        length //= 2
        tokens = min(length, int(train.micro_batch_tokens))
        changes: Changes = {"data": {"max_length": length}, "train": {"micro_batch_tokens": tokens}}
        settings = (f"train.micro_batch_tokens={tokens}", f"data.max_length={length}")
        yield settings, "longer examples lose their end", changes


def _with(config: Config, changes: Changes) -> Config:
    update = {section: getattr(config, section).model_copy(update=values) for section, values in changes.items()}
    return config.model_copy(update=update)


def _resolved(asked: Config, resolved: Config) -> Iterator[str]:
    """Settings that were `auto` and that the changes start from."""
    if asked.train.gradient_checkpointing == "auto" and resolved.train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true"
    if asked.train.activation_offloading == "auto" and resolved.train.activation_offloading:
        yield "train.activation_offloading=true"
    if asked.train.micro_batch_tokens == "auto":
        yield f"train.micro_batch_tokens={resolved.train.micro_batch_tokens}"
