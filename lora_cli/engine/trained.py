"""What a command is pointed at once something was trained: a run folder, an adapter folder, a config, or a whole model.

Knows where an adapter names its base, and where its run says how it was trained. Loads nothing.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.config import Config, ModelConfig, load_config
from lora_cli.engine.provenance import base_has_changed
from lora_cli.errors import ModelError, RunFolderError, UserError
from lora_cli.model.adapter import check_adapter_folder
from lora_cli.model.architecture import looks_like_folder
from lora_cli.model.trust import refuse_links_out
from lora_cli.runs.folder import RunFolder

_ADAPTER_CONFIG = "adapter_config.json"
_ANY = "Give a run folder, an adapter folder or a config file."
_QUANTIZED_OR_NOT = (
    "nothing says whether the adapter was trained on a quantized base; it is judged on one that isn't. "
    "If it was: --set 'model.quantization={type: nf4}'"
)


@dataclass(frozen=True)
class Target:
    """What was trained, its base, and what is known of the training."""

    name: str
    """As it was given."""
    config: Config
    result: Path
    """The folder of the adapter; of the whole model, where it was trained in full (`adapter: null`). The tokenizer
    that was trained with lies there, too."""
    run: RunFolder | None
    """The run that made it, where there is one."""
    whole: bool = False
    """A model by itself, not made by a run that is known: a base, or a merged one."""

    @property
    def bare(self) -> bool:
        """Nothing says how it was trained: `config` holds its base, defaults, and no rows."""
        return self.run is None

    @property
    def model(self) -> ModelConfig:
        """The base, as it was trained on."""
        return self.config.model

    @property
    def doubts(self) -> tuple[str, ...]:
        """What isn't known of the training, and might be taken for granted."""
        if not self.bare or self.config.model.quantization is not None:
            return ()
        return (_QUANTIZED_OR_NOT,)

    @property
    def title(self) -> str:
        """How it is called in a model card."""
        return (self.run.path if self.run is not None else self.result).resolve().name


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    return (folder / _ADAPTER_CONFIG).is_file()


def find_target(target: Path | str, overrides: Sequence[str] = (), *, whole_models: bool = False) -> Target:
    """What `target` names, with `overrides` of its config; with `whole_models` also a model's folder or hub id.

    Raises:
        UserError: there is nothing there, or nothing that can be used.
    """
    path = Path(target).expanduser()
    if path.is_file():
        return _of_run(str(target), path, overrides, folder=None)
    if not path.is_dir():
        if whole_models and not looks_like_folder(str(target)):
            return _whole(str(target), path, overrides)
        raise UserError(f"nothing at {path.absolute()}", remedy=_ANY)
    if is_adapter(path):
        run = RunFolder(path.absolute().parent)
        if run.config_file.is_file() and run.adapter_dir == path.absolute():
            return _of_run(str(target), run.config_file, overrides, folder=run)
        return _of_bare_adapter(str(target), path, overrides)
    run = RunFolder(path)
    if run.config_file.is_file():
        return _of_run(str(target), run.config_file, overrides, folder=run)
    if (path / "config.json").is_file():
        if whole_models:
            return _whole(str(target), path, overrides)
        raise UserError(
            f"{path.absolute()} is a whole model, not an adapter: it has no base",
            remedy=f"{_ANY}\nTo judge it beside the run that it was made of: lora eval RUN --adapter {path}",
        )
    raise UserError(f"{path.absolute()} holds neither {run.config_file.name} nor {_ADAPTER_CONFIG}", remedy=_ANY)


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


def split_weight(text: str) -> tuple[str, float]:
    """`DIR:0.7` as the folder and its weight; without one the weight is 1."""
    if Path(text).expanduser().exists():
        return text, 1.0
    found = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+))", text)
    return (found[1], float(found[2])) if found else (text, 1.0)


def check_same_base(target: Target, folder: Path) -> None:
    """Refuse a base, in `folder`, that isn't the one that the run was trained on.

    Raises:
        ModelError: the run noted another fingerprint of its base's weights.
    """
    if target.run is not None and base_has_changed(target.run, folder):
        raise ModelError(
            f"{folder.absolute()} isn't the base that {target.name} was trained on: its weights have changed",
            remedy="Put the same revision back in its place.",
        )


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
    return Target(name, _minimal(base, settings.get("revision"), folder, overrides), folder, None)


def _whole(name: str, folder: Path, overrides: Sequence[str]) -> Target:
    return Target(name, _minimal(name, None, folder, [*overrides, "adapter=null"]), folder, None, whole=True)


def _minimal(base: str, revision: str | None, folder: Path, overrides: Sequence[str]) -> Config:
    """A config that says no more than which base it is."""
    model = {"name_or_path": base, "revision": revision, "quantization": _comes_quantized(Path(base).expanduser())}
    minimal: dict[str, Any] = {
        "model": model,
        "data": {"train": "-"},
        "output_dir": str(folder),
    }
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "adapter.yaml"
        file.write_text(json.dumps(minimal), encoding="utf-8")  # JSON is YAML
        return load_config(file, overrides)


def _comes_quantized(base: Path) -> dict[str, Any] | None:
    """The quantization that a base in a folder brings along, if bitsandbytes made it; others are refused where used."""
    file = base / "config.json"
    if not file.is_file():  # a pipe isn't one either
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    if found.get("quant_method") != "bitsandbytes":
        return None
    if found.get("load_in_8bit"):
        return {"type": "int8"}
    return {
        "type": found.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(found.get("bnb_4bit_use_double_quant")),
    }
