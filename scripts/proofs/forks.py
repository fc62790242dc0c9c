"""`lora` many times over: each command in a fork of this process, which has imported everything once.

A fork is a process of its own with its own signals, limits and locks, so it can be killed like any other; it only
saves the six seconds that importing torch, transformers and PEFT takes. Nothing may be computed here before forking:
a child has none of its parent's threads.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def import_everything() -> None:
    """What every command would import, and a single thread for all of it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lora_cli.cli.quiet import quiet_libraries

    quiet_libraries()
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.gpt2 import modeling_gpt2  # noqa: F401

    import lora_cli.cli.app
    import lora_cli.report.console
    import lora_cli.train  # noqa: F401

    torch.set_num_threads(1)


@dataclass
class Child:
    """A command that runs in a fork."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None
    """Its exit code, or minus the signal that ended it; None while it runs."""

    def is_over(self) -> bool:
        """Whether it has ended; looks, and doesn't wait."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutError: it hasn't in that time; it is killed.
        """
        until = time.monotonic() + seconds
        while not self.is_over():
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                self.wait(60)
                raise TimeoutError(f"still running after {seconds:.0f} s: {self.said()[-2000:]}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """A signal, if it still runs."""
        if not self.is_over():
            os.kill(self.pid, number)

    def said(self) -> str:
        """What it has written to stdout and stderr so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(arguments: Sequence[str], log: Path, before: Callable[[], object] | None = None) -> Child:
    """`lora ARGUMENTS` in a fork. `before` runs in it first: limits, hooks, faults."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 70
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = _command(arguments, before)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """In a child: put something around a function of a module or class, which stays the function that does the work."""
    setattr(owner, name, around(getattr(owner, name)))


def _command(arguments: Sequence[str], before: Callable[[], object] | None) -> int:
    from lora_cli.cli import main

    if before is not None:
        before()
    sys.argv = ["lora", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
