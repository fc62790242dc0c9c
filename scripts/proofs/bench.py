"""What the proofs have in common: a workplace with a tiny model, the run that nothing happened to, and a tally."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from proofs import forks, tiny

RUN_SECONDS = 600.0
"""On a busy machine, too."""


@dataclass
class Tally:
    """What a proof tried, and what went wrong."""

    name: str
    tried: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def check(self, holds: bool, otherwise: str) -> bool:
        """Count a failure unless it holds."""
        if not holds:
            self.failures.append(otherwise)
        return holds


@dataclass(frozen=True)
class Workplace:
    """A folder with the tiny model, rows to train and to hold out, and whatever runs are made in it."""

    folder: Path
    random: Random

    @classmethod
    def made(cls, folder: Path, seed: int) -> Workplace:
        """Fill a folder. The models are built in a fork, since nothing may be computed in this process."""
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["LORA_CACHE_DIR"] = str(folder / "cache")
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                tiny.make_llama(folder / "llama", tiny.make_model(folder / "model"))
                code = 0
            finally:
                os._exit(code)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError("the tiny models can't be built")
        tiny.make_rows(folder / "train.jsonl", 41)
        tiny.make_rows(folder / "heldout.jsonl", 6, seed=1)
        return cls(folder, Random(seed))

    def config(self, name: str, **sections: dict[str, Any]) -> Path:
        """A config of the run `name`, written beside it."""
        path = self.folder / f"{name}.json"
        return tiny.write_config(path, self.folder / "model", self.folder / "train.jsonl", self.run(name), **sections)

    def run(self, name: str) -> Path:
        """The folder of the run `name`."""
        return self.folder / "runs" / name

    def start(self, config: Path, *arguments: str, before: Callable[[], object] | None = None) -> forks.Child:
        """`lora train CONFIG ARGUMENTS` in a fork."""
        return self.command(["train", str(config), *arguments], config.with_suffix(".log"), before)

    def command(self, arguments: list[str], log: Path, before: Callable[[], object] | None = None) -> forks.Child:
        """`lora ARGUMENTS` in a fork."""
        return forks.start(arguments, log, before)

    def finish(self, config: Path, *arguments: str) -> forks.Child:
        """The same, to its end.

        Raises:
            RuntimeError: it didn't end with 0.
        """
        child = self.start(config, *arguments)
        if child.wait(RUN_SECONDS):
            raise RuntimeError(f"lora train {config} {' '.join(arguments)} ended with {child.code}:\n{child.said()}")
        return child

    def remove(self, name: str) -> None:
        """A run that is not needed any more."""
        shutil.rmtree(self.run(name), ignore_errors=True)


def unusable_checkpoints(run: Path) -> list[str]:
    """Folders that bear a checkpoint's name and aren't what their manifest says."""
    from lora_cli.runs.folder import RunFolder
    from lora_cli.train.checkpoint import is_complete

    folder = RunFolder(run)
    return [str(step) for step in folder.checkpoint_steps() if not is_complete(folder.checkpoint(step))]


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; -1 where there is none."""
    from lora_cli.runs.folder import RunFolder

    return max(RunFolder(run).checkpoint_steps(), default=-1)


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Which parts of two outcomes differ."""
    return ", ".join(key for key in one if one[key] != other[key])
