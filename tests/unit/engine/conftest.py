from __future__ import annotations

import pytest

from lora_cli.engine.world import World, join_world


@pytest.fixture(scope="session")
def world() -> World:
    """One process on a CPU."""
    return join_world()
