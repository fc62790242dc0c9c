"""The kinds of value that a config's fields share: numbers with a range, lists, the short forms of a source.

Knows which values are allowed and how YAML may spell them. Doesn't know any field (`schema`), nor how a wrong
value is reported (`problems`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

Item = TypeVar("Item")

Text = Annotated[str, Field(min_length=1)]
LocalOrHub = Annotated[Text, AfterValidator(lambda path: _without_tilde(path))]
"""A file or folder, or an id on the hub. `~` is the home folder."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
NonNegativeNumber = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]

Alpha = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(lambda value, info: _or_twice_the_rank(value, info), json_schema_input_type=Count | None),
]

# Strict models take a tuple for a tuple and nothing else; YAML and most callers have lists.
ListOf = Annotated[tuple[Item, ...], Field(min_length=1, strict=False)]
ListOrEmpty = Annotated[tuple[Item, ...], Field(strict=False)]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
RowFormat = Literal["auto", "text", "instruction", "prompt_completion", "chat"]

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
"""transformers' schedules, except those that follow a measured loss (reduce_lr_on_plateau, greedy)."""

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "sgd",
    "adafactor",
    "rmsprop",
    "adagrad",
]

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Section(BaseModel):
    """A block of the config: frozen, strict (`"3"` is no number, `true` neither), closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,
    )


def as_sources(value: Any) -> Any:
    """One source as a list of one, and a bare path as a mapping: the short forms that YAML may use."""
    if isinstance(value, (str, dict, BaseModel)):
        value = [value]
    if isinstance(value, (list, tuple)):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


def _without_tilde(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~/") else path


def _or_twice_the_rank(alpha: Any, info: ValidationInfo) -> Any:
    # A rank that is itself a mistake is missing here, and reported on its own.
    return 2 * info.data.get("r", 1) if alpha is None else alpha
