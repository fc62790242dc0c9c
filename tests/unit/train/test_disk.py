"""Room on the disk: asked for beforehand, and what a failed write becomes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.errors import TrainingError
from lora_cli.plan import Writes
from lora_cli.runs.folder import RunFolder
from lora_cli.train.disk import failing_writes, require_room, require_room_for_run, tensors_into

GIB = 2**30


def writes(folder: Path, *, peak: int, free: int) -> Writes:
    return Writes(
        output_dir=str(folder),
        checkpoint_bytes=peak // 2,
        checkpoint_every="at the end",
        free_bytes=free,
        peak_bytes=peak,
    )


def test_a_run_that_would_fill_the_disk_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    require_room_for_run(writes(tmp_path, peak=GIB, free=GIB), folder)
    with pytest.raises(TrainingError, match=r"will write 2\.0 GiB; 1\.0 GiB are free") as error:
        require_room_for_run(writes(tmp_path, peak=2 * GIB, free=GIB), folder)
    assert "train.save_total_limit" in (error.value.remedy or "")


def test_what_the_folder_holds_already_needs_no_room(tmp_path):
    folder = RunFolder(tmp_path)
    (folder.checkpoint(2)).mkdir(parents=True)
    (folder.checkpoint(2) / "state.json").write_bytes(bytes(1000))
    require_room_for_run(writes(tmp_path, peak=3000, free=2000), folder)
    with pytest.raises(TrainingError):
        require_room_for_run(writes(tmp_path, peak=3001, free=2000), folder)


def test_a_write_that_will_not_fit_is_not_begun(tmp_path):
    require_room(tmp_path, 1)
    with pytest.raises(OSError, match="needed") as error:
        require_room(tmp_path, 2**60)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("kept", [None, Path("run/checkpoints/step-00000003")])
def test_a_failed_write_says_what_is_left(tmp_path, number, kept):
    failing = failing_writes(RunFolder(tmp_path), lambda: kept, "lora train x --resume")
    with pytest.raises(TrainingError, match="can't be written") as error, failing:
        raise OSError(number, "reason", str(tmp_path / "metrics.jsonl"))
    assert "metrics.jsonl" in error.value.message
    assert ("Kept: run/" in (error.value.remedy or "")) == (kept is not None)
    assert "lora train x --resume" in (error.value.remedy or "")


def test_other_errors_of_the_system_are_no_matter_of_disks(tmp_path):
    with pytest.raises(ConnectionRefusedError), failing_writes(RunFolder(tmp_path), lambda: None, "x"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


def test_what_safetensors_says_in_words_becomes_the_error_it_was(tmp_path):
    path = tmp_path / "missing" / "a.safetensors"
    with pytest.raises(OSError, match="No such file") as error, tensors_into(path):
        save_file({"a": torch.zeros(1)}, path)
    assert error.value.errno == errno.ENOENT and error.value.filename == str(path)
