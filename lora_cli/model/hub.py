"""Where a model's files lie: in its own folder, or in the cache of the hub."""

from __future__ import annotations

from pathlib import Path

from lora_cli.config import ModelConfig
from lora_cli.errors import ModelError
from lora_cli.model.architecture import looks_like_folder

_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]


def model_folder(model: ModelConfig) -> Path:
    """The folder that holds the model: its own, or the hub's snapshot of it.

    Raises:
        ModelError: the hub can't be reached, or has no such model.
    """
    if looks_like_folder(model.name_or_path):
        return Path(model.name_or_path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.name_or_path, revision=model.revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model.name_or_path}: the hub gave no such model: {str(error).strip().splitlines()[0]}",
            remedy="Without network: copy the model's folder here and give its path as the run's model.name_or_path.",
        ) from error
