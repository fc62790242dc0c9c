"""Room on the disk: looked for before a run and before each save, and what it means when a write fails all the same.

Whatever fails, the checkpoint before it is untouched: a new one has its name only when it is complete.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.errors import TrainingError
from lora_cli.plan import Writes
from lora_cli.report.numbers import size
from lora_cli.runs.folder import RunFolder

_WRITES_FAIL = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
    | {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESTALE, errno.ENAMETOOLONG}
)
"""What a disk says that is full, over quota, over a limit, read-only, broken, or gone."""


def require_room_for_run(writes: Writes, folder: RunFolder) -> None:
    """Refuse a run that would fill the disk. What its folder holds already is part of what it will hold.

    Raises:
        TrainingError: with what is needed and what is free.
    """
    held = sum(path.stat().st_size for path in folder.checkpoints_dir.rglob("*") if path.is_file())
    needed = writes.peak_bytes - held
    if needed > writes.free_bytes:
        raise TrainingError(
            f"{folder.path}: the run will write {size(needed)}; {size(writes.free_bytes)} are free there",
            remedy=f"A checkpoint is {size(writes.checkpoint_bytes)}. Fewer of them (train.save_total_limit, "
            "train.save_steps),\na smaller adapter.r, train.optim: adamw_8bit, or another disk with --output-dir.",
        )


def require_room(folder: Path, needed: int) -> None:
    """Refuse a write that won't fit, before it has begun.

    Raises:
        OSError: ENOSPC, with what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size(needed)} needed, {size(free)} free")


@contextmanager
def failing_writes(folder: RunFolder, newest: Callable[[], Path | None], resume_command: str) -> Iterator[None]:
    """Within it, a write that fails ends the run with what is left of it.

    Raises:
        TrainingError: naming the folder, the system's reason, and the checkpoint to go on from.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITES_FAIL:
            raise
        kept = newest()
        remedy = f"Kept: {kept}" if kept is not None else "No checkpoint had been written yet."
        raise TrainingError(
            f"{error.filename or folder.path} can't be written: {error.strerror}",
            remedy=f"{remedy}\nOnce it can be written to, go on with: {resume_command}",
        ) from error


@contextmanager
def tensors_into(path: Path) -> Iterator[None]:
    """Within it, what safetensors says in words when it can't write is the `OSError` that it was.

    Raises:
        OSError: with the system's number, and `path`.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
