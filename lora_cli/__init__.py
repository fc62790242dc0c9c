"""Fine-tune language models with LoRA and QLoRA from one YAML file.

    config = load_config("run.yaml")
    print(estimate_vram(config))
    summary = train(config)

The functions behind the commands, with typed, frozen results. Importing this package imports nothing
else; each function loads what it needs when it is first looked up.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_cli.config import load_config, load_grid
    from lora_cli.estimate import estimate_vram
    from lora_cli.evaluate import evaluate
    from lora_cli.merge import extract, merge
    from lora_cli.sweep import sweep
    from lora_cli.train import train

__version__ = "0.1.0"

__all__ = ["__version__", "estimate_vram", "evaluate", "extract", "load_config", "load_grid", "merge", "sweep", "train"]

_HOMES = {
    "load_config": "lora_cli.config",
    "train": "lora_cli.train",
    "estimate_vram": "lora_cli.estimate",
    "merge": "lora_cli.merge",
    "extract": "lora_cli.merge",
    "evaluate": "lora_cli.evaluate",
    "load_grid": "lora_cli.config",
    "sweep": "lora_cli.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Library(ModuleType):
    """This package, with its functions where rooms of the same name would be.

    Python binds a loaded room to its package: without this, `lora_cli.train` would be the function until
    something imports `lora_cli.train.checkpoints`, and a module from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Library
