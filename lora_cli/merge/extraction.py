"""`extract`: the LoRA of a given rank that best explains a fully fine-tuned model against its base.

Both models are read a layer at a time. Knows nothing about training, and of arithmetic only what `factors` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_cli.config import ModelConfig
from lora_cli.engine.trained import Target, check_same_base, find_target
from lora_cli.errors import ModelError, UserError
from lora_cli.merge.base import Base, open_base
from lora_cli.merge.card import extracted_card
from lora_cli.merge.factors import nearest_factors
from lora_cli.merge.layout import Group
from lora_cli.merge.placing import WEIGHTS, lay_over
from lora_cli.merge.result import Explained, Extraction, Likeness
from lora_cli.merge.rows import rows_for
from lora_cli.merge.staging import check_free, commit, copy_tokenizer, staged
from lora_cli.merge.verification import Stage, distance
from lora_cli.model.adapter import is_linear
from lora_cli.model.architecture import build_on_meta, read_architecture
from lora_cli.model.hub import model_folder
from lora_cli.report.events import Emit, Warned, Working, ignore
from lora_cli.runs.atomic import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Pair:
    """A base and what became of it."""

    target: Target
    """The tuned model; `target.model` is the base."""
    base: Base
    tuned: Base
    base_groups: Mapping[str, Group]
    tuned_groups: Mapping[str, Group]

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A parameter of both, as it is stored."""
        return _read(self.base, self.base_groups[name], name), _read(self.tuned, self.tuned_groups[name], name)


def extract(
    tuned: str,
    output: Path,
    *,
    base: str | None = None,
    rank: int = 16,
    modules_to_save: Sequence[str] = (),
    verify: bool = True,
    emit: Emit = ignore,
) -> Extraction:
    """The adapter that makes the base most like `tuned`, written to `output` in PEFT's format.

    Args:
        tuned: a run of full fine-tuning, whose base is known, or the folder or hub id of a model.
        base: hub id or folder of its base.
        rank: of each layer's product; less where a layer is smaller.
        modules_to_save: names of modules that are saved whole: embeddings, the head, norms.
        verify: compare tuned model, base and base + adapter on text.

    Raises:
        UserError: models that don't belong together, nothing that differs, or an output that can't be written.
    """
    check_free(output)
    emit(Working("reading the headers of both models"))
    pair = _open(tuned, base)
    saved = _named_modules(pair.base.model, modules_to_save)
    with staged(output, 0) as folder:
        values, modules = _factors(pair, rank, saved, emit)
        whole = {name: pair.read(name)[1] for path in saved for name in _parameters(pair.base.model, path)}
        if not values and not whole:
            raise ModelError(
                f"no linear layer of {tuned} differs from {pair.base.folder.absolute()}: there is nothing to extract"
            )
        held = {f"{module.name}.weight" for module in modules} | whole.keys()
        left = _left_out(pair, held, emit)
        _write(pair, folder, values | {f"{_PREFIX}{name}": value for name, value in whole.items()}, modules, saved)
        copy_tokenizer(pair.tuned.folder, folder)
        lay_over(_on_meta(pair), folder)  # as strict as a merge would be
        likeness = _compare(pair, folder, emit) if verify else None
        size = (folder / WEIGHTS).stat().st_size
        found = Extraction(str(output), rank, tuple(modules), tuple(saved), left, size, likeness)
        if likeness is not None and not likeness.kl_adapter < likeness.kl_base:
            emit(Warned("base + adapter is no nearer to the tuned model than the base is: give a higher --rank"))
        write_text(folder / "README.md", extracted_card(pair.target, found))
        commit(folder, output)
    return found


def _open(tuned: str, base: str | None) -> _Pair:
    target = find_target(tuned, whole_models=True)
    if not target.whole and target.config.adapter is not None:
        raise UserError(f"{tuned} is an adapter already", remedy="Give a run of full fine-tuning, or a whole model.")
    if base is None and target.whole:
        raise UserError(f"{tuned} doesn't say what it was made from", remedy="Name its base: --base ID_OR_FOLDER.")
    named = {"name_or_path": base, "revision": None} if base is not None else {}
    origin = target.model.model_copy(update={**named, "quantization": None})
    result = target.model.name_or_path if target.whole else str(target.result)
    became = target.model.model_copy(update={"name_or_path": result, "quantization": None})
    if base is None:
        check_same_base(target, model_folder(origin))
    before, after = _open_one(origin), _open_one(became)
    _check_alike(before, after)
    target = replace(target, config=target.config.model_copy(update={"model": origin}))
    return _Pair(target, before, after, before.layout.group_of(), after.layout.group_of())


def _open_one(model: ModelConfig) -> Base:
    return open_base(model, model_folder(model), read_architecture(model), None)


