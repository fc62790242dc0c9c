"""An estimate in words and figures, of a need that has been rehearsed: parts, moment, assumptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.estimate.cards import GIB, Card
from lora_cli.report.estimated import CardVerdict, Change, Compared, Estimate, Verdict

if TYPE_CHECKING:
    from lora_cli.engine.memory.need import Need


def describe(
    need: Need,
    card: Card | None,
    verdict: Verdict | None,
    *,
    cards: tuple[CardVerdict, ...],
    changes: tuple[Change, ...],
    largest: int | None,
    compared: tuple[Compared, ...],
    notes: tuple[str, ...],
    tflops: float | None = None,
) -> Estimate:
    """The estimate of a need."""
    from lora_cli.engine.memory.need import MARGIN

    replayed = need.replayed
    parts = dict(replayed.components)
    rounding = parts.pop("rounding", 0)
    process_bytes = need.process_bytes if card is None else need.process_bytes_on(card.memory_bytes)
    expandable = need.with_expandable_segments()
    parts["fragmentation"] = process_bytes - need.context_bytes - replayed.peak_allocated_bytes + rounding
    parts["context"] = need.context_bytes
    moment = replayed.moment
    return Estimate(
        peak_allocated_bytes=replayed.peak_allocated_bytes,
        peak_reserved_bytes=replayed.peak_reserved_bytes,
        process_bytes=process_bytes,
        error_bytes=int(MARGIN * replayed.peak_reserved_bytes),
        components={name: size for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size > 0},
        moment=", ".join(part for part in (moment.phase, _layer(moment.place)) if part),
        phases=replayed.phases,
        micro_batch_tokens=need.shape.num_tokens,
        document_lengths=need.shape.document_lengths,
        gradient_checkpointing=bool(need.config.train.gradient_checkpointing),
        activation_offloading=bool(need.config.train.activation_offloading),
        card=None if card is None else card.name,
        card_bytes=None if card is None else card.memory_bytes,
        verdict=verdict,
        base_bytes=need.base_bytes,
        cards=cards,
        changes=changes,
        largest_micro_batch_tokens=largest,
        compared=compared,
        assumptions=(*_assumptions(need, card), *notes),
        flops_per_token=need.flops_per_token,
        tflops=tflops,
        host_bytes=need.trace.host_bytes,
        expandable=need.expandable,
        expandable_process_bytes=expandable.process_bytes,
        expandable_fits=None if card is None else expandable.fits(card.memory_bytes),
    )


def _assumptions(need: Need, card: Card | None) -> list[str]:
    from lora_cli.engine.memory.context import context_measured
    from lora_cli.engine.memory.need import MARGIN

    train, longest = need.config.train, max(need.shape.document_lengths)
    checkpointing = "with" if train.gradient_checkpointing else "without"
    lines = [
        f"micro-batches of {need.shape.num_tokens:,} tokens {checkpointing} gradient checkpointing",
        f"the worst case: full micro-batches of examples of {longest:,} tokens, every token supervised",
        "one process alone on the card",
    ]
    if need.trace.host_bytes:
        lines.append(f"layers' inputs in host memory, {need.trace.host_bytes / GIB:.1f} GiB of it page-locked")
    if card is not None:
        lines.append(f"{MARGIN:.0%} of what is reserved is kept free")
    if card is not None and not card.source:
        lines.append(f"{card.gib:g} GiB on {card.name}, as on other cards of its size: no report of its own was found")
    if card is None:
        lines.append("an Ampere card or newer, in bfloat16")
    if not context_measured(need.target):
        lines.append(f"{need.context_bytes / GIB:.1f} GiB for CUDA's context, not measured on this architecture")
    if need.expandable:
        lines.append("expandable segments in PyTorch's allocator")
    if train.optim.startswith("paged_"):
        lines.append("the paged optimizer's state can leave the card, and is not counted")
    return lines


def _layer(place: str) -> str:
    return place.removeprefix("base_model.model.")
