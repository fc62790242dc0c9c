"""What a sweep remembers between two starts: its members, who was dropped, who failed. One file, whole or absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from lora_cli.config import HalvingConfig
from lora_cli.errors import RunFolderError
from lora_cli.runs.atomic import write_json
from lora_cli.runs.sweep import SweepFolder


@dataclass(frozen=True)
class Rung:
    """One halving."""

    step: int
    losses: dict[str, float]
    """Validation loss of each member that was there, best first."""
    dropped: tuple[str, ...]

    def why(self, name: str) -> str:
        """Why a member was dropped, in words."""
        place = list(self.losses).index(name) + 1
        return f"halving: number {place} of {len(self.losses)} by validation loss at step {self.step:,}"


@dataclass
class State:
    """The decisions of a sweep so far."""

    members: tuple[str, ...]
    rungs: list[Rung] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Why a member has no result."""

    def dropped(self, name: str) -> str | None:
        """Why a member was dropped, if it was."""
        return next((rung.why(name) for rung in self.rungs if name in rung.dropped), None)

    def write(self, folder: SweepFolder) -> None:
        """Put it on disk, before anything follows from it."""
        write_json(folder.state_file, asdict(self))


def read_state(folder: SweepFolder, members: Sequence[str]) -> State:
    """The state of the sweep in a folder; a fresh one where there is none.

    Raises:
        RunFolderError: the sweep there has other members.
    """
    if not folder.state_file.is_file():
        return State(tuple(members))
    values = json.loads(folder.state_file.read_text(encoding="utf-8"))
    if tuple(values["members"]) != tuple(members):
        raise RunFolderError(
            f"{folder.path} was started with another grid: its members are {', '.join(values['members'])}",
            remedy="Put the grid back, or start anew with --output-dir.",
        )
    rungs = [Rung(each["step"], _finite(each["losses"]), tuple(each["dropped"])) for each in values["rungs"]]
    return State(tuple(members), rungs, values["failed"])


def decide(step: int, losses: Mapping[str, float], halving: HalvingConfig) -> Rung:
    """Who goes on: the best `keep` of the members, rounded up, and `at_least` so many. Ties go to the earlier one."""
    ranked = sorted(losses, key=lambda name: (not math.isfinite(losses[name]), losses[name]))
    kept = max(halving.at_least, math.ceil(halving.keep * len(ranked) - 1e-9))
    return Rung(step, {name: losses[name] for name in ranked}, tuple(ranked[kept:]))


def _finite(losses: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if loss is None else loss for name, loss in losses.items()}
