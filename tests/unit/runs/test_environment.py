from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from lora_cli.runs.environment import describe_environment


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_versions_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    environment = describe_environment()
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["torch"]
    assert environment["git"] is None
    text = json.dumps(environment)
    for secret in ("hf_verysecret", platform.node(), str(Path.home()) + "/", str(tmp_path)):
        assert secret not in text
    assert getpass.getuser() not in text.split('"')


def test_the_commit_and_whether_files_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.chdir(tmp_path)
    assert describe_environment()["git"] is None  # nothing committed yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("output of a run")
    assert describe_environment()["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert describe_environment()["git"] == {"commit": commit, "dirty": True}


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["git"] is None
