"""What a traced step leaves: each storage that lived, and the order in which they were born and died."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

WORKSPACE = "library workspace"
"""The operator of a birth that no operator made: a library's workspace, kept for good."""

EMPTY_CACHE = "empty cache"
"""The mark at which the allocator gives back what it has cached."""


@dataclass
class Birth:
    """One storage, or one block of a kernel's own scratch memory."""

    size_bytes: int
    kind: str
    """What it is for: `adapters`, `gradients`, `logits and loss`, ..."""
    phase: str
    """When it came: `load`, `forward`, `backward`, `update`."""
    place: str
    """The layer at work, such as `model.layers.31`; empty outside of layers."""
    operator: str
    """The ATen operator that made it."""


@dataclass
class Trace:
    """Births and deaths in order."""

    births: list[Birth] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    """`i + 1`: storage i is born; `-(i + 1)`: it dies."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Number of events at which something begins: `load`, `step 1`, `step 2`, a phase, or EMPTY_CACHE."""
    flops: dict[str, int] = field(default_factory=dict)
    """Floating-point operations of matrix products and attention since each mark of a step: `step 1`, `step 2`."""

    host_bytes: int = 0
    """The most that layers' inputs take of host memory."""

    rising_below: int = 0
    """Of the card that it is meant for: `allocator.rising_below`."""

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))
        if name.startswith("step "):
            self.flops[name] = 0

    def count(self, flops: int) -> None:
        """Operations of the step that goes on; those of loading belong to none."""
        if self.flops:
            self.flops[next(reversed(self.flops))] += flops

    def allocate(self, birth: Birth) -> int:
        """The number of the storage that is born."""
        self.births.append(birth)
        self.events.append(len(self.births))
        return len(self.births) - 1

    def free(self, number: int) -> None:
        self.events.append(-(number + 1))

    def with_workspace(self, size_bytes: int) -> Trace:
        """The same trace with libraries' lasting workspaces of another size."""
        births = [replace(b, size_bytes=size_bytes) if b.operator == WORKSPACE else b for b in self.births]
        return replace(self, births=births)

    def alive_after(self, count: int) -> Iterator[int]:
        """Storages alive after the first `count` events."""
        alive: dict[int, None] = {}
        for event in self.events[:count]:
            if event > 0:
                alive[event - 1] = None
            else:
                alive.pop(-event - 1, None)
        yield from alive
