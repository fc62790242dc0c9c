"""The run folder: the only place that spells the name of a file in it, and that decides who may write there.

Knows nothing about what the files say.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import RunFolderError
from lora_cli.runs.atomic import remove_leftovers, without_infinities

SWEEP_FILE = "sweep.yaml"
"""What tells the folder of a sweep from that of a run."""
_CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run, or is to hold one."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints_dir / f"step-{step:08}"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """The step of a checkpoint's folder."""
        return int(checkpoint.name.partition("-")[2])

    @property
    def adapter_dir(self) -> Path:
        return self.path / "adapter"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    def eval_dir(self, name: str) -> Path:
        return self.path / "eval" / name

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a checkpoint folder, complete or not, in ascending order."""
        if not self.checkpoints_dir.is_dir():
            return []
        names = (_CHECKPOINT.fullmatch(folder.name) for folder in self.checkpoints_dir.iterdir())
        return sorted(int(name[1]) for name in names if name)

    # Who may write

    @property
    def holds_run(self) -> bool:
        files = (self.config_file, self.environment_file, self.metrics_file, self.checkpoints_dir)
        return any(map(os.path.lexists, (*files, self.adapter_dir, self.summary_file)))

    def refuse_occupied(self, *, resume: bool = False) -> None:
        """Raises if a run can't be written here. Creates nothing: for before the expensive work."""
        _refuse_other_than_folders(self.path)
        if os.path.lexists(self.path / SWEEP_FILE):
            raise RunFolderError(
                f"{self.path} holds a sweep, whose members have run folders of their own in it",
                remedy="Name one of them, or write a new run elsewhere with --output-dir.",
            )
        if self.holds_run and not resume:
            raise RunFolderError(
                f"{self.path} holds another run",
                remedy="Continue it with --resume, or write the new one elsewhere with --output-dir.",
            )

    @contextmanager
    def claim(self, *, resume: bool = False) -> Iterator[None]:
        """Creates the folder and keeps every other process out of it while the block runs."""
        self.refuse_occupied(resume=resume)
        self.create()
        with self.lock():
            # Another process may have begun a run here since the first look.
            self.refuse_occupied(resume=resume)
            remove_leftovers(self.path)
            yield

    def create(self) -> None:
        """Makes the folder, if it isn't there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing to this run. The system lets go of it when this process dies."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode().strip()
            raise RunFolderError(
                f"another run{f' (pid {holder})' if holder else ''} is writing to {self.path}",
                remedy="Wait until it has ended, or choose another folder with --output-dir.",
            ) from error
        except OSError as error:
            raise RunFolderError(
                f"{self.path} can't be locked: {error.strerror}",
                remedy="Its file system has no locks; choose a folder on another one with --output-dir.",
            ) from error

    # metrics.jsonl: the one file that grows

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line, whole."""
        text = json.dumps(without_infinities(dict(line)), ensure_ascii=False, allow_nan=False)
        with open(self.metrics_file, "a", encoding="utf-8", newline="\n") as file:
            file.write(text + "\n")

    def metrics_size(self) -> int:
        """Where the next line will begin, in bytes. What is before that is on disk when this returns."""
        if not self.metrics_file.exists():
            return 0
        with open(self.metrics_file, "rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut_metrics(self, offset: int) -> None:
        """Back to where a checkpoint was: drops the lines of steps that will be taken again."""
        if not self.metrics_file.exists():
            return
        size = self.metrics_file.stat().st_size
        if size < offset:
            raise RunFolderError(
                f"{self.metrics_file} has {size:,} bytes, but {offset:,} when the checkpoint was written",
                remedy="It was changed by hand: restore it, or start anew with --output-dir.",
            )
        with open(self.metrics_file, "r+b") as file:
            file.truncate(offset)
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; one that a killed process left half-written is not among them."""
        if not self.metrics_file.exists():
            return []
        *whole, _ = self.metrics_file.read_bytes().split(b"\n")
        return [json.loads(line) for line in whole]


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of one evaluation, in a run folder or elsewhere."""

    path: Path

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def rows_file(self) -> Path:
        return self.path / "rows.parquet"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def holds_something_else(self) -> bool:
        """Whether what is there is neither an evaluation nor an empty folder."""
        if not os.path.lexists(self.path):
            return False
        if not self.path.is_dir():
            return True
        own = {self.summary_file, self.rows_file, self.report_file}
        return bool(set(self.path.iterdir()) - own)


def _refuse_other_than_folders(path: Path) -> None:
    """Raises if `path`, or what it would be created in, is a file or can't be written to."""
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise RunFolderError(
            f"{path} can't be a run folder: {existing} is not a folder",
            remedy="Choose another folder with output_dir in the config or --output-dir.",
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _cannot_write(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path} can't be written: {error.strerror}",
        remedy="Choose another folder with output_dir in the config or --output-dir.",
    )
