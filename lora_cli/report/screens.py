"""The screens of `train`, `check` and `params`, as text: each function lays one frozen value out for a width.

The same figure is spelled by the same function wherever it appears. Knows nothing about how the values came
about and nothing about colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lora_cli.plan import DataAccount, Engine, Memory, ModelFacts, ParameterReport, Plan, Steps, Writes
from lora_cli.report import numbers
from lora_cli.report.layout import INDENT, LABEL_WIDTH, labelled, page_width, short_path, table, warning

_BYTES_PER_MASTER = 4
"""Adapters are trained and saved in fp32."""
_PLACES_SHOWN = 3
_LONGEST_BAR = 24
_BELOW_LABEL = " " * (len(INDENT) + 4 + LABEL_WIDTH)


def render_plan(plan: Plan, width: int | None = None) -> str:
    """What `train` shows before the first step."""
    width = width or page_width()
    model, *data = base_and_data(plan)
    rows = [model, ("adapter", _adapter(plan.model, plan.parameters)), *data]
    rows.append(("steps", _steps(plan.steps)))
    rows.append(("engine", engine_words(plan.engine)))
    if plan.memory is not None:
        rows.append(("memory", _memory(plan.memory, plan.engine)))
    rows.append(("writes", _writes(plan.writes)))
    lines = [line for label, text in rows for line in labelled(label, text, width)]
    warnings = [line for text in plan_warnings(plan) for line in warning(text, width)]
    return "\n".join([*lines, "", *warnings] if warnings else lines)


def base_and_data(plan: Plan) -> list[tuple[str, str]]:
    """What a run is made of beside its adapter, as labels and texts."""
    rows = [
        ("model", _model(plan.model, plan.parameters)),
        ("data", f"{_rows(plan.data)}; {_tokens(plan.data)}"),
    ]
    if plan.validation is not None:
        rows.append(("valid", f"{_rows(plan.validation)}; {_tokens(plan.validation)}"))
    return rows


def plan_warnings(plan: Plan) -> tuple[str, ...]:
    """Everything in the plan that the user should know, each once."""
    validation = plan.validation.warnings if plan.validation is not None else ()
    return tuple(dict.fromkeys((*plan.warnings, *plan.data.warnings, *validation, *plan.engine.notes)))


def base_parameters(report: ParameterReport) -> int:
    return sum(kind.base_parameters for kind in report.by_module)


def adapted_modules(report: ParameterReport) -> int:
    return sum(kind.modules for kind in report.by_module if kind.trainable_parameters)


def _model(model: ModelFacts, parameters: ParameterReport) -> str:
    name = short_path(model.name) if model.name.startswith("/") else model.name
    revision = f" @ {model.revision[:7]}" if model.revision else ""
    text = f"{name}{revision}, {numbers.counts(base_parameters(parameters))} parameters, {model.dtype}"
    if model.quantization:
        text += f", {model.quantization}"
    return text + (", with the repository's own code" if model.remote_code else "")


def _adapter(model: ModelFacts, parameters: ParameterReport) -> str:
    how = model.adapter or "none, every parameter is trained"
    return f"{how}: {_trainable(parameters)}"


def _trainable(parameters: ParameterReport) -> str:
    share = numbers.trainable_share(parameters.trainable_percent)
    return f"{numbers.counts(parameters.trainable)} trainable ({share})"


def _rows(data: DataAccount) -> str:
    text = numbers.counted(data.used, "row")
    if data.dropped:
        text = f"{numbers.counts(data.used)} of {numbers.counted(data.rows, 'row')}, "
        text += f"{numbers.counts(data.dropped)} dropped"
    return f"{text}, {numbers.counts(data.truncated)} truncated" if data.truncated else text


def _tokens(data: DataAccount) -> str:
    return f"{numbers.counted(data.num_tokens, 'token')}, {numbers.percent(data.supervised_percent)} trained"


def _steps(steps: Steps) -> str:
    epochs = f"{steps.epochs:g}" if steps.epochs == int(steps.epochs) else f"{steps.epochs:.2f}"
    count = numbers.counts(steps.total)
    if steps.epochs >= 1 and steps.total % steps.per_epoch == 0:
        count += f" = {numbers.counted(int(steps.epochs), 'epoch')} x {numbers.counts(steps.per_epoch)}"
    else:
        count += f", {epochs} epochs of {numbers.counts(steps.per_epoch)}"
    rate = numbers.learning_rate(steps.learning_rate)
    schedule = f"lr {rate}, {steps.lr_scheduler_type}, {numbers.counts(steps.warmup)} warm-up"
    return f"{count}, {numbers.counted(steps.batch_size, 'example')} each; {schedule}"


_PACKING = {
    "documents": "whole examples end to end",
    "mask": "examples end to end behind a mask",
    "single": "one example at a time",
}


def engine_words(engine: Engine) -> str:
    """How the step is carried out."""
    processes = f" x {engine.processes}" if engine.processes > 1 else ""
    checkpointing = "gradient checkpointing" if engine.gradient_checkpointing else "no gradient checkpointing"
    if engine.activation_offloading:
        checkpointing += " with layers' inputs in host memory"
    dropout = f", dropout {engine.dropout:g}" if engine.dropout else ""
    tokens = numbers.counted(engine.micro_batch_tokens, "token")
    attention = ", FlashAttention 4" if engine.flash4 else ""
    return (
        f"{engine.device}{processes}; micro-batches of {tokens}, {_PACKING[engine.packing]}{attention}; "
        f"{engine.loss} loss, {checkpointing}{dropout}"
    )


def _memory(memory: Memory, engine: Engine) -> str:
    need, have = _of_device(memory)
    at = f"{need} of {have} GiB at {numbers.counted(engine.micro_batch_tokens, 'token')} a micro-batch"
    # From the rounded figures, so that the line adds up as it's read.
    spare = have - need
    return f"{at}: fits, {spare:.1f} spare" if memory.fits else f"{at}: does not fit, {-spare:.1f} too much"


def _of_device(memory: Memory) -> tuple[float, float]:
    return round(memory.process_bytes / numbers.GIB, 1), round(memory.device_bytes / numbers.GIB, 1)


def _writes(writes: Writes) -> str:
    checkpoint = f"a checkpoint {writes.checkpoint_every} ({numbers.size(writes.checkpoint_bytes)} each)"
    return f"{short_path(writes.output_dir)}, {checkpoint}, {numbers.size(writes.free_bytes)} free"


def render_speed(*, steps: int, tokens_per_second: float, run_seconds: float, tflops: float | None, **_: object) -> str:
    """What a few timed steps say of the whole run."""
    work = "" if tflops is None else f", {tflops:.3g} TFLOP/s"
    took = f"{tokens_per_second:,.0f} tok/s over {numbers.counted(steps, 'step')}{work}"
    return f"{took}; about {numbers.duration(run_seconds)} for the run's steps"


def render_check(plan: Plan, width: int | None = None, *, cache: str = "", speed: str = "") -> str:
    """What `check` shows: one line per thing it looked at, then the verdict."""
    width = width or page_width()
    modules = numbers.counted(adapted_modules(plan.parameters), "module")
    steps = numbers.counted(plan.steps.total, "step")
    findings = [
        ("ok", "model", _model(plan.model, plan.parameters)),
        ("ok", "adapter", f"{_adapter(plan.model, plan.parameters)} in {modules}"),
        *_data_findings("data", plan.data),
    ]
    if plan.validation is not None:
        findings += _data_findings("valid", plan.validation)
    findings.append(("ok", "plan", f"{steps}; {engine_words(plan.engine)}"))
    if plan.memory is not None:
        findings.append(("ok" if plan.memory.fits else "no", "memory", _memory(plan.memory, plan.engine)))
    enough = plan.writes.free_bytes > max(plan.writes.checkpoint_bytes, plan.writes.peak_bytes)
    findings.append(("ok" if enough else "no", "disk", _writes(plan.writes)))
    if speed:
        findings.append(("ok", "speed", speed))
    if cache:
        findings.append(("ok", "cache", cache))
    warnings = plan_warnings(plan)
    lines = []
    for mark, label, text in findings:
        lines += labelled(label, text, width, lead=f"{INDENT}{mark:<4}")
        if label == "length":
            lines += _histogram(plan.data.lengths)
    lines += [line for text in warnings for line in labelled("", text, width, lead=f"{INDENT}!   ")]
    return "\n".join([*lines, "", INDENT + _verdict(findings, len(warnings))])


Finding = tuple[str, str, str]


def _data_findings(label: str, data: DataAccount) -> list[Finding]:
    text = f"{_rows(data)}; {_tokens(data)}"
    for reason, places in data.reasons.items():
        text += f"\n{numbers.counts(len(places))} dropped, {reason}{_places(places, len(places))}"
    if label == "data":
        return [("ok", label, text), ("!" if data.truncated else "ok", "length", _length(data)), *_repeats(data)]
    return [("ok", label, text)]


def _length(data: DataAccount) -> str:
    length = f"the longest row has {numbers.counted(data.longest_seen, 'token')}"
    if data.longest_place is not None:
        length += f": {short_path(data.longest_place)}"
    if data.truncated:
        places = _places(data.truncated_places, data.truncated)
        length += f"\n{numbers.counts(data.truncated)} truncated at {numbers.counted(data.longest, 'token')}{places}"
    return length


def _repeats(data: DataAccount) -> list[Finding]:
    if not data.duplicates:
        return []
    places = _places(data.duplicate_places, data.duplicates)
    return [("!", "repeats", f"{numbers.counted(data.duplicates, 'exact duplicate')}{places}")]


def _places(places: Sequence[str], count: int) -> str:
    """`: train.jsonl:5, train.jsonl:9 and 3 more`"""
    if not places:
        return ""
    shown = ", ".join(short_path(place) for place in places[:_PLACES_SHOWN])
    more = count - min(len(places), _PLACES_SHOWN)
    return f": {shown}" + (f" and {numbers.counts(more)} more" if more > 0 else "")


def _histogram(bins: Sequence[tuple[int, int]]) -> list[str]:
    """How many examples are how long, a line each: `to 128  1,204  ████`."""
    if len(bins) < 2:
        return []
    most = max(count for _, count in bins)
    lengths = [numbers.counts(length) for length, _ in bins]
    counts = [numbers.counts(count) for _, count in bins]
    return [
        f"{_BELOW_LABEL}to {length:>{max(map(len, lengths))}}  {count:>{max(map(len, counts))}}  "
        + "█" * math.ceil(_LONGEST_BAR * number / most)
        for length, count, (_, number) in zip(lengths, counts, bins, strict=True)
    ]


def render_cache(folder: str, size_bytes: int, entries: int, cleared_bytes: int | None = None) -> str:
    """What tokenized data takes on disk: part of `check`."""
    text = (
        f"{numbers.size(size_bytes)} of tokenized data, {numbers.counted(entries, 'source')}, in {short_path(folder)}"
    )
    return text if cleared_bytes is None else f"{text}; {numbers.size(cleared_bytes)} deleted before"


def _verdict(findings: list[Finding], warnings: int) -> str:
    refused = [label for mark, label, _ in findings if mark == "no"]
    if refused:
        return f"not ready: {', '.join(refused)}"
    return f"ready, {numbers.counted(warnings, 'warning')}" if warnings else "ready"


def render_parameters(report: ParameterReport, model: ModelFacts | None = None, width: int | None = None) -> str:
    """What `params` shows: every kind of module, and what of it is trained."""
    width = width or page_width()
    rows = [
        (
            kind.name,
            numbers.counts(kind.modules),
            kind.shape,
            numbers.counts(kind.base_parameters),
            numbers.counts(kind.trainable_parameters) if kind.trainable_parameters else "",
        )
        for kind in report.by_module
    ]
    lines = []
    if model is not None:
        lines += [*labelled("model", _model(model, report), width)]
        lines += [*labelled("adapter", model.adapter or "none, every parameter is trained", width), ""]
    lines += table(("module", "count", "shape", "base", "trainable"), rows, width, dispensable=2)
    share = numbers.trainable_share(report.trainable_percent)
    total = f"{numbers.counts(report.trainable)} of {numbers.counts(report.total)} parameters, {share}"
    return "\n".join([*lines, "", *labelled("trained", total, width)])


def render_ranks(reports: Mapping[int, ParameterReport], width: int | None = None) -> str:
    """What `params --ranks` shows: the same adapter at several ranks."""
    rows = [
        (
            str(rank),
            numbers.counts(report.trainable),
            numbers.trainable_share(report.trainable_percent),
            f"{report.trainable * _BYTES_PER_MASTER / numbers.MIB:,.1f} MiB",
        )
        for rank, report in reports.items()
    ]
    return "\n".join(table(("rank", "trainable", "of all", "adapter, fp32"), rows, width or page_width()))
