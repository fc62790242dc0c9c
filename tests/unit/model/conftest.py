from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.unit.engine.tiny import tiny_model


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def llama_folder(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A model folder with weights in one safetensors file."""
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    return folder