def _check_alike(base: Base, tuned: Base) -> None:
    one, other = base.model.state_dict(), tuned.model.state_dict()
    for name in one.keys() ^ other.keys():
        raise ModelError(
            f"{name} is in {(base if name in one else tuned).folder.absolute()} alone: "
            "the models are of different architectures or depths",
            remedy="Name the base that this model was tuned from.",
        )
    for name, value in one.items():
        if value.shape != other[name].shape:
            raise ModelError(
                f"{name} is {list(value.shape)} in the base and {list(other[name].shape)} in the tuned model",
                remedy="Name the base that this model was tuned from.",
            )


def _factors(pair: _Pair, rank: int, saved: Sequence[str], emit: Emit) -> tuple[dict[str, Tensor], list[Explained]]:
    """lora_A and lora_B of each linear layer that changed, by their saved names, and how much of it they explain."""
    head = pair.base.model.get_output_embeddings()
    linear = {
        path: module
        for path, module in pair.base.model.named_modules()
        if is_linear(module) and module is not head and path not in saved
    }
    values: dict[str, Tensor] = {}
    explained = []
    for done, (path, module) in enumerate(linear.items()):
        emit(Working("explaining", done, len(linear), "layers"))
        before, after = pair.read(f"{path}.weight")
        delta = after.float() - before.float()
        if not bool(delta.any()):
            continue
        if not bool(torch.isfinite(delta).all()):
            raise ModelError(f"{path}.weight holds NaN or infinity")
        norm, before_norm = float(torch.linalg.norm(delta)), float(torch.linalg.norm(before.float()))
        a, b, error = nearest_factors(delta if isinstance(module, nn.Linear) else delta.T.contiguous(), rank)
        values[f"{_PREFIX}{path}.lora_A.weight"], values[f"{_PREFIX}{path}.lora_B.weight"] = a, b
        explained.append(Explained(path, len(a), error, norm / max(before_norm, 1e-30), norm))
    return values, explained


def _left_out(pair: _Pair, held: set[str], emit: Emit) -> tuple[str, ...]:
    """Parameters that changed and that the adapter doesn't hold."""
    emit(Working("looking for what else has changed"))
    tied = pair.base.layout.tied.keys() & pair.tuned.layout.tied.keys()
    names = [name for name in pair.base_groups if name not in held and name not in tied]
    changed = []
    for name in names:
        before, after = pair.read(name)
        if not torch.equal(before, after.to(before.dtype)):
            changed.append(name)
    if changed:
        emit(Warned(f"{len(changed)} tensors changed that a LoRA of linear layers doesn't hold: {_some(changed)}"))
    return tuple(changed)


def _write(
    pair: _Pair, folder: Path, values: dict[str, Tensor], modules: Sequence[Explained], saved: Sequence[str]
) -> None:
    save_file({name: value.contiguous() for name, value in values.items()}, folder / WEIGHTS, {"format": "pt"})
    largest = max((module.rank for module in modules), default=1)
    smaller = {module.name: module.rank for module in modules if module.rank != largest}
    turned = any(not isinstance(pair.base.model.get_submodule(module.name), nn.Linear) for module in modules)
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=pair.target.model.name_or_path,
        revision=pair.target.model.revision,
        r=largest,
        lora_alpha=largest,  # a scale of 1
        rank_pattern=smaller,
        alpha_pattern=smaller,
        target_modules=_target_modules(pair.base.model, [module.name for module in modules]),
        modules_to_save=list(saved) or None,
        fan_in_fan_out=turned,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _target_modules(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The shortest names that match these modules and no others."""
    leaves = {path.rpartition(".")[2] for path in paths}
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted(leaves) if matched == set(paths) else sorted(paths)


def _named_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules that `names` mean, as PEFT matches them: by the end of their path."""
    found = []
    for wanted in names:
        paths = [path for path, _ in model.named_modules() if path == wanted or path.endswith(f".{wanted}")]
        if not paths:
            raise UserError(f"--modules-to-save {wanted} matches no module of {type(model).__name__}")
        found += paths
    return found


def _parameters(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()]


def _compare(pair: _Pair, folder: Path, emit: Emit) -> Likeness:
    """Tuned model, base, and base + adapter on the same text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = rows_for(pair.target, pair.base.config, emit)
    stage = Stage(replace(pair.target, result=folder), pair.base, rows, device, emit)
    tuned = stage.merged_logits(pair.tuned)
    base = stage.base_logits(as_quantized=False)
    of_base, loss_base = distance(tuned, base), stage.loss(base)
    del base
    adapter = stage.adapter_logits(as_quantized=False)
    of_adapter = distance(tuned, adapter)
    return Likeness(
        rows=rows.source,
        positions=rows.positions,
        kl_base=of_base.kl,
        kl_adapter=of_adapter.kl,
        top1_base=of_base.top1_agreement,
        top1_adapter=of_adapter.top1_agreement,
        loss_tuned=stage.loss(tuned),
        loss_base=loss_base,
        loss_adapter=stage.loss(adapter),
    )


def _read(base: Base, group: Group, name: str) -> Tensor:
    return base.read(group, as_quantized=False)[base.layout.tied.get(name, name)]


def _on_meta(pair: _Pair) -> PreTrainedModel:
    return build_on_meta(pair.base.config, trust_remote_code=pair.target.model.trust_remote_code)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
