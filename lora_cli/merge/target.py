"""What `lora merge` is pointed at: a run, an adapter or a config, and which base belongs to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lora_cli.config import Config, ModelConfig, load_config
from lora_cli.engine.provenance import base_has_changed
from lora_cli.errors import ModelError, RunFolderError, UserError
from lora_cli.model.adapter import check_adapter_folder
from lora_cli.model.architecture import looks_like_folder
from lora_cli.model.trust import refuse_links_out
from lora_cli.runs.folder import RunFolder

_ADAPTER_CONFIG = "adapter_config.json"
_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]


@dataclass(frozen=True)
class Target:
    """An adapter and its base."""

    adapter: Path
    model: ModelConfig
    config: Config | None
    """The run's, where the adapter is a run's."""
    run: RunFolder | None
    tokenizer: Path
    """Where the tokenizer that was trained with lies, if anywhere."""
    combination: str | None = None
    """In words, where the adapter is made of several."""

    @property
    def name(self) -> str:
        """How the adapter is called in the model card."""
        return self.run.path.resolve().name if self.run is not None else self.adapter.resolve().name


def find_target(text: str) -> Target:
    """The adapter that `text` names: a run folder, an adapter folder, or the config of a run.

    Raises:
        UserError: there is no such thing, or nothing in it to merge.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return _of_run(RunFolder(Path(load_config(path).output_dir)))
    if not path.is_dir():
        raise UserError(f"no run folder, adapter folder or config at {path.absolute()}")
    run = RunFolder(path)
    if run.config_file.is_file():
        return _of_run(run)
    if (path / _ADAPTER_CONFIG).is_file():
        above = RunFolder(path.resolve().parent)
        if above.config_file.is_file() and above.adapter_dir == path.resolve():
            return _of_run(above)
        return _of_adapter(path)
    if (path / "config.json").is_file():
        raise UserError(
            f"{path.absolute()} is a whole model, not an adapter",
            remedy="Full fine-tuning needs no merge.",
        )
    raise UserError(f"{path.absolute()} is neither a run folder (config.yaml) nor an adapter ({_ADAPTER_CONFIG})")


def _of_run(run: RunFolder) -> Target:
    if not run.config_file.is_file():
        raise RunFolderError(f"{run.path.absolute()} holds no run", remedy="Train it first: lora train CONFIG")
    config = load_config(run.config_file)
    if config.adapter is None:
        raise UserError(
            f"{run.path.absolute()} is a run of full fine-tuning (adapter: null)",
            remedy=f"There is nothing to merge: {run.adapter_dir.absolute()} is the whole model.",
        )
    if not run.adapter_dir.is_dir():
        raise RunFolderError(
            f"{run.path.absolute()} has no adapter yet: the run hasn't ended",
            remedy=f"Continue it with: lora train {run.config_file} --resume",
        )
    check_adapter_folder(run.adapter_dir)
    return Target(run.adapter_dir, config.model, config, run, run.adapter_dir)


def _of_adapter(path: Path) -> Target:
    check_adapter_folder(path)
    settings = json.loads((path / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = settings.get("base_model_name_or_path")
    if not name:
        raise ModelError(
            f"{(path / _ADAPTER_CONFIG).absolute()} names no base model",
            remedy="Write the base's folder or hub id to base_model_name_or_path.",
        )
    refuse_links_out(Path(name).expanduser())
    return Target(path, ModelConfig(name_or_path=name, revision=settings.get("revision")), None, None, path)


def base_folder(model: ModelConfig) -> Path:
    """The folder that holds the base: its own, or the hub's snapshot of it.

    Raises:
        ModelError: the hub can't be reached, or has no such model.
    """
    if looks_like_folder(model.name_or_path):
        return Path(model.name_or_path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.name_or_path, revision=model.revision, allow_patterns=_MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model.name_or_path}: the hub gave no such model: {str(error).strip().splitlines()[0]}",
            remedy="Without network: copy the model's folder here and give its path as the run's model.name_or_path.",
        ) from error


def check_same_base(target: Target, folder: Path) -> None:
    """Refuse a base that isn't the one that the run was trained on.

    Raises:
        ModelError: the run noted another fingerprint of its base's weights.
    """
    if target.run is not None and base_has_changed(target.run, folder):
        raise ModelError(
            f"{folder.absolute()} isn't the base that {target.run.path.absolute()} was trained on: "
            "its weights have changed",
            remedy="Put the same revision back in its place.",
        )
