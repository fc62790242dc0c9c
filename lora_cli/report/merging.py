"""The screen of `merge`, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.report import numbers
from lora_cli.report.layout import labelled, page_width, short_path, warning

if TYPE_CHECKING:
    from lora_cli.merge import CombinedAdapter, MergeReport


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


def _merged(report: MergeReport) -> str:
    tensors = f"{numbers.counted(report.tensors, 'tensor')}, {numbers.counts(report.changed)} changed"
    files = f"{report.dtype}, {numbers.size(report.num_bytes)}, {numbers.counted(report.shards, 'shard')}"
    effort = f"{numbers.duration(report.seconds)}, {numbers.size(report.peak_memory_bytes)} RAM"
    return f"{tensors}; {files}; {effort}\none rounding, from fp32 to {report.dtype}"


def _checked(report: MergeReport) -> str:
    check = report.verification
    assert check is not None
    return (
        f"{numbers.counted(check.positions, 'position')} of {check.rows} against base + adapter\n"
        f"largest logit difference {check.max_logit_difference:.2g} ({check.tolerance:.2g} is tolerated), "
        f"KL {check.kl:.1e}, same top token {check.top1_agreement:.2%}\n"
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
