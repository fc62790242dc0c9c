"""What may change between the start of a run and its resumption."""

from __future__ import annotations

from typing import Any

from lora_cli.config import Config
from lora_cli.config.resolved import with_absolute_paths
from lora_cli.errors import RunFolderError
from lora_cli.runs.folder import RunFolder

HARMLESS = frozenset(
    {"output_dir", "data.cache", "train.logging_steps", "train.save_steps", "train.save_minutes"}
    | {"train.save_total_limit", "train.report_to", "train.micro_batch_tokens", "train.num_train_epochs"}
    | {"train.max_steps", "train.eval_steps", "train.early_stopping_patience"}
    | {"train.gradient_checkpointing", "train.activation_offloading", "train.flash_attention_4"}
)
"""Settings that can't change the steps already taken. Epochs and max_steps extend a run."""

_WISHES = {"train.loss": "chunked", "model.attn_implementation": "documents"}
"""What a model may be unable to do: what it did instead was settled at the start, as `auto` was."""


def refuse_differences(before: Config, now: Config, folder: RunFolder) -> Config:
    """`before` with the harmless settings of `now`.

    What is `auto` now was resolved once, at the start, and isn't resolved again.

    Raises:
        RunFolderError: a difference that matters; each is named with both values.
    """
    if now.adapter is not None and now.adapter.path is not None and before.adapter is not None:
        # Its settings came from the adapter that it went on from, and stand in the resolved config.
        resolved = before.adapter.model_copy(update={"path": now.adapter.path})
        now = now.model_copy(update={"adapter": resolved})
    old, new = _flat(before.model_dump(mode="json")), _flat(with_absolute_paths(now).model_dump(mode="json"))
    serious = [
        f"{key}: {_shown(old.get(key))} there, {_shown(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if key not in HARMLESS and new.get(key) not in (old.get(key), "auto", _WISHES.get(key, "auto"))
    ]
    if serious:
        raise RunFolderError(
            f"{folder.path} was started with another config, in {len(serious)} settings that matter",
            remedy="\n".join([*serious, "Put them back, or start anew with --output-dir."]),
        )
    harmless = (key.removeprefix("train.") for key in HARMLESS if "train." in key)
    kept = {name: getattr(now.train, name) for name in harmless if getattr(now.train, name) != "auto"}
    # Only what is checkpointed can be offloaded: whichever is given now decides about what was settled of the other.
    if kept.get("activation_offloading"):
        kept.setdefault("gradient_checkpointing", True)
    if kept.get("gradient_checkpointing") is False:
        kept.setdefault("activation_offloading", False)
    return before.model_copy(update={"train": before.train.model_copy(update=kept), "output_dir": now.output_dir})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found.update(_flat(inner, f"{prefix}.{key}" if prefix else key))
        return found
    return {prefix: value}


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
