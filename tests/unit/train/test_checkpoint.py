"""Which checkpoints count, and which are removed. What they hold is tested by runs that go on from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import is_complete, newest_checkpoint, prune_checkpoints, remove_later_checkpoints

FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def write_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_text(name)
    facts = {name: {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in FILES}
    (path / "manifest.json").write_text(json.dumps(facts))
    return path


def steps(folder):
    return [int(path.name[-8:]) for path in sorted(folder.checkpoints_dir.iterdir())]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_incomplete(folder, name):
    path = write_checkpoint(folder.checkpoint(3))
    assert is_complete(path)
    (path / name).unlink()
    assert not is_complete(path)


@pytest.mark.parametrize("manifest", ["", "{}", "[]", "null", '{"state.json": {}}'])
def test_a_manifest_that_does_not_vouch_for_every_file_is_none(folder, manifest):
    path = write_checkpoint(folder.checkpoint(3))
    (path / "manifest.json").write_text(manifest)
    assert not is_complete(path)


def test_the_newest_whole_one_counts(folder):
    assert newest_checkpoint(folder) is None
    for step in (5, 10, 20):
        write_checkpoint(folder.checkpoint(step))
    write_checkpoint(folder.checkpoints_dir / ".step-00000030.tmp")
    (folder.checkpoint(20) / "state.json").write_text("another")
    assert newest_checkpoint(folder) == folder.checkpoint(10)


def test_steps_are_compared_as_numbers(folder):
    for step in (99_999_999, 100_000_000):
        write_checkpoint(folder.checkpoint(step))
    assert newest_checkpoint(folder) == folder.checkpoint(100_000_000)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [1, 2, 3, 4]), (2, None, [3, 4]), (1, 2, [2, 4]), (2, 4, [3, 4]), (9, 1, [1, 2, 3, 4])],
)
def test_the_best_one_is_kept_besides_the_newest(folder, limit, best, kept):
    for step in (1, 2, 3, 4):
        write_checkpoint(folder.checkpoint(step))
    prune_checkpoints(folder, limit, best)
    assert steps(folder) == kept


def test_what_comes_after_a_step_is_removed_with_what_was_half_written(folder):
    remove_later_checkpoints(folder, 0)
    for step in (1, 2, 3):
        write_checkpoint(folder.checkpoint(step))
    (folder.checkpoints_dir / ".step-00000004.tmp").mkdir()
    remove_later_checkpoints(folder, 2)
    assert steps(folder) == [1, 2]
