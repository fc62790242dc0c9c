"""The plan of a run: everything that is known before the first step, as frozen values.

`train` prints it, `check` prints it, report.html repeats it, and at the start of a run it is checked against the
live model. Knows nothing about how a plan is made (`engine.planning`) or shown (`report`); never imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleKind:
    """All modules of one kind, such as the `q_proj` of every layer."""

    name: str
    modules: int
    """How many there are."""
    shape: str
    """The shape of the base weight, as `4096 x 1024`; empty where they differ."""
    base_parameters: int
    trainable_parameters: int
    """Trainable parameters that belong to it: its adapters, or its own in full fine-tuning."""


@dataclass(frozen=True)
class ParameterReport:
    """Parameter counts of a model with its adapter, per module kind. Tied weights count once."""

    trainable: int
    total: int
    by_module: tuple[ModuleKind, ...]

    @property
    def trainable_percent(self) -> float:
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "trainable": self.trainable,
            "total": self.total,
            "trainable_percent": self.trainable_percent,
            "by_module": {kind.name: asdict(kind) for kind in self.by_module},
        }


@dataclass(frozen=True)
class DataAccount:
    """What became of every row of a source.

    `rows` = `used` + `dropped`; `truncated` rows are among the used ones. `reasons` maps a reason for dropping
    to the places (`train.jsonl:17`) of all rows dropped for it.
    """

    rows: int
    used: int
    truncated: int
    dropped: int
    num_tokens: int
    num_supervised_tokens: int
    longest: int
    """Tokens of the longest row that is used."""
    longest_seen: int
    """Tokens of the longest row before truncation."""
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    longest_place: str | None = None
    """Where the longest row stands."""
    truncated_places: tuple[str, ...] = ()
    """Where the first truncated rows stand."""
    duplicates: int = 0
    """Examples that say exactly what an earlier one says."""
    duplicate_places: tuple[str, ...] = ()
    """Where the first of them stand."""
    lengths: tuple[tuple[int, int], ...] = ()
    """A histogram of the used examples: (most tokens, how many examples), in ascending order."""

    @property
    def supervised_percent(self) -> float:
        return 100.0 * self.num_supervised_tokens / self.num_tokens if self.num_tokens else 0.0


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the base model from its config.json."""

    name: str
    revision: str | None
    architecture: str
    dtype: str
    """The resolved compute dtype: bfloat16, float16 or float32."""
    quantization: str | None
    """Such as `nf4, double quant`; None for full precision."""
    adapter: str | None
    """Such as `r 16, alpha 32, 7 kinds of linear layer`; None for full fine-tuning."""
    remote_code: bool = False
    unquantized_bytes: int = 0
    """Bytes that quantization leaves in the compute dtype: embeddings, head, norms; 0 without quantization."""
    unquantized_percent: float = 0.0
    """The share of all parameters that it leaves."""


@dataclass(frozen=True)
class Steps:
    """The arithmetic of a run, in optimizer steps."""

    total: int
    per_epoch: int
    epochs: float
    batch_size: int
    """Examples per optimizer step, all devices together."""
    warmup: int
    learning_rate: float
    lr_scheduler_type: str


@dataclass(frozen=True)
class Engine:
    """How the step is carried out. Changes speed and memory, never the result."""

    device: str
    processes: int
    micro_batch_tokens: int
    packing: str
    """`documents` (own attention), `mask` (block-diagonal mask), or `single` (one document per row)."""
    loss: str
    """`chunked` or `full`."""
    gradient_checkpointing: bool
    dropout: float
    """The largest dropout probability that is active in the model; above 0, results depend on the packing."""
    notes: tuple[str, ...] = ()
    """Why something runs the slower way."""
    activation_offloading: bool = False
    """Checkpointed layers keep their inputs in host memory."""
    fusion: str | None = None
    """What runs by the fused arithmetic: `native` (whole layers on compiled kernels), `layers`, `linears`, or
    nothing."""
    flash4: bool = False
    """Attention runs by FlashAttention 4's kernels."""


@dataclass(frozen=True)
class Memory:
    """What the run is estimated to need on its device."""

    process_bytes: int
    """All that it takes of the device, as nvidia-smi counts it."""
    allocated_bytes: int
    """The most that PyTorch will have allocated, as `torch.cuda.max_memory_allocated` counts it."""
    device_bytes: int

    @property
    def fits(self) -> bool:
        return self.process_bytes <= self.device_bytes


@dataclass(frozen=True)
class Writes:
    """What the run will write."""

    output_dir: str
    checkpoint_bytes: int
    checkpoint_every: str
    """In words: `every 200 steps`, or `at the end`."""
    free_bytes: int
    peak_bytes: int = 0
    """The most that lies there at one time: checkpoints that are kept, the one being written, the result."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step."""

    model: ModelFacts
    parameters: ParameterReport
    data: DataAccount
    validation: DataAccount | None
    steps: Steps
    engine: Engine
    memory: Memory | None
    writes: Writes
    warnings: tuple[str, ...] = ()
