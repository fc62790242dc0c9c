"""`merge`: from a target to a verified folder that transformers loads as it is."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from lora_cli.engine.trained import Target, check_same_base
from lora_cli.errors import ModelError, UserError
from lora_cli.merge.adapter import AdaptedModel
from lora_cli.merge.base import Base, open_base
from lora_cli.merge.card import merged_card
from lora_cli.merge.choice import choose_base
from lora_cli.merge.combination import combine, describe, find_weighted
from lora_cli.merge.placing import lay_over
from lora_cli.merge.result import BaseChoice, ChosenBase, MergeReport, Verification
from lora_cli.merge.rows import rows_for
from lora_cli.merge.staging import accompany, check_free, commit, set_aside, staged
from lora_cli.merge.streaming import Written, write_merged
from lora_cli.merge.verification import Stage, verify
from lora_cli.merge.work import Work, plan_work
from lora_cli.model.architecture import read_architecture
from lora_cli.model.dtypes import dtype_name
from lora_cli.model.hub import model_folder
from lora_cli.report.events import Emit, Warned, Working, ignore
from lora_cli.runs.atomic import write_text

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("bfloat16", "float16", "float32")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge(
    targets: Sequence[str],
    output: Path,
    *,
    base: BaseChoice | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    method: str = "cat",
    density: float | None = None,
    emit: Emit = ignore,
) -> MergeReport:
    """Merge the adapter of a run, or any PEFT LoRA, into its base, and check what came out.

    Several targets, each as TARGET or TARGET:WEIGHT, are combined first, by `method`.

    `base` chooses the weights for a run that trained on a quantized base: None takes those that reproduce the trained
    model best. Without `verify` every tensor is still accounted for, but no numbers are compared.

    Where the answer is no, the report has a `problem`, and the result lies under another name than `output`.

    Raises:
        UserError: a target, base or adapter that can't be used, or an output that can't be written.
    """
    limit, wanted = _parse_size(max_shard_size), _parse_dtype(dtype)
    check_free(output)
    emit(Working("reading the adapter and the headers of the base"))
    parts = find_weighted(targets)
    with ExitStack() as stack:
        target, made_of = parts[0].target, ""
        if len(parts) > 1 or parts[0].weight != 1.0:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="lora-merge-")))
            target, made_of = combine(parts, method, density, folder), f"{describe(parts, method)}; "
        return _merge(target, made_of, output, base, wanted, limit, verify, emit)


def _merge(
    target: Target,
    made_of: str,
    output: Path,
    base: BaseChoice | None,
    wanted: torch.dtype | None,
    limit: int,
    verify: bool,
    emit: Emit,
) -> MergeReport:
    source = _open(target)
    adapted = lay_over(source.model, target.result)
    _check_copies(source, adapted)
    warnings = adapted.idle()
    for text in warnings:
        emit(Warned(text))
    stage = None
    if verify:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stage = Stage(target, source, rows_for(target, source.config, emit), device, emit)
    chosen, trained = choose_base(stage, source, adapted, base, wanted)
    work = plan_work(source, adapted, as_quantized=chosen.base == "quantized", dtype=wanted)
    with staged(output, work.num_bytes) as folder:
        began = time.monotonic()
        written = write_merged(work, source, adapted, folder, max_shard_bytes=limit, emit=emit)
        _check_coverage(adapted, written)
        named = None if wanted is None else dtype_name(wanted)
        accompany(folder, source.folder, target.result, unties=work.unties, dtype=named)
        seconds, peak = time.monotonic() - began, _peak_memory_bytes()
        reference = trained if chosen.base == "quantized" else None
        del trained
        check = None
        if stage is not None and written.changed:
            check = _verify(stage, work, adapted, folder, reference)
        report = _report(output, work, written, chosen, check, seconds, peak, tuple(warnings))
        report = replace(report, warnings=report.warnings + tuple(_doubts(report, emit)))
        write_text(folder / "README.md", merged_card(target, report, made_of + _settings(adapted)))
        if report.problem is None:
            commit(folder, output)
            return report
        return replace(report, output=str(set_aside(folder, output)))


def _open(target: Target) -> Base:
    folder = model_folder(target.model)
    config = read_architecture(target.model)
    check_same_base(target, folder)
    trained_in = target.model.dtype
    return open_base(target.model, folder, config, None if trained_in == "auto" else getattr(torch, trained_in))


def _verify(stage: Stage, work: Work, adapted: AdaptedModel, folder: Path, reference: Tensor | None) -> Verification:
    model = stage.target.model.model_copy(update={"name_or_path": str(folder), "revision": None, "quantization": None})
    merged = open_base(model, folder, read_architecture(model), None)
    return verify(stage, work, merged, work.rounded(stage.base, adapted), reference)


def _check_copies(base: Base, adapted: AdaptedModel) -> None:
    """Compare copies of the base's weights that PEFT saved beside the adapter with the base itself.

    Raises:
        ModelError: they differ, so this is not the base that the adapter was trained on.
    """
    of = base.layout.group_of()
    for name, value_name in adapted.copies.items():
        copy = adapted.values[value_name]
        own = base.read(of[name], as_quantized=False)[base.layout.tied.get(name, name)]
        if not torch.equal(own.to(copy.dtype), copy):
            raise ModelError(
                f"{name} differs between {base.folder.absolute()} and the copy that was saved with the adapter",
                remedy="This is not the base that the adapter was trained on.",
            )


def _check_coverage(adapted: AdaptedModel, written: Written) -> None:
    unused = adapted.unused(written.used)
    if unused:
        raise ModelError(
            f"{len(unused)} tensors of the adapter went into nothing, the first {unused[0]}",
            remedy="This is a bug of ours; please report it.",
        )


def _report(
    output: Path,
    work: Work,
    written: Written,
    chosen: ChosenBase,
    check: Verification | None,
    seconds: float,
    peak: int,
    warnings: tuple[str, ...],
) -> MergeReport:
    problem = None
    if written.changed == 0:
        problem = "no effect: not one tensor differs from the base's"
    elif check is not None and not check.verified:
        problem = (
            f"logits differ from base + adapter by up to {check.max_logit_difference:.3g}, on average by "
            f"{check.mean_logit_difference:.3g}; rounding explains {check.tolerance:.3g} and {check.mean_tolerance:.3g}"
        )
    floating = [slot for slot in work.slots if slot.dtype.is_floating_point]
    return MergeReport(
        output=str(output),
        tensors=written.tensors,
        changed=written.changed,
        dtype=dtype_name(max(floating, key=lambda slot: slot.num_bytes).dtype),
        num_bytes=written.num_bytes,
        shards=written.shards,
        base=chosen,
        verification=check,
        problem=problem,
        warnings=warnings,
        seconds=seconds,
        peak_memory_bytes=peak,
    )


def _doubts(report: MergeReport, emit: Emit) -> list[str]:
    """What is no failure, and still makes one look twice."""
    check = report.verification
    found = []
    if check is not None and check.verified and check.mean_control <= check.mean_tolerance:
        found.append(
            f"on average the adapter moves logits by {check.mean_control:.2g} and rounding to {report.dtype} by up to "
            f"{check.mean_tolerance:.2g}: --dtype float32 keeps its effect"
        )
    if check is not None and check.rows.startswith("the run's") and check.loss_adapter > check.loss_base:
        found.append(
            f"on the run's own validation data the adapter is worse than the base ({check.loss_adapter:.4f} against "
            f"{check.loss_base:.4f}): is this the base it was trained on?"
        )
    for text in found:
        emit(Warned(text))
    return found


def _settings(adapted: AdaptedModel) -> str:
    config = adapted.config
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return f"{kind}, r {config.r}, alpha {config.lora_alpha}, {len(adapted.units)} modules"


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * _UNITS[(found[2] or "").upper()] if found else 0.0
    if size < 1:
        raise UserError(f"--max-shard-size {text} is not a size", remedy="Such as 5GB or 500MB.")
    return int(size)


def _parse_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in _DTYPES:
        raise UserError(f"--dtype {name} is not one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _peak_memory_bytes() -> int:
    """The most that this process has held so far; Linux says so."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
