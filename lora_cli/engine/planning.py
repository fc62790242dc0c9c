"""From a config to a plan: everything that can be known before the first step, computed once.

`train` and `check` call `prepare`; `params` counts from config.json alone. Reads data and tokenizer, builds the
model on `meta`, resolves every `auto`. Writes nothing and loads no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.config import Config
from lora_cli.data.examples import Examples
from lora_cli.data.loading import load_examples
from lora_cli.data.order import steps_per_epoch
from lora_cli.data.preview import Preview, packed, preview_examples
from lora_cli.engine.assembly import make_computation
from lora_cli.engine.memory.context import context_bytes
from lora_cli.engine.memory.need import Rehearsals
from lora_cli.engine.memory.settling import UNASKED_TOKENS, Settled, settle_memory
from lora_cli.engine.optimizers import warmup_steps
from lora_cli.engine.selftest import Proof, prove_run
from lora_cli.engine.target import target_of
from lora_cli.engine.writes import planned_writes
from lora_cli.errors import ModelError
from lora_cli.model.adapter import attach_adapter, check_adapter_folder, unreached_by_all_linear
from lora_cli.model.architecture import build_on_meta, code_left_out, read_architecture
from lora_cli.model.dtypes import dtype_name, resolve_dtype
from lora_cli.model.parameters import count_parameters
from lora_cli.model.tokenizer import check_vocabulary, load_tokenizer, stop_tokens
from lora_cli.model.weights import Reach, check_weight_files, describe_quantization, quantization_reach, refuse_partial
from lora_cli.plan import Engine, ModelFacts, ParameterReport, Plan, Steps
from lora_cli.report.events import Emit, Working, ignore

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": UNASKED_TOKENS}
"""What `micro_batch_tokens: auto` is where the estimator isn't asked: on a CPU, and outside training."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    config: Config
    """With every `auto` resolved."""
    architecture: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    train: Examples
    validation: Examples | None
    proof: Proof
    plan: Plan
    rehearsals: Rehearsals | None = None
    """What its memory was estimated by, on a card."""


def parameter_report(config: Config) -> ParameterReport:
    """Parameter counts of a config, from its model's config.json alone."""
    return count_parameters(_on_meta(config, read_architecture(config.model)))


def compare_ranks(config: Config, ranks: Sequence[int]) -> dict[int, ParameterReport]:
    """Parameter counts of the same adapter at several ranks.

    Raises:
        ModelError: the config has no adapter to give a rank to.
    """
    if config.adapter is None:
        raise ModelError("adapter: null is full fine-tuning; there is no rank to compare")
    architecture = read_architecture(config.model)
    reports = {}
    for rank in ranks:
        adapter = config.adapter.model_copy(update={"r": rank, "rank_pattern": None})
        reports[rank] = count_parameters(_on_meta(config.model_copy(update={"adapter": adapter}), architecture))
    return reports


def load_preview(config: Config, count: int) -> Preview:
    """The first `count` examples, token by token. Looks at the tokenizer and the data alone."""
    import torch

    architecture = read_architecture(config.model)
    tokenizer = load_tokenizer(config.model)
    stops = stop_tokens(tokenizer, architecture, config.model)
    examples = preview_examples(config.data, tokenizer, stops, count=count)
    tokens = config.train.micro_batch_tokens
    return packed(
        examples,
        AUTO_MICRO_BATCH_TOKENS["cuda" if torch.cuda.is_available() else "cpu"] if tokens == "auto" else tokens,
    )


