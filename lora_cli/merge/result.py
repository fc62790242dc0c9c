"""What a merge came to, as frozen values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

BaseChoice = Literal["original", "quantized"]
Method = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@dataclass(frozen=True)
class Distance:
    """How far the logits of one model are from another's."""

    largest: float
    mean: float
    kl: float
    """Nats per position, from the reference to the other."""
    top1_agreement: float


@dataclass(frozen=True)
class ChosenBase:
    """The weights that the adapter was merged into."""

    base: BaseChoice
    why: str
    kl_original: float | None = None
    """From the model as it was trained to a merge into the original weights; None where nothing was quantized."""
    kl_quantized: float | None = None


@dataclass(frozen=True)
class Verification:
    """The merged model against base + adapter, on text."""

    rows: str
    positions: int
    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    top1_agreement: float
    loss_base: float
    loss_adapter: float
    loss_merged: float
    """Nats per scored token."""
    tolerance: float
    """For the largest logit difference: four times what rounding alone does."""
    mean_tolerance: float
    """The same for the mean difference, which one expert chosen differently doesn't drown."""
    control: float
    """Largest logit difference between the merged model and the base."""
    mean_control: float
    verified: bool
    seconds: float


@dataclass(frozen=True)
class CombinedAdapter:
    """Several adapters as one."""

    output: str
    combination: str
    """Method, parts and weights, in words."""
    rank: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Explained:
    """A layer of an extracted adapter."""

    name: str
    rank: int
    error: float
    """What the product misses of the layer's change, relative to that change (Frobenius norms)."""
    change: float
    """The layer's change, relative to the base's weight."""
    norm: float
    """The layer's change itself (Frobenius norm)."""


@dataclass(frozen=True)
class Likeness:
    """How near the base, and base + adapter, are to the tuned model on text. KL in nats per position."""

    rows: str
    positions: int
    kl_base: float
    kl_adapter: float
    top1_base: float
    top1_adapter: float
    loss_tuned: float
    loss_base: float
    loss_adapter: float


@dataclass(frozen=True)
class Extraction:
    """What `lora extract` did."""

    output: str
    rank: int
    modules: tuple[Explained, ...]
    """Layers that changed; those that didn't are not in the adapter."""
    saved_whole: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tensors that changed and that the adapter doesn't hold."""
    num_bytes: int
    likeness: Likeness | None
    """None when the numbers were not asked for."""

    @property
    def error(self) -> float:
        """Over all layers: what is missed of the change, relative to it."""
        total = sum(module.norm**2 for module in self.modules)
        missed = sum((module.error * module.norm) ** 2 for module in self.modules)
        return float((missed / total) ** 0.5) if total else 0.0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


@dataclass(frozen=True)
class MergeReport:
    """What `lora merge` did."""

    output: str
    """Where the result lies; not under the name asked for unless it is fit for use."""
    tensors: int
    changed: int
    dtype: str
    num_bytes: int
    shards: int
    base: ChosenBase
    verification: Verification | None
    """None when the numbers were not asked for."""
    problem: str | None
    """Why the answer is no: no effect, not verified."""
    warnings: tuple[str, ...]
    seconds: float
    """Without imports and without verification."""
    peak_memory_bytes: int
    """Of the whole process."""

    @property
    def verified(self) -> bool | None:
        if self.problem is not None:
            return False
        return None if self.verification is None else self.verification.verified

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verified": self.verified}
