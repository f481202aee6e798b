"""Small Wan and HunyuanVideo folders, made once; of one the autoencoder's constants are known."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.small import make_hunyuan, make_wan
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


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of Wan: t2v, i2v21, i2v22, ti2v, experts, i2v-experts."""
    root = tmp_path_factory.mktemp("kinds")
    return cache(lambda kind: make_wan(root / kind, kind=kind))


@pytest.fixture(scope="session")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hunyuan(tmp_path_factory.mktemp("hunyuan") / "hunyuan-small")
