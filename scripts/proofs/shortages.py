"""Memory and disks that run out, and clocks that go backwards."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from proofs import forks, tiny
from proofs.bench import RUN_SECONDS, Tally, Workplace, difference, newest_step, unusable_checkpoints

_TOLERANCE = 1e-6
_DISK_KIB = (16, 64, 96, 128, 160, 192, 256, 384)


def out_of_memory_at_random(place: Workplace, runs: int) -> Tally:
    """Runs in which micro-batches run out of memory at random: the losses are those of one in which none does."""
    tally = Tally("out of memory at random micro-batches")
    train = {"max_steps": 6, "logging_steps": 1, "micro_batch_tokens": 512}
    place.finish(place.config("roomy", train=train))
    expected = _losses(place.run("roomy"))
    halvings, worst = 0, 0.0
    for number in range(runs):
        name = f"cramped-{number}"
        config = place.config(name, train=train)
        child = place.start(config, before=_fails_at_random(place.random.random(), place.random.randrange(2**32)))
        if tally.check(child.wait(RUN_SECONDS) == 0, f"{name}: ended with {child.code}: {child.said()[-1500:]}"):
            found = _losses(place.run(name))
            halvings += len(tiny.lines(place.run(name))) - len(found)
            worst = max(worst, *(abs(a - b) / b for a, b in zip(found, expected, strict=True)))
        tally.tried += 1
        place.remove(name)
    tally.check(worst <= _TOLERANCE, f"losses {worst:.1e} apart")
    tally.check(halvings > 0 or not runs, "no micro-batch ran out of memory")
    tally.facts = {"halvings": halvings, "largest difference of a loss": f"{worst:.1e}"}
    return tally


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in tiny.lines(run) if "loss" in line]


def _fails_at_random(share: float, seed: int) -> Callable[[], None]:
    """What makes a child run out of memory, at most twice, before a micro-batch's work or after it."""

    def before() -> None:
        import torch

        from lora_cli.engine import step

        random, failures = Random(seed), iter(range(2))

        def sometimes(accumulate: Callable[..., Any]) -> Callable[..., Any]:
            def accumulated(*arguments: Any) -> Any:
                fails = random.random() < share / 4 and next(failures, None) is not None
                if fails and random.random() < 0.5:
                    raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
                result = accumulate(*arguments)
                if fails:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory (injected)")
                return result

            return accumulated

        forks.wrap(step, "accumulate", sometimes)

    return before


def full_disks(place: Workplace) -> Tally:
    """Disks of many sizes, a limit on file sizes, a disk that becomes read-only, and a clock that goes backwards."""
    tally = Tally("disks that can't be written to")
    settings: dict[str, Any] = {"train": {"max_steps": 6, "save_steps": 1, "logging_steps": 1}}
    place.finish(place.config("dry", **settings))
    expected = tiny.outcome(place.run("dry"))
    _limited(tally, place, settings, expected)
    _backwards(tally, place, settings, expected)
    if can_mount(place.folder):
        for kib in _DISK_KIB:
            _on_a_small_disk(tally, place, settings, expected, kib)
        _becomes_read_only(tally, place, settings, expected)
    else:
        tally.facts["left out"] = "full and read-only disks, since this machine doesn't let us mount"
    return tally


def can_mount(folder: Path) -> bool:
    """Whether we may mount a file system here."""
    probe = folder / "probe"
    probe.mkdir(exist_ok=True)
    if _mount(probe, 64) != 0:
        return False
    _umount(probe)
    return True