def make_plan(config: Config, emit: Emit = ignore) -> Plan:
    """The plan of a run on this machine, by one process."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return prepare(config, device, processes=1, emit=emit).plan


def prepare(
    config: Config, device: torch.device, *, processes: int, emit: Emit = ignore, beside: Prepared | None = None
) -> Prepared:
    """Read everything that the run needs but the weights, prove how it will run, and make its plan.

    Args:
        beside: a run on the same base, data and computation; its tokenizer, rows, proof and rehearsals are taken over.

    Raises:
        UserError: a mistake in config, data, model or tokenizer that can be known by now.
    """
    architecture = read_architecture(config.model)
    folder = Path(config.model.name_or_path).expanduser()
    if folder.is_dir():
        check_weight_files(folder)
    base = build_on_meta(architecture, trust_remote_code=config.model.trust_remote_code)
    reach = quantization_reach(base) if config.model.quantization is not None else None
    if config.model.quantization is not None and reach is not None:
        refuse_partial(reach, config.model.quantization)
    target_warnings = _target_warnings(config, base)
    model = _with_adapter(config, base)
    parameters = count_parameters(model)
    tokenizer = load_tokenizer(config.model) if beside is None else beside.tokenizer
    check_vocabulary(tokenizer, architecture, config.model)
    position_warnings = _check_positions(model, architecture, config.data.max_length)
    stops = stop_tokens(tokenizer, architecture, config.model)

    def progress(what: str, done: int, total: int | None) -> None:
        emit(Working(what, done, total, "rows"))

    if beside is not None and _same_rows(beside, config.train.seed):
        train, validation = beside.train, beside.validation
    else:
        train, validation = load_examples(config.data, tokenizer, stops, seed=config.train.seed, progress=progress)
    if beside is None:
        emit(Working("proving packing and loss"))
    proof = (
        beside.proof if beside is not None and _same_way(beside, config) else prove_run(config, architecture, device)
    )
    rehearsed = beside.rehearsals if beside is not None and proof is beside.proof else None
    settled = _settle(_resolve(config, device, proof), architecture, proof, device, rehearsed, emit)
    resolved = settled.config
    steps = _steps(resolved, len(train))
    plan = Plan(
        model=_facts(resolved, architecture, model, parameters, reach),
        parameters=parameters,
        data=train.account,
        validation=None if validation is None else validation.account,
        steps=steps,
        engine=Engine(
            device=device.type,
            processes=processes,
            micro_batch_tokens=_known(resolved.train.micro_batch_tokens),
            packing=proof.packing,
            loss=proof.loss,
            gradient_checkpointing=bool(resolved.train.gradient_checkpointing),
            activation_offloading=bool(resolved.train.activation_offloading),
            dropout=largest_dropout(model),
            notes=proof.notes,
            fusion=make_computation(resolved, proof, device).fusion,
            flash4=proof.flash4,
        ),
        memory=settled.memory,
        writes=planned_writes(resolved, parameters.trainable, steps),
        warnings=(
            *code_left_out(config.model, architecture),
            *position_warnings,
            *target_warnings,
            *train.account.warnings,
            *(validation.account.warnings if validation else ()),
            *_dropout_warnings(model),
            *([settled.warning] if settled.warning else ()),
        ),
    )
    return Prepared(resolved, architecture, tokenizer, stops, train, validation, proof, plan, settled.rehearsals)


def _same_rows(beside: Prepared, seed: int) -> bool:
    """Whether a run with this seed has the rows of `beside`: held-out rows and weighted sources are drawn by it."""
    drawn = isinstance(beside.config.data.validation, float) or beside.train.draw is not None
    return not drawn or seed == beside.config.train.seed


def _same_way(beside: Prepared, config: Config) -> bool:
    """Whether what was proven of `beside` holds for another plain LoRA: dropout keeps layers from running fused."""
    one, other = beside.config.adapter, config.adapter
    return one is None or other is None or bool(one.lora_dropout) == bool(other.lora_dropout)


def check_against_plan(model: nn.Module, plan: Plan) -> None:
    """Refuse to train a model that isn't the one that was planned.

    Raises:
        ModelError: the live model's parameter counts differ from the plan's.
    """
    live = count_parameters(model)
    if (live.trainable, live.total) != (plan.parameters.trainable, plan.parameters.total):
        raise ModelError(
            f"the live model has {live.trainable:,} trainable of {live.total:,} parameters, the plan says "
            f"{plan.parameters.trainable:,} of {plan.parameters.total:,}",
            remedy="config.json and the weights disagree, or this is a bug of ours; please report it.",
        )


def largest_dropout(model: nn.Module) -> float:
    """The largest dropout probability that is active when `model` trains."""
    from torch import nn

    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rates += [
        float(vars(module)["attention_dropout"])
        for module in model.modules()
        if isinstance(vars(module).get("attention_dropout"), int | float)
    ]
    return max(rates, default=0.0)


def _on_meta(config: Config, architecture: PretrainedConfig) -> PreTrainedModel | nn.Module:
    return _with_adapter(config, build_on_meta(architecture, trust_remote_code=config.model.trust_remote_code))


def _with_adapter(config: Config, model: PreTrainedModel) -> PreTrainedModel | nn.Module:
    import torch

    if config.adapter is None:
        return model
    adapter = config.adapter
    if adapter.path is not None:
        adapter = settings_of(adapter.path, config)
    with torch.device("meta"):
        return attach_adapter(model.requires_grad_(False), adapter, seed=0)


def settings_of(path: str, config: Config) -> Any:
    """The settings of an existing adapter, which go before those of the config."""
    check_adapter_folder(Path(path))
    found = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.adapter is not None
    fields = set(type(config.adapter).model_fields) - {"path"}
    given = {name: getattr(config.adapter, name) for name in config.adapter.model_fields_set & fields}
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", "lora_dropout"):
        if name in given and given[name] != found.get(name):
            raise ModelError(
                f"adapter.{name}: {given[name]} in the config, {found.get(name)} in the adapter at {path}",
                remedy=f"An adapter goes on as it is: leave adapter.{name} out.",
            )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in fields}
    return config.adapter.model_copy(update={**settings, "path": None})


def _resolve(config: Config, device: torch.device, proof: Proof) -> Config:
    dtype = dtype_name(resolve_dtype(config.model.dtype, device))
    quantization = config.model.quantization
    if quantization is not None and quantization.compute_dtype == "auto":
        quantization = quantization.model_copy(update={"compute_dtype": dtype})
    attention = "documents" if proof.packing == "documents" else proof.attention
    model = config.model.model_copy(
        update={"dtype": dtype, "quantization": quantization, "attn_implementation": attention}
    )
    adapter = config.adapter
    if adapter is not None and adapter.path is not None:
        adapter = settings_of(adapter.path, config).model_copy(update={"path": adapter.path})
    train = config.train.model_copy(update={"loss": proof.loss})
    return config.model_copy(update={"model": model, "adapter": adapter, "train": train})


def _settle(
    config: Config,
    architecture: PretrainedConfig,
    proof: Proof,
    device: torch.device,
    rehearsed: Rehearsals | None,
    emit: Emit,
) -> Settled:
    """The memory `auto`s: fixed on a CPU, asked of the estimator on a card."""
    import torch

    if device.type == "cuda":
        emit(Working("estimating memory"))
        free, _ = torch.cuda.mem_get_info(device)
        target = target_of(device)
        return settle_memory(config, architecture, proof, target, free + context_bytes(target), rehearsed)
    train = config.train
    tokens, checkpointing, offloading = (
        train.micro_batch_tokens,
        train.gradient_checkpointing,
        train.activation_offloading,
    )
    settled = train.model_copy(
        update={
            "micro_batch_tokens": AUTO_MICRO_BATCH_TOKENS["cpu"] if tokens == "auto" else tokens,
            "gradient_checkpointing": offloading is True if checkpointing == "auto" else checkpointing,
            "activation_offloading": False if offloading == "auto" else offloading,
        }
    )
    return Settled(config.model_copy(update={"train": settled}), None)


def _steps(config: Config, count: int) -> Steps:
    train = config.train
    per_epoch = steps_per_epoch(count, train.batch_size)
    total = train.max_steps if train.max_steps is not None else math.ceil(train.num_train_epochs * per_epoch)
    return Steps(
        total=total,
        per_epoch=per_epoch,
        epochs=total / per_epoch,
        batch_size=train.batch_size,
        warmup=warmup_steps(train.warmup_steps, total),
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
    )


def _facts(
    config: Config, architecture: PretrainedConfig, model: nn.Module, parameters: ParameterReport, reach: Reach | None
) -> ModelFacts:
    commit = getattr(architecture, "_commit_hash", None)
    return ModelFacts(
        name=config.model.name_or_path,
        revision=commit or config.model.revision,
        architecture=architecture.model_type,
        dtype=config.model.dtype,
        quantization=describe_quantization(config.model.quantization),
        adapter=_describe_adapter(model),
        remote_code=config.model.trust_remote_code,
        unquantized_bytes=0 if reach is None else reach.unquantized * (4 if config.model.dtype == "float32" else 2),
        unquantized_percent=0.0
        if reach is None
        else 100 * reach.unquantized / sum(kind.base_parameters for kind in parameters.by_module),
    )


def _describe_adapter(model: nn.Module) -> str | None:
    from peft import LoraConfig, PeftModel

    settings = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if not isinstance(settings, LoraConfig):
        return None
    kinds = {kind.name for kind in count_parameters(model).by_module if kind.trainable_parameters}
    variant = "DoRA " if settings.use_dora else "rsLoRA " if settings.use_rslora else ""
    return f"{variant}r {settings.r}, alpha {settings.lora_alpha}, {len(kinds)} kinds of module"


def _check_positions(model: nn.Module, architecture: PretrainedConfig, max_length: int) -> list[str]:
    """Refuse rows longer than learned positions; warn of rows longer than rotary ones were trained for."""
    from torch import nn

    text = architecture.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or max_length <= limit:
        return []
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if any(rows in (limit, limit + 2) and rows != text.vocab_size for rows in tables):  # OPT keeps two rows more
        raise ModelError(
            f"data.max_length {max_length:,} is beyond the {limit:,} positions that {text.model_type} has learned",
            remedy=f"Set data.max_length: {limit}",
        )
    return [f"data.max_length {max_length:,} is beyond the {limit:,} positions that the model was trained for"]


def _target_warnings(config: Config, base: PreTrainedModel) -> list[str]:
    if config.adapter is None or config.adapter.target_modules != "all-linear":
        return []
    unreached = unreached_by_all_linear(base)
    return [f"all-linear does not reach {', '.join(unreached)}"] if unreached else []


def _dropout_warnings(model: nn.Module) -> list[str]:
    rate = largest_dropout(model)
    if rate == 0:
        return []
    return [f"dropout {rate:g} is active: losses depend on train.micro_batch_tokens and the number of processes"]


def _known(value: int | str) -> int:
    assert isinstance(value, int), "every auto is resolved by now"
    return value
