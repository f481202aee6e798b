"""A small real Wan for engines to place."""

from pathlib import Path

import pytest

from tests.small import make_wan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("engine") / "model")