def _mount(folder: Path, kib: int) -> int:
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def _mount_read_only(folder: Path) -> None:
    """Over itself: what is open stays so, and nothing more can be opened to write."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)


def _umount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def _on_a_small_disk(tally: Tally, place: Workplace, settings: Any, expected: Any, kib: int) -> None:
    """The disk is too small for the run; once it is larger, the run goes on."""
    name = f"small-{kib}"
    run = place.run(name)
    run.mkdir(parents=True)
    _mount(run, kib)
    try:
        config = place.config(name, **settings)
        child = place.start(config, before=_no_look_before_the_run)
        code = child.wait(RUN_SECONDS)
        tally.tried += 1
        if code != 0:
            _check_told(tally, name, code, child.said(), run)
            subprocess.run(["mount", "-o", "remount,size=8m", str(run)], check=True)
            again = place.start(config, "--resume")
            tally.check(again.wait(RUN_SECONDS) == 0, f"{name}: resuming: {again.said()[-1500:]}")
        _check_outcome(tally, name, run, expected)
    finally:
        _umount(run)


def _no_look_before_the_run() -> None:
    """In the child: as if the disk had had room when the run began, and another program had filled it since."""
    from lora_cli.train import run

    forks.wrap(run, "require_room_for_run", lambda original: lambda *arguments: None)


def _becomes_read_only(tally: Tally, place: Workplace, settings: Any, expected: Any) -> None:
    name = "read-only"
    run = place.run(name)
    run.mkdir(parents=True)
    try:
        config = place.config(name, **settings)

        def protect(step: int) -> None:
            if step == 3:
                _mount_read_only(run)

        child = place.start(config, before=lambda: _after_each_step(protect))
        code = child.wait(RUN_SECONDS)
        tally.tried += 1
        _check_told(tally, name, code, child.said(), run)
        refused = place.start(config, "--resume")
        tally.check(refused.wait(RUN_SECONDS) == 2, f"{name}: resuming there ended with {refused.code}")
        _umount(run)
        again = place.start(config, "--resume")
        tally.check(again.wait(RUN_SECONDS) == 0, f"{name}: resuming: {again.said()[-1500:]}")
        _check_outcome(tally, name, run, expected)
    finally:
        _umount(run)


def _limited(tally: Tally, place: Workplace, settings: Any, expected: Any) -> None:
    """`ulimit -f`: no file may be larger than that; then it may."""
    for size in (800, 3000, 20_000, 30_000):
        name = f"limit-{size}"
        config = place.config(name, **settings)
        limit = lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # noqa: E731
        child = place.start(config, before=_log_elsewhere(limit))
        code = child.wait(RUN_SECONDS)
        tally.tried += 1
        if code != 0:
            _check_told(tally, name, code, child.said(), place.run(name))
            again = place.start(config, "--resume")
            tally.check(again.wait(RUN_SECONDS) == 0, f"{name}: resuming: {again.said()[-1500:]}")
        _check_outcome(tally, name, place.run(name), expected)


def _log_elsewhere(limit: Callable[[], Any]) -> Callable[[], None]:
    """The limit begins where the run writes, and the log with it: that is a file, too."""

    def limited(start_position: Callable[..., Any]) -> Callable[..., Any]:
        def start(*arguments: Any) -> Any:
            os.ftruncate(1, 0)
            os.lseek(1, 0, os.SEEK_SET)
            limit()
            return start_position(*arguments)

        return start

    def before() -> None:
        from lora_cli.train import run

        forks.wrap(run, "start_position", limited)

    return before


def _after_each_step(act: Callable[[int], None]) -> None:
    """In the child: do something once a step is noted."""
    from lora_cli.train.record import Record

    def and_act(record: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, step: int, *rest: Any) -> None:
            record(self, step, *rest)
            act(step)

        return recorded

    forks.wrap(Record, "step", and_act)


def _backwards(tally: Tally, place: Workplace, settings: Any, expected: Any) -> None:
    """The wall clock goes back an hour with each look at it, and files are the older, the later they were written."""
    name = "backwards"
    run = place.run(name)

    def before() -> None:
        now, looks = time.time(), iter(range(10**9))

        def go_back(step: int) -> None:
            for path in run.rglob("*"):
                os.utime(path, (now - 86400 * step, now - 86400 * step))
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        forks.wrap(time, "time", lambda clock: lambda: now - 3600 * next(looks))
        _after_each_step(go_back)

    config = place.config(name, **settings)
    child = place.start(config, before=before)
    tally.check(child.wait(RUN_SECONDS) == -signal.SIGKILL, f"{name}: ended with {child.code}")
    tally.check(newest_step(place.run(name)) == 2, f"{name}: checkpoint {newest_step(place.run(name))}")
    again = place.start(config, "--resume")
    tally.check(again.wait(RUN_SECONDS) == 0, f"{name}: resuming: {again.said()[-1500:]}")
    tally.tried += 1
    _check_outcome(tally, name, place.run(name), expected)


def _check_told(tally: Tally, name: str, code: int, said: str, run: Path) -> None:
    told = "error:" in said and "can't be written" in said and "--resume" in said
    tally.check(code == 2 and told and "Traceback" not in said, f"{name}: ended with {code}: {said[-1500:]}")
    tally.check(not unusable_checkpoints(run), f"{name}: an unusable checkpoint")
    if newest_step(run) >= 0:
        tally.check(f"Kept: {run}/checkpoints/step-{newest_step(run):08}" in said, f"{name}: {said[-600:]}")


def _check_outcome(tally: Tally, name: str, run: Path, expected: Any) -> None:
    found = tiny.outcome(run)
    tally.check(found == expected, f"{name}: other {difference(found, expected)}")
