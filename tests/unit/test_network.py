"""Offline where there is no hub, online where there is one, and no question asked for files."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.cli import network


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", *network._PROXIES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that HF_ENDPOINT names; nobody answers until it listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_hub_that_does_not_answer_is_left_alone(
    port: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that it is undone afterwards
    network.stay_offline_without_network(["Qwen/Qwen2.5-0.5B"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    shown = capsys.readouterr()
    assert "127.0.0.1 can't be reached" in shown.err
    assert shown.out == ""


def test_a_hub_that_answers_is_used(port: socket.socket) -> None:
    port.listen()
    network.stay_offline_without_network(["Qwen/Qwen2.5-0.5B"])
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("way", ["a folder", "a proxy"])
def test_nobody_is_asked(way: str, port: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "a proxy":
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    network.stay_offline_without_network([str(tmp_path) if way == "a folder" else "Qwen/Qwen2.5-0.5B"])
    assert "HF_HUB_OFFLINE" not in os.environ
