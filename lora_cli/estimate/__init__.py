"""`lora estimate-vram`: the memory of a run, before there is a card: peak, parts, verdicts, and what would make it fit.

Asks the engine's rehearsal; knows cards and verdicts. Needs no GPU, no weights and no data: a config.json is enough.
"""

from __future__ import annotations

from lora_cli.estimate.estimation import estimate_vram
from lora_cli.report.estimated import CardVerdict, Change, Compared, Estimate

__all__ = ["CardVerdict", "Change", "Compared", "Estimate", "estimate_vram"]
