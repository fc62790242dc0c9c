"""Rules between fields: settings that are each allowed, and together are not.

Each rule yields what contradicts what, at the key that should change. Rules see a config whose fields are
valid one by one; they never look at the file system, the model or the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_cli.config.schema import AdapterConfig, Config, Source


@dataclass(frozen=True)
class Contradiction:
    """`key` is where it is reported, `others` are the keys that it depends on as well."""

    key: str
    message: str
    hint: str
    others: tuple[str, ...] = ()


Rule = Callable[[Config], Iterator[Contradiction]]

# What each schedule takes beside warm-up and length, as long as it is a number.
SCHEDULE_NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"),
}
# Of these, each schedule needs exactly one.
SCHEDULE_NEEDS: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def contradictions(config: Config) -> Iterator[Contradiction]:
    for rule in _RULES:
        yield from rule(config)


def _quantized_full_training(config: Config) -> Iterator[Contradiction]:
    if config.adapter is None and config.model.quantization is not None:
        message = "full fine-tuning can't train quantized weights"
        hint = "set an adapter, or model.quantization: null"
        yield Contradiction("adapter", message, hint, ("model.quantization",))


def _int8_double_quant(config: Config) -> Iterator[Contradiction]:
    quantization = config.model.quantization
    if quantization is not None and quantization.type == "int8" and quantization.double_quant:
        hint = "leave it out, or use nf4 or fp4"
        key = "model.quantization.double_quant"
        yield Contradiction(key, "int8 has no scales to quantize", hint, ("model.quantization.type",))


def _adapter_targets(config: Config) -> Iterator[Contradiction]:
    adapter = config.adapter
    if adapter is None:
        return
    if adapter.target_modules is None and adapter.target_parameters is None:
        hint = "all-linear, a list of names, a regular expression, or adapter.target_parameters"
        yield Contradiction("adapter.target_modules", "nothing to adapt", hint, ("adapter.target_parameters",))
    if isinstance(adapter.target_modules, str) and adapter.layers_to_transform is not None:
        message = f"needs target_modules as a list of names, not {adapter.target_modules}"
        hint = "such as target_modules: [q_proj, v_proj]"
        yield Contradiction("adapter.layers_to_transform", message, hint, ("adapter.target_modules",))
    for field in ("target_modules", "exclude_modules"):
        yield from _regular_expression(f"adapter.{field}", adapter.model_dump()[field])
    yield from _parameters(adapter)
    if adapter.init_lora_weights == "orthogonal" and adapter.r % 2:
        hint = "make adapter.r even, or leave init_lora_weights out"
        yield Contradiction("adapter.init_lora_weights", "orthogonal needs an even rank", hint, ("adapter.r",))


def _regular_expression(key: str, pattern: object) -> Iterator[Contradiction]:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            yield Contradiction(key, f"not a regular expression: {error}", "all-linear, a list of names, or one")


def _parameters(adapter: AdapterConfig) -> Iterator[Contradiction]:
    """What PEFT can't do on a bare parameter."""
    if adapter.target_parameters is None:
        return
    needs = ("adapter.target_parameters",)
    if adapter.lora_dropout > 0:
        message = "dropout can't be applied with target_parameters"
        yield Contradiction("adapter.lora_dropout", message, "set it to 0", needs)
    if adapter.use_dora:
        yield Contradiction("adapter.use_dora", "DoRA can't be used with target_parameters", "leave it out", needs)


def _weights(config: Config) -> Iterator[Contradiction]:
    sources = config.data.train
    unweighted = [index for index, source in enumerate(sources) if source.weight is None]
    if 0 < len(unweighted) < len(sources):
        hint = "give every source a weight, or none"
        yield Contradiction(f"data.train.{unweighted[0]}", "has no weight, and others have one", hint)
    validation = config.data.validation
    if isinstance(validation, tuple):
        yield from _weighted_validation(validation)


def _weighted_validation(sources: tuple[Source, ...]) -> Iterator[Contradiction]:
    for index, source in enumerate(sources):
        if source.weight is not None:
            hint = "leave it out; all validation rows count the same"
            yield Contradiction(f"data.validation.{index}.weight", "weights are for training", hint)


def _validation_needed(config: Config) -> Iterator[Contradiction]:
    train = config.train
    users = {
        "eval_steps": train.eval_steps is not None,
        "load_best_model_at_end": train.load_best_model_at_end,
        "early_stopping_patience": train.early_stopping_patience is not None,
    }
    for name, used in users.items():
        if not used:
            continue
        if config.data.validation is None:
            hint = "set data.validation, such as 0.05"
            yield Contradiction(f"train.{name}", "there is no validation data", hint, ("data.validation",))
        elif train.eval_steps is None:
            hint = "set train.eval_steps"
            message = "there is only one evaluation, at the end"
            yield Contradiction(f"train.{name}", message, hint, ("train.eval_steps",))


def _schedule(config: Config) -> Iterator[Contradiction]:
    train = config.train
    kind, given = train.lr_scheduler_type, train.lr_scheduler_kwargs
    known, needed = SCHEDULE_NUMBERS[kind], SCHEDULE_NEEDS.get(kind, ())
    on_kind = ("train.lr_scheduler_type",)
    for name in given:
        if name not in known:
            hint = f"{kind} takes {', '.join(known) or 'none'}"
            yield Contradiction(f"train.lr_scheduler_kwargs.{name}", f"{kind} takes no {name}", hint, on_kind)
    if needed and sum(name in given for name in needed) != 1:
        message = f"{kind} needs {' or '.join(needed)}"
        hint = f"lr_scheduler_kwargs: {{{needed[-1]}: {'100' if needed[-1].endswith('steps') else '0.1'}}}"
        where = "train.lr_scheduler_kwargs" if given else "train.lr_scheduler_type"
        yield Contradiction(where, message, hint, (*on_kind, "train.lr_scheduler_kwargs"))
    if kind == "constant" and train.warmup_steps > 0:
        hint = "constant_with_warmup has one; or set warmup_steps to 0"
        yield Contradiction("train.warmup_steps", "constant has no warm-up", hint, on_kind)


def _offloading(config: Config) -> Iterator[Contradiction]:
    if config.train.activation_offloading is True and config.train.gradient_checkpointing is False:
        message = "only checkpointed layers keep nothing but their input, which can be offloaded"
        hint = "set train.gradient_checkpointing: true, or leave it out"
        yield Contradiction("train.activation_offloading", message, hint, ("train.gradient_checkpointing",))


def _trackers(config: Config) -> Iterator[Contradiction]:
    trackers = config.train.report_to
    twice = sorted({name for name in trackers if trackers.count(name) > 1})
    if twice:
        yield Contradiction("train.report_to", f"{twice[0]} is given twice", "name each once")


def _sweep(config: Config) -> Iterator[Contradiction]:
    """What a sweep can't share; which keys its grid may have, `grid` says."""
    if config.sweep is None:
        return
    if config.adapter is None:
        yield Contradiction("sweep", "needs an adapter to sweep over", "set adapter, or leave sweep out", ("adapter",))
    if config.sweep.halving is not None and config.data.validation is None:
        hint = "set data.validation, such as 0.05"
        yield Contradiction("sweep.halving", "there is no validation data to rank by", hint, ("data.validation",))


_RULES: tuple[Rule, ...] = (
    _quantized_full_training,
    _int8_double_quant,
    _adapter_targets,
    _weights,
    _validation_needed,
    _schedule,
    _offloading,
    _trackers,
    _sweep,
)
