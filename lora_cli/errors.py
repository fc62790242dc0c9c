"""Every error that a user can cause, and the exit code that each one ends in.

    LoraError
    +-- UserError               exit 2: something the user can mend; nothing was lost
    |   +-- ConfigError         one or more mistakes in a config, each with its place
    |   +-- DataError           a source, a row or a template that can't be trained on
    |   +-- ModelError          a model, a tokenizer or an adapter that can't be used
    |   +-- RunFolderError      an output_dir that can't be written, or holds another run
    |   +-- TrainingError       the run can't go on: memory, disk, non-finite numbers
    +-- NegativeAnswer          exit 3: the work was done and the answer is no
    +-- Interrupted             exit 130 or 143: a signal came; the checkpoint is written

To add one: subclass the nearest of these, and say in its docstring what the user did. A message names the
culprit, the value it had, and what to do; it is printed without a traceback, so it must stand alone.

Knows nothing about how a message is printed. Imports nothing outside the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class LoraError(Exception):
    """What the tool raises on purpose.

    `message` is one line that names the culprit and its value; `remedy` says what to do about it and may
    run over several lines.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}\n{remedy}")
        self.message = message
        self.remedy = remedy


class UserError(LoraError):
    """Something that the user can mend."""

    exit_code = 2


class DataError(UserError):
    """A source that can't be read, a row that can't be used, a template whose mask can't be derived."""


class ModelError(UserError):
    """A model, tokenizer or adapter that is missing, broken, unsafe or doesn't fit the config."""


class RunFolderError(UserError):
    """An `output_dir` that can't be written, holds another run, or holds nothing to go on from."""


class TrainingError(UserError):
    """A run that can't go on: out of memory at the smallest size, full disk, non-finite numbers."""


class NegativeAnswer(LoraError):
    """The question was answered, and the answer is no: does not fit, not verified, not better."""

    exit_code = 3


class Interrupted(LoraError):
    """A signal asked the run to stop, and it did, after writing a checkpoint. Exits as a shell would: 128 + signal."""

    def __init__(self, signal_number: int, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = 128 + signal_number


@dataclass(frozen=True)
class Place:
    """Where in a file something stands. Lines and columns count from 1."""

    file: Path | str
    line: int
    column: int
    text: str = ""
    """The line itself, without its newline."""
    length: int = 1
    """How many characters of it to underline."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One mistake in a config.

    `place` is None for a mistake in a `--set` argument or in a default. `key` is the dotted path
    (`train.learning_rate`), `message` says what is wrong with the value, `hint` what would be right.
    """

    key: str
    message: str
    hint: str = ""
    place: Place | None = None


class ConfigError(UserError):
    """All mistakes of one config, in file order."""

    def __init__(self, source: str, problems: tuple[Problem, ...]) -> None:
        count = len(problems)
        super().__init__(f"{source} has {count} mistake{'s' if count != 1 else ''}")
        self.source = source
        self.problems = problems
