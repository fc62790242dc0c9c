"""A trace through the allocator: peaks of allocated and reserved memory, and what is alive at the peak."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from lora_cli.engine.memory.allocator import CachingAllocator
from lora_cli.engine.memory.expandable import ExpandableAllocator
from lora_cli.engine.memory.trace import EMPTY_CACHE, Birth, Trace


@dataclass(frozen=True)
class Replay:
    """What a trace needs of a card, from a mark on."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    phases: dict[str, int]
    """Peak of allocated memory in each phase."""
    components: dict[str, int]
    """Bytes alive at the peak of allocated memory, by kind, the largest first."""
    moment: Birth
    """The birth that made the peak."""


def replay(trace: Trace, *, since: str = "load", capacity_bytes: int | None = None, expandable: bool = False) -> Replay:
    """Run a trace through the allocator; peaks count from the last mark named `since`.

    Raises:
        OutOfCard: `capacity_bytes` doesn't hold it.
    """
    kind = ExpandableAllocator if expandable else CachingAllocator
    allocator = kind(capacity_bytes, rising_below=trace.rising_below)
    marks = defaultdict(list)
    for position, name in trace.marks:
        marks[position].append(name)
    start = max(position for position, name in trace.marks if name == since)
    addresses: dict[int, int] = {}
    phases: dict[str, int] = {}
    phase, peak, peak_event = "", -1, 0
    for position, event in enumerate(trace.events):
        for name in marks.get(position, ()):
            if name == EMPTY_CACHE:
                allocator.empty_cache()
            else:
                phase = name
        if position == start:
            allocator.reset_peaks()
            phases.clear()
            peak = -1
        if event > 0:
            addresses[event - 1] = allocator.allocate(trace.births[event - 1].size_bytes)
            phases[phase] = max(phases.get(phase, 0), allocator.allocated_bytes)
            if allocator.allocated_bytes > peak:
                peak, peak_event = allocator.allocated_bytes, position
        else:
            allocator.free(addresses.pop(-event - 1))
    components: dict[str, int] = defaultdict(int)
    for number in trace.alive_after(peak_event + 1):
        components[trace.births[number].kind] += trace.births[number].size_bytes
    components["rounding"] = peak - sum(components.values())
    return Replay(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        phases=phases,
        components=dict(sorted(components.items(), key=lambda item: -item[1])),
        moment=trace.births[trace.events[peak_event] - 1],
    )
