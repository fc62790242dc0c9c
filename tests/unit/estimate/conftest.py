from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.estimate.models import tiny_architecture


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_architecture("llama").save_pretrained(folder)
    return folder
