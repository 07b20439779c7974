"""One undisturbed run that several files compare theirs with."""

from __future__ import annotations

from pathlib import Path

import pytest
from calm import make_config
from tiny_world import World, make_world, train


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="session")
def calm(world: World) -> Path:
    """The directory of a run that nobody disturbs; it must stay as it is."""
    train(2, make_config(world, world.root / "calm"))
    return world.root / "calm"
