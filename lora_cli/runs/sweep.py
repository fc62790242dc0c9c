"""The folder of a sweep: what it keeps beside the run folders of its members. Knows nothing of what the files say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import RunFolderError
from lora_cli.runs.folder import SWEEP_FILE, RunFolder


@dataclass(frozen=True)
class SweepFolder:
    """A folder that holds one sweep, or is to hold one."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The config with its grid."""
        return self.path / SWEEP_FILE

    @property
    def state_file(self) -> Path:
        """Which members there are, and which of them were dropped."""
        return self.path / "state.json"

    @property
    def leaderboard_file(self) -> Path:
        return self.path / "leaderboard.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    def member(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    @property
    def holds_sweep(self) -> bool:
        return any(map(os.path.lexists, (self.config_file, self.state_file, self.leaderboard_file)))

    def refuse_occupied(self, *, resume: bool = False) -> None:
        """Raises if a sweep can't be written here, or isn't there to be gone on with. Creates nothing."""
        if not self.holds_sweep:
            RunFolder(self.path).refuse_occupied()
        elif not resume:
            raise RunFolderError(
                f"{self.path} holds another sweep",
                remedy="Continue it with --resume, or write the new one elsewhere with --output-dir.",
            )

    @contextmanager
    def claim(self, *, resume: bool = False) -> Iterator[None]:
        """Creates the folder and keeps every other process out of it while the block runs."""
        self.refuse_occupied(resume=resume)
        own = RunFolder(self.path)
        own.create()
        with own.lock():
            # Another process may have begun a sweep here since the first look.
            self.refuse_occupied(resume=resume)
            yield
