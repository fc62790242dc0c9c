"""A config file on disk, and the problems that loading one has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.config import load_config
from lora_cli.errors import ConfigError, Problem

Write = Callable[[str | bytes], Path]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


@pytest.fixture
def problems(write: Write) -> Problems:
    """The problems of a config text, with overrides; it must have some."""

    def of(content: str | bytes, *overrides: str) -> list[Problem]:
        with pytest.raises(ConfigError) as raised:
            load_config(write(content), overrides)
        assert raised.value.problems
        return list(raised.value.problems)

    return of
