"""A small Wan folder with an untrained autoencoder whose constants are known."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.small import make_wan
from weft.families.wan import Wan

MEAN = tuple(0.1 * c - 0.7 for c in range(16))
STD = tuple(0.5 + 0.1 * c for c in range(16))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    made = make_wan(tmp_path_factory.mktemp("family") / "wan-small")
    shutil.rmtree(made / "vae")
    torch.manual_seed(1)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=list(MEAN), latents_std=list(STD)
    )
    vae.save_pretrained(made / "vae")
    return made


@pytest.fixture
def wan(folder: Path) -> Wan:
    return Wan(source=str(folder))


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "wan-small"))
