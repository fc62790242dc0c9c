"""What an estimate of memory found, as frozen values.

`estimate` makes them, the screen lays them out, `--json` prints them. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["yes", "too close", "no"]


@dataclass(frozen=True)
class CardVerdict:
    """Whether one card runs it."""

    name: str
    memory_bytes: int
    process_bytes: int
    """What the run takes there."""
    verdict: Verdict
    micro_batch_tokens: int
    """The largest of those tried that fits; where none does, the smallest that was tried."""

    @property
    def fits(self) -> bool:
        return self.verdict == "yes"


@dataclass(frozen=True)
class Change:
    """A change of the config, rehearsed: what it saves and whether the run fits with it."""

    settings: tuple[str, ...]
    """`--set` arguments, `train.micro_batch_tokens=4096`; a change includes those before it."""
    process_bytes: int
    saves_bytes: int
    costs: str
    """What the user gives for it: `same result`, `about a third more time`."""
    fits: bool


@dataclass(frozen=True)
class Compared:
    """Another way to fine-tune the same model."""

    name: str
    process_bytes: int
    trainable: int
    smallest_card: str | None


@dataclass(frozen=True)
class Estimate:
    """The memory of a run at its peak."""

    peak_allocated_bytes: int
    """As `torch.cuda.max_memory_allocated` will say."""
    peak_reserved_bytes: int
    """As `torch.cuda.max_memory_reserved` will say."""
    process_bytes: int
    """With CUDA's context: what nvidia-smi shows."""
    error_bytes: int
    """How far off the estimate may be; a card with less to spare is too close."""
    components: dict[str, int]
    """Name to bytes at the peak; their sum is `process_bytes`."""
    moment: str
    """When the peak comes: `backward, model.layers.31`."""
    phases: dict[str, int]
    """Peak of allocated memory while loading, forward, backward and update."""
    micro_batch_tokens: int
    document_lengths: tuple[int, ...]
    gradient_checkpointing: bool
    activation_offloading: bool
    """Checkpointed layers keep their inputs in host memory."""
    card: str | None
    card_bytes: int | None
    verdict: Verdict | None
    """For the card that was asked about; None when none was."""
    base_bytes: int
    """The base's weights alone."""
    cards: tuple[CardVerdict, ...]
    changes: tuple[Change, ...]
    largest_micro_batch_tokens: int | None
    """For the card that was asked about, with `fit`."""
    compared: tuple[Compared, ...]
    assumptions: tuple[str, ...]
    flops_per_token: float = 0.0
    """Operations of products and attention to train on one token, recomputed layers included."""
    tflops: float | None = None
    """10^12 operations a second that the card is said to sustain."""
    host_bytes: int = 0
    """Page-locked host memory that layers' inputs take."""
    expandable: bool = False
    """The figures are those under PyTorch's `expandable_segments`."""
    expandable_process_bytes: int | None = None
    """What the process takes under it, on a card that is large enough."""
    expandable_fits: bool | None = None
    """Whether it fits under it, for the card that was asked about."""

    @property
    def seconds_per_million_tokens(self) -> float | None:
        return None if self.tflops is None else self.flops_per_token * 1e6 / (self.tflops * 1e12)

    @property
    def fits(self) -> bool | None:
        return None if self.verdict is None else self.verdict == "yes"

    @property
    def spare_bytes(self) -> int | None:
        return None if self.card_bytes is None else self.card_bytes - self.process_bytes

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "fits": self.fits,
            "spare_bytes": self.spare_bytes,
            "seconds_per_million_tokens": self.seconds_per_million_tokens,
            "cards": {card.name: card.fits for card in self.cards},
            "card_verdicts": [asdict(card) for card in self.cards],
        }
