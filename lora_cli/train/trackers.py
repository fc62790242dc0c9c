"""Metrics to experiment trackers, by accelerate's names: tensorboard, wandb, mlflow, trackio.

What they print goes to stderr: stdout is for the summary, or for one JSON document.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lora_cli.config import Config
from lora_cli.errors import UserError


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run; none of them is a valid number of trackers."""

    trackers: tuple[Any, ...] = ()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics to each tracker."""
        values = {key: value for key, value in metrics.items() if key != "step"}
        with redirect_stdout(sys.stderr):
            for tracker in self.trackers:
                tracker.log(values, step=metrics["step"])

    def finish(self) -> None:
        """Flush and close them."""
        with redirect_stdout(sys.stderr):
            for tracker in self.trackers:
                tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package isn't there.

    Raises:
        UserError: with what to install.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.report_to: {name} is not installed", remedy=f'pip install "lora-cli[{name}]", or leave it out'
            )


def start_trackers(config: Config, logging_dir: str, settings: dict[str, Any]) -> Trackers:
    """Start the trackers that `train.report_to` names, each under the name of the run."""
    if not config.train.report_to:
        return Trackers()
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    with redirect_stdout(sys.stderr):
        accelerator = Accelerator(
            log_with=list(config.train.report_to),
            project_config=ProjectConfiguration(project_dir=logging_dir, logging_dir=logging_dir),
            cpu=not _cuda(),
        )
        accelerator.init_trackers("lora", config=settings)
    return Trackers(tuple(accelerator.trackers))


def flat_settings(config: Config) -> dict[str, int | float | str | bool]:
    """The config as dotted keys and plain values, which is what trackers take."""
    found: dict[str, int | float | str | bool] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = value if isinstance(value, int | float | str | bool) else str(value)

    walk("", config.model_dump(mode="json"))
    return found


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
