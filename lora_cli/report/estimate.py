"""The screen of `lora estimate-vram`: verdict first, then the peak, its parts, and the cards."""

from __future__ import annotations

from rich.cells import cell_len

from lora_cli.report import numbers
from lora_cli.report.estimated import Estimate
from lora_cli.report.layout import INDENT, labelled, page_width

BAR_WIDTH = 20
EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"


def render_estimate(estimate: Estimate, width: int | None = None) -> str:
    """The whole screen."""
    wide = page_width() if width is None else width
    lines = [*_verdict(estimate, wide), *_peak(estimate, wide), "", *_parts(estimate, wide), ""]
    lines += _cards(estimate, wide)
    if estimate.largest_micro_batch_tokens is not None:
        tokens = numbers.counts(estimate.largest_micro_batch_tokens)
        lines += labelled("largest", f"{tokens} tokens a micro-batch here", wide)
    lines += _changes(estimate, wide)
    for other in estimate.compared:
        card = f"from {other.smallest_card} on" if other.smallest_card else "on none of these cards"
        lines += labelled(other.name, f"{numbers.gib(other.process_bytes)}, {card}", wide)
    lines += labelled("work", _work(estimate), wide)
    lines += labelled("assumes", "; ".join(estimate.assumptions), wide)
    return "\n".join(lines)


def _verdict(estimate: Estimate, width: int) -> list[str]:
    needs = numbers.gib(estimate.process_bytes)
    if estimate.card_bytes is None:
        return labelled("needs", f"{needs}. No GPU or weights used", width)
    spare = estimate.card_bytes - estimate.process_bytes
    of_card = f"{needs} of {numbers.gib(estimate.card_bytes)}"
    if estimate.verdict == "yes":
        return labelled("fits", f"{of_card}, {numbers.gib(spare)} spare. No GPU or weights used", width)
    if estimate.verdict == "too close":
        error = numbers.gib(estimate.error_bytes)
        return labelled("too close", f"{of_card}, {numbers.gib(spare)} spare; the estimate's error is {error}", width)
    lines = labelled("no", f"does not fit: {of_card}, {numbers.gib(-spare)} too much", width)
    if estimate.base_bytes > estimate.card_bytes:
        lines += labelled("", f"the base alone takes {numbers.gib(estimate.base_bytes)}", width)
    return lines


def _peak(estimate: Estimate, width: int) -> list[str]:
    allocated = numbers.gib(estimate.peak_allocated_bytes, 2)
    reserved = numbers.gib(estimate.peak_reserved_bytes, 2)
    process = numbers.gib(estimate.process_bytes, 2)
    figures = f"{allocated} allocated, {reserved} reserved, {process} with CUDA's context (what nvidia-smi shows)"
    moment = f"{estimate.moment}; {numbers.counts(estimate.micro_batch_tokens)} tokens"
    return [*labelled("peak", figures, width), *labelled("", moment, width)]


def _parts(estimate: Estimate, width: int) -> list[str]:
    """One line for each part of at least half a percent, with a bar where there is room."""
    shown = {n: size for n, size in estimate.components.items() if size >= 0.005 * estimate.process_bytes}
    rest = estimate.process_bytes - sum(shown.values())
    if rest > 0:
        shown["the rest"] = rest
    label = max(map(cell_len, shown))
    largest = max(shown.values())
    lines = []
    for name, size in shown.items():
        line = f"{INDENT}{name:<{label}}  {numbers.gib(size, 2):>10}"
        bar = "█" * round(BAR_WIDTH * size / largest)
        lines.append(f"{line}  {bar}".rstrip() if cell_len(line) + 2 + BAR_WIDTH <= width else line)
    return lines


def _cards(estimate: Estimate, width: int) -> list[str]:
    lines = []
    for verdict, label in (("yes", "fits on"), ("too close", "too close"), ("no", "not on")):
        names = [card.name for card in estimate.cards if card.verdict == verdict]
        if names:
            lines += labelled(label, ", ".join(names), width)
    return lines


def _changes(estimate: Estimate, width: int) -> list[str]:
    """What would make it fit; the last change holds those before it."""
    if estimate.verdict in (None, "yes"):
        return []
    if estimate.expandable_fits and not estimate.expandable and estimate.expandable_process_bytes is not None:
        needs = numbers.gib(estimate.expandable_process_bytes)
        lines = labelled("fits with", f"{EXPANDABLE} in the environment of `lora train`: {needs}", width)
        return lines + _smaller(estimate, width)
    return _smaller(estimate, width)


def _smaller(estimate: Estimate, width: int) -> list[str]:
    if not estimate.changes or not estimate.changes[-1].fits:
        return labelled("smaller", "nothing in the config makes it fit this card", width)
    last = estimate.changes[-1]
    lines = labelled("smaller", f"{numbers.gib(last.process_bytes)} with", width)
    for setting in last.settings:
        costs = next((c.costs for c in estimate.changes if setting in c.settings and c.settings[-1] == setting), "")
        lines += labelled("", f"--set {_quoted(setting)}" + (f" ({costs})" if costs else ""), width)
    return lines


def _work(estimate: Estimate) -> str:
    """Operations a token; how many tokens there are, only the data can say."""
    work = f"{estimate.flops_per_token / 1e9:,.1f} GFLOP a token"
    seconds = estimate.seconds_per_million_tokens
    if seconds is None or estimate.tflops is None:
        return f"{work}; --tflops says how long a million tokens take"
    return f"{work}: {numbers.duration(seconds)} for a million tokens at {estimate.tflops:g} TFLOP/s"


def _quoted(setting: str) -> str:
    return f"'{setting}'" if " " in setting else setting
