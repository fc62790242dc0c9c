"""The verdict on an adapter, in words that its figures carry."""

from __future__ import annotations

import math

from lora_cli.report.comparison import FEWEST_ROWS, Measure, Outcome


def decide(loss: Measure, rows: int, better: int, worse: int) -> Outcome:
    """What the loss and its interval say. Nothing is called better or worse that chance could have made."""
    if not math.isfinite(loss.base):
        return "can't tell"
    if not math.isfinite(loss.adapter):
        return "worse"
    if better == worse == 0:
        return "no difference"
    if rows < FEWEST_ROWS:
        return "can't tell"
    if loss.high < 0:
        return "better"
    return "worse" if loss.low > 0 else "can't tell"


def in_words(outcome: Outcome, loss: Measure, rows: int, better: int, worse: int) -> str:
    """Such as `better: loss -0.4101, 95 % interval -0.4702 to -0.3510, 188 of 200 rows improved`."""
    counted = f"{rows:,} row{'s' if rows != 1 else ''}"
    if not math.isfinite(loss.difference):
        return f"{outcome}: the {'base' if not math.isfinite(loss.base) else 'adapter'}'s loss is not finite"
    if outcome == "no difference":
        return "no difference: every row has the same loss with the adapter and without"
    text = f"{outcome}: loss {loss.difference:+.4f}"
    if rows < FEWEST_ROWS:
        return f"{text}, but {counted} are too few to be sure" if rows > 1 else f"{text}, but on a single row"
    text += f", 95 % interval {loss.low:+.4f} to {loss.high:+.4f}"
    if outcome == "better":
        return f"{text}, {better:,} of {counted} improved"
    if outcome == "worse":
        return f"{text}, {worse:,} of {counted} got worse"
    return f"{text}, {counted}"
