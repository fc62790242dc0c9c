"""kill -9 at random moments on sweeps: members in turn (a Llama) and side by side (a GPT-2), halved on the way.

After every kill no checkpoint of any member is unusable; whatever came before, the sweep that is gone on with ends in
the leaderboard, and each member in the bits, of the sweep that nothing happened to.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from proofs import tiny
from proofs.bench import RUN_SECONDS, Tally, Workplace, difference, unusable_checkpoints
from proofs.forks import Child

_GRID = ("adapter.r=[2, 4]", "train.learning_rate=[1e-2, 3e-3]")
_BURSTS = "train.learning_rate=[1e-2, 1e30]"
_CHAIN = 5
"""Kills in a row before a sweep may end."""
_WORLDS: dict[str, tuple[str, dict[str, dict[str, Any]], tuple[str, ...]]] = {
    # Two of four leave at step 2 and one more at step 4.
    "in turn": ("llama", {"sweep": {"halving": {"every": 2}}}, _GRID),
    "side by side": ("model", {"sweep": {"halving": {"every": 2}}}, _GRID),
    # Two leave by themselves, in different steps than the others are saved in.
    "with failures": ("model", {"train": {"save_steps": 4, "max_grad_norm": None}}, ("adapter.r=[2, 4]", _BURSTS)),
}


def killed_at_random(place: Workplace, kills: int) -> Tally:
    """Sweeps that are killed again and again, each after a random time, and then left to end."""
    tally = Tally("sweeps, kill -9 at random moments")
    worlds = {name: _World(place, name) for name in _WORLDS}
    ended = 0
    while tally.tried < kills:
        world = list(worlds.values())[ended % len(worlds)]
        name = f"sweep-{ended}"
        config = world.config(name)
        arguments: tuple[str, ...] = ()
        for _ in range(_CHAIN):
            if tally.tried == kills:
                break
            child = world.start(config, *arguments)
            time.sleep(place.random.uniform(0.0, world.seconds))
            child.send(signal.SIGKILL)
            if child.wait(RUN_SECONDS) == -signal.SIGKILL:
                tally.tried += 1
                broken = [found for member in _members(place.run(name)) for found in unusable_checkpoints(member)]
                tally.check(not broken, f"{world.name}, {name}, kill {tally.tried}: unusable checkpoints {broken}")
            arguments = ("--resume",)
        _check_end(tally, world, config, name)
        ended += 1
    tally.facts = {"sweeps": ended, "seconds of one": [round(world.seconds, 1) for world in worlds.values()]}
    return tally


class _World:
    """A kind of sweep, and how the one that nothing happened to came out."""

    def __init__(self, place: Workplace, name: str) -> None:
        self.place, self.name = place, name
        self._model, self._sections, self._grid = _WORLDS[name]
        found = []
        for number in (1, 2):  # the first may compile kernels, which takes longer than all else
            whole = f"whole-{name.replace(' ', '-')}-{number}"
            child = self.start(self.config(whole))
            if child.wait(RUN_SECONDS):
                raise RuntimeError(f"lora sweep ({name}) ended with {child.code}:\n{child.said()}")
            self.seconds = time.monotonic() - child.began
            found.append(_outcome(place.run(whole)))
        self.expected = found[0]
        if found[0] != found[1]:
            raise RuntimeError(f"two sweeps ({name}) that nothing happened to differ in {difference(*found)}")

    def config(self, name: str) -> Path:
        """The config of a sweep of this kind, written to its place."""
        train = {"max_steps": 6, "save_steps": 1, "logging_steps": 2, "eval_steps": 2}
        sections = {**self._sections, "train": {**train, **self._sections.get("train", {})}}
        model = {"name_or_path": str(self.place.folder / self._model)}
        data = {"validation": str(self.place.folder / "heldout.jsonl")}
        return self.place.config(name, model=model, data=data, **sections)

    def start(self, config: Path, *arguments: str) -> Child:
        """`lora sweep` in a fork."""
        grid = [part for setting in self._grid for part in ("--grid", setting)]
        return self.place.command(["sweep", str(config), *grid, *arguments], config.with_suffix(".log"))


def _members(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _outcome(folder: Path) -> dict[str, Any]:
    """What must be equal in two sweeps: the leaderboard, and what each member came to."""
    board = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))
    board["members"] = [tiny.stable(member) for member in board["members"]]
    runs = {
        run.name: tiny.outcome(run)
        if (run / "summary.json").is_file()
        else [tiny.stable(line) for line in tiny.lines(run)]
        for run in _members(folder)
    }
    return {"leaderboard": tiny.stable(board), **runs}


def _check_end(tally: Tally, world: _World, config: Path, name: str) -> None:
    """Go on to the end, compare, and leave nothing behind."""
    place, where = world.place, f"{world.name}, {name}"
    child = world.start(config, "--resume")
    if tally.check(child.wait(RUN_SECONDS) == 0, f"{where}: resuming ended with {child.code}: {child.said()[-1500:]}"):
        found = _outcome(place.run(name))
        tally.check(found == world.expected, f"{where}: other {difference(world.expected, found)}")
        left = [path.name for path in place.run(name).rglob(".*") if path.name != ".lock"]
        tally.check(not left, f"{where}: leaves {left}")
    place.remove(name)
