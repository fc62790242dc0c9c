from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import RunFolderError
from lora_cli.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "docs")


def digest(path: Path) -> str:
    """Of every name, size, time and byte below `path`."""
    parts = [(str(file), file.lstat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in path.rglob("*")]
    return hashlib.sha256(repr(sorted(parts, key=str)).encode()).hexdigest()


def test_names_of_the_contract(folder: RunFolder) -> None:
    run = folder.path
    assert folder.config_file == run / "config.yaml"
    assert folder.environment_file == run / "environment.json"
    assert folder.metrics_file == run / "metrics.jsonl"
    assert folder.checkpoint(100) == run / "checkpoints" / "step-00000100"
    assert folder.adapter_dir == run / "adapter"
    assert folder.summary_file == run / "summary.json"
    assert folder.report_file == run / "report.html"


def test_checkpoints_are_found_in_the_order_of_their_steps(folder: RunFolder) -> None:
    assert folder.checkpoint_steps() == []
    for step in (1000, 200, 123456789):
        folder.checkpoint(step).mkdir(parents=True)
    (folder.checkpoints_dir / "step-00000300.partial").mkdir()
    assert folder.checkpoint_steps() == [200, 1000, 123456789]


def test_claiming_creates_the_folder(folder: RunFolder) -> None:
    with folder.claim():
        assert folder.path.is_dir()
        assert not folder.holds_run


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "adapter", "checkpoints"])
def test_another_run_is_refused_and_left_as_it_was(folder: RunFolder, name: str) -> None:
    (folder.path / name).mkdir(parents=True)
    before = digest(folder.path)
    with pytest.raises(RunFolderError, match=r"holds another run") as refusal, folder.claim():
        pass
    assert "--resume" in str(refusal.value)
    assert "--output-dir" in str(refusal.value)
    assert str(folder.path) in refusal.value.message
    assert digest(folder.path) == before
    with folder.claim(resume=True):
        pass


def test_files_of_others_are_no_run(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "notes.txt").write_text("mine")
    with folder.claim():
        pass


def test_looking_creates_nothing(folder: RunFolder) -> None:
    folder.refuse_occupied()
    assert not folder.path.parent.exists()


@pytest.mark.parametrize("below", ["", "runs/docs"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunFolderError, match="file is not a folder") as refusal:
        RunFolder(file / below).refuse_occupied()
    assert "--output-dir" in str(refusal.value)
    assert file.read_text() == "mine"


def test_a_folder_that_can_not_be_written_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By asking the system and not the permission bits: root may write where they say no."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunFolderError, match=r"can't be written: Permission denied"):
        folder.refuse_occupied()


def test_a_file_system_that_is_read_only_is_refused() -> None:
    with pytest.raises(RunFolderError, match=r"can't be written"), RunFolder(Path("/proc/self/runs")).claim():
        pass


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from lora_cli.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(RunFolderError) as refusal, folder.claim():
                pass
            assert f"another run (pid {other.pid}) is writing to {folder.path}" in refusal.value.message
        finally:
            other.send_signal(signal.SIGKILL)
    with folder.claim():
        pass


def test_a_lock_is_given_back_after_an_error(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), folder.lock():
        raise ZeroDivisionError
    with folder.lock():
        pass


def test_metrics_come_back_as_they_were_written(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    assert folder.read_metrics() == []
    assert folder.metrics_size() == 0
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.1 + 0.2},
        {"step": 2, "loss": 1e-300, "note": "ä\n中"},
    ]
    for line in lines:
        folder.append_metrics(line)
    assert folder.read_metrics() == lines
    assert len(folder.metrics_file.read_text().splitlines()) == 2


def test_numbers_that_json_lacks_become_null(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.append_metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert folder.read_metrics() == [{"step": 1, "loss": None, "grad_norm": None}]


def test_cutting_back_forgets_what_came_after_the_checkpoint(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.append_metrics({"step": 1})
    offset = folder.metrics_size()
    folder.append_metrics({"step": 2})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    folder.cut_metrics(offset)
    folder.append_metrics({"step": 2, "again": True})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2, "again": True}]


def test_cutting_never_lengthens_a_file(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.append_metrics({"step": 1})
    with pytest.raises(RunFolderError, match="when the checkpoint was written"):
        folder.cut_metrics(10_000)
    assert folder.read_metrics() == [{"step": 1}]
