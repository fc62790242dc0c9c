"""The screen of `merge`, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.report import numbers
from lora_cli.report.layout import INDENT, command, labelled, page_width, short_path, table, warning, wrap

if TYPE_CHECKING:
    from lora_cli.export import Exported
    from lora_cli.merge import CombinedAdapter, Extraction, MergeReport
    from lora_cli.merge.result import Likeness


def render_merge(report: MergeReport, width: int | None = None) -> str:
    """What `merge` shows at the end."""
    width = width or page_width()
    rows = [("merged", _merged(report)), ("base", f"{report.base.base}; {report.base.why}")]
    if report.verification is not None:
        rows += [("checked", _checked(report)), ("control", _control(report))]
    rows.append(("verdict", _verdict(report)))
    if report.problem is not None:
        rows.append(("kept", f"{short_path(report.output)}, for a look; nothing has the name asked for"))
    lines = [line for label, text in rows for line in labelled(label, text, width)]
    warnings = [line for text in report.warnings for line in warning(text, width)]
    return "\n".join([*lines, "", *warnings] if warnings else lines)


def render_combination(result: CombinedAdapter, width: int | None = None) -> str:
    """What `merge --as-adapter` shows at the end."""
    width = width or page_width()
    rows = [("adapter", f"{short_path(result.output)}, rank {result.rank}"), ("made of", result.combination)]
    return "\n".join(line for label, text in rows for line in labelled(label, text, width))


def render_extraction(found: Extraction, width: int | None = None, *, layers: int = 12) -> str:
    """What `extract` shows: how much of each layer's change the adapter explains, the worst layers first."""
    width = width or page_width()
    worst = sorted(found.modules, key=lambda module: -module.error)
    rows = [
        (module.name, str(module.rank), numbers.percent(100 * module.change, 2), numbers.percent(100 * module.error))
        for module in worst[:layers]
    ]
    lines = table(("layer", "rank", "change", "missed"), rows, width)
    if len(worst) > layers:
        lines += wrap(f"and {len(worst) - layers:,} layers that miss less; all are in --json", width, first=INDENT)
    size = f"{short_path(found.output)}, rank {found.rank}, {numbers.size(found.num_bytes)}"
    facts = [
        ("adapter", size),
        ("missed", f"{numbers.percent(100 * found.error)} of the change of {len(worst):,} layers together"),
    ]
    if found.saved_whole:
        facts.append(("whole", ", ".join(found.saved_whole)))
    if found.left_out:
        facts.append(("not held", f"{len(found.left_out):,} other tensors that changed: {_some(found.left_out)}"))
    check = found.likeness
    if check is not None:
        facts.append(("checked", _likeness(check)))
    return "\n".join([*lines, "", *(line for label, text in facts for line in labelled(label, text, width))])


def render_export(found: Exported, width: int | None = None) -> str:
    """What `export` shows: what was written, and the command that starts it."""
    width = width or page_width()
    facts = []
    if found.output is not None and found.num_bytes is not None:
        tensors = f", {numbers.counted(found.tensors, 'tensor')}" if found.tensors else ""
        facts.append(("wrote", f"{short_path(found.output)}, {numbers.size(found.num_bytes)}"))
        facts.append((found.what, f"{found.architecture}, {found.type}{tensors}"))
    facts += [("note", note) for note in found.notes]
    lines = [line for label, text in facts for line in labelled(label, text, width)]
    # An adapter's command names a base that the user has to put there.
    label = "serve" if not facts else "next" if found.what == "model" else "use"
    return "\n".join([*lines, *command(found.command, width, first=f"{INDENT}{label:<9}")])


def _likeness(check: Likeness) -> str:
    return (
        f"{numbers.counted(check.positions, 'position')} of {check.rows} against the tuned model\n"
        f"KL {check.kl_adapter:.1e}, of the base alone {check.kl_base:.1e}; same top token "
        f"{numbers.percent(100 * check.top1_adapter, 2)}, {numbers.percent(100 * check.top1_base, 2)}\n"
        f"loss {numbers.loss(check.loss_adapter)}, tuned {numbers.loss(check.loss_tuned)}, "
        f"base {numbers.loss(check.loss_base)}"
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _merged(report: MergeReport) -> str:
    tensors = f"{numbers.counted(report.tensors, 'tensor')}, {numbers.counts(report.changed)} changed"
    files = f"{report.dtype}, {numbers.size(report.num_bytes)}, {numbers.counted(report.shards, 'shard')}"
    effort = f"{numbers.duration(report.seconds)}, {numbers.size(report.peak_memory_bytes)} RAM"
    rounding = "" if report.dtype == "float32" else f", rounded once to {report.dtype}"
    return f"{tensors}; {files}; {effort}\nsummed in float32{rounding}"


def _checked(report: MergeReport) -> str:
    check = report.verification
    assert check is not None
    return (
        f"{numbers.counted(check.positions, 'position')} of {check.rows} against base + adapter\n"
        f"largest logit difference {check.max_logit_difference:.2g} ({check.tolerance:.2g} is tolerated), "
        f"KL {check.kl:.1e}, same top token {numbers.percent(100 * check.top1_agreement, 2)}\n"
        f"loss {numbers.loss(check.loss_merged)}, base + adapter {numbers.loss(check.loss_adapter)}, "
        f"base {numbers.loss(check.loss_base)}"
    )


def _control(report: MergeReport) -> str:
    check = report.verification
    assert check is not None
    shown = check.mean_control > check.mean_tolerance
    verdict = "the adapter is in it" if shown else "too little to tell from rounding"
    return f"differs from the base by up to {check.control:.3g}: {verdict}"


def _verdict(report: MergeReport) -> str:
    if report.problem is not None:
        return report.problem if report.changed == 0 else f"not verified: {report.problem}"
    if report.verification is None:
        return "every tensor accounted for; numbers not compared"
    return "verified"
