"""What a sweep leaves beside its members' folders for people to look at: report.html, of what is on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_cli.report.events import SweepSummary
from lora_cli.report.sweep_page import SweepReport, render_sweep_page
from lora_cli.report.sweeping import how_they_go
from lora_cli.runs.atomic import write_text
from lora_cli.runs.sweep import SweepFolder


def write_page(folder: SweepFolder, summary: SweepSummary, *, in_turn: bool, warnings: Sequence[str]) -> None:
    """Write the sweep's report.html; what members were made with is what the first of them was."""
    names = sorted(standing.name for standing in summary.members)
    environment = folder.member(names[0]).environment_file.read_text(encoding="utf-8")
    report = SweepReport(
        name=folder.path.name,
        summary=summary,
        metrics={name: folder.member(name).read_metrics() for name in names},
        config_text=folder.config_file.read_text(encoding="utf-8"),
        environment=json.loads(environment),
        how=how_they_go(in_turn),
        command=f"lora sweep {folder.config_file.name} --output-dir NEW",
        warnings=warnings,
    )
    write_text(folder.report_file, render_sweep_page(report))
