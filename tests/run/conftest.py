"""One small world for all run tests: a model and clips, whose latents are cached once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import make_clips, make_wan, plain_config


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # forked children must not inherit a pool of threads that is not there
    root = tmp_path_factory.mktemp("world")
    make_wan(root / "model")
    make_clips(root / "clips")
    return root


@pytest.fixture
def plain(world: Path, tmp_path: Path) -> dict[str, Any]:
    """A config whose run folder is the test's own, and whose cache is shared."""
    config = plain_config(tmp_path, world / "model", world / "clips")
    config["data"]["cache_folder"] = str(world / "cache")
    return config


@pytest.fixture
def clean_runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    return runs
