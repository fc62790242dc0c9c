"""What is to be evaluated: a run folder, an adapter folder or a config, as one value.

Knows where an adapter names its base, and where its run says how it was trained. Loads nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.config import Config, load_config
from lora_cli.errors import ModelError, RunFolderError, UserError
from lora_cli.model.adapter import check_adapter_folder
from lora_cli.model.trust import refuse_links_out
from lora_cli.runs.folder import RunFolder

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Target:
    """What was trained, its base, and what is known of the training."""

    name: str
    """As it was given."""
    config: Config
    result: Path
    """The folder of the adapter; of the whole model, where it was trained in full (`adapter: null`)."""
    run: RunFolder | None
    """The run that made it, where there is one."""

    @property
    def bare(self) -> bool:
        """Nothing says how the adapter was trained: `config` holds its base, defaults, and no rows."""
        return self.run is None


def find_target(target: Path | str, overrides: Sequence[str] = ()) -> Target:
    """What `target` names, with `overrides` of its config.

    Raises:
        UserError: there is nothing there, or nothing that can be evaluated.
    """
    path = Path(target).expanduser()
    if path.is_file():
        return _of_run(str(target), path, overrides, folder=None)
    if not path.is_dir():
        raise UserError(
            f"nothing at {path.absolute()}", remedy="Give a run folder, an adapter folder or a config file."
        )
    if (path / _ADAPTER_CONFIG).is_file():
        run = RunFolder(path.absolute().parent)
        if run.config_file.is_file() and run.adapter_dir == path.absolute():
            return _of_run(str(target), run.config_file, overrides, folder=run)
        return _of_bare_adapter(str(target), path, overrides)
    run = RunFolder(path)
    if not run.config_file.is_file():
        raise UserError(
            f"{path.absolute()} holds neither {run.config_file.name} nor {_ADAPTER_CONFIG}",
            remedy="Give a run folder, an adapter folder or a config file.",
        )
    return _of_run(str(target), run.config_file, overrides, folder=run)


def adapter_folder(path: str) -> Path:
    """A further adapter: that of a run folder, or the folder itself.

    Raises:
        ModelError: there is no adapter that can be used.
    """
    folder = Path(path).expanduser()
    inner = RunFolder(folder).adapter_dir
    found = inner if inner.is_dir() else folder
    check_adapter_folder(found)
    return found


def _of_run(name: str, config_file: Path, overrides: Sequence[str], *, folder: RunFolder | None) -> Target:
    config = load_config(config_file, overrides)
    # A run folder may have been moved since; what lies in it goes before the output_dir in its config.
    run = folder or RunFolder(Path(config.output_dir))
    if not run.adapter_dir.is_dir():
        raise RunFolderError(
            f"no result at {run.adapter_dir.absolute()}",
            remedy="The run has not ended yet: `lora train CONFIG --resume` goes on with it."
            if run.holds_run
            else f"Train it first: lora train {config_file}",
        )
    if config.adapter is not None:
        check_adapter_folder(run.adapter_dir)
    return Target(name, config, run.adapter_dir, run)


def _of_bare_adapter(name: str, folder: Path, overrides: Sequence[str]) -> Target:
    check_adapter_folder(folder)
    settings = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{(folder / _ADAPTER_CONFIG).absolute()} names no base model (base_model_name_or_path)",
            remedy="Write the base's hub id or folder there, or give the config that it was trained with.",
        )
    refuse_links_out(Path(base).expanduser())
    minimal: dict[str, Any] = {
        "model": {"name_or_path": base, "revision": settings.get("revision")},
        "data": {"train": "-"},
        "output_dir": str(folder),
    }
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "adapter.yaml"
        file.write_text(json.dumps(minimal), encoding="utf-8")  # JSON is YAML
        config = load_config(file, overrides)
    return Target(name, config, folder, None)
