"""Against musubi-tuner itself, where it is installed: weft.integrations.musubi learns what its own network learns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations.small_wan import WanModel
from tests.integrations.test_musubi_training import BACKENDS
from tests.integrations.trainer import Run, arguments, save, train

theirs = pytest.importorskip("musubi_tuner.networks.lora_wan")


@BACKENDS
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("args", [["loraplus_lr_ratio=4"], ["rank_dropout=0.2", "exclude_patterns=[r'.*ffn.*']"]])
def test_the_same_seed_learns_the_same(tmp_path: Path, backend: str, precision: str, args: list[str]):
    given = {"mixed_precision": precision, "gradient_checkpointing": True, "scale_weight_norms": 0.02}
    given["network_dropout"] = 0.1
    ours = train(Run(arguments(network_args=[*args, f"backend={backend}"], **given), WanModel()))
    other = train(Run(arguments(network_args=args, **given), WanModel()), module=theirs)
    # Ours multiplies by the scale, here a power of two, at another place; norms are summed in another order.
    torch.testing.assert_close(ours.losses, other.losses, rtol=1e-6 if precision == "no" else 1e-3, atol=0)
    one, two = save(ours, tmp_path / "one.safetensors"), save(other, tmp_path / "two.safetensors")
    mine, musubis = load_file(one), load_file(two)
    assert list(mine) == list(musubis)
    assert {key: (t.shape, t.dtype) for key, t in mine.items()} == {
        key: (t.shape, t.dtype) for key, t in musubis.items()
    }


@BACKENDS
def test_each_continues_the_others_file(tmp_path: Path, backend: str):
    args = [f"backend={backend}"]
    ours = train(Run(arguments(network_args=args), WanModel()), steps=2)
    path = str(save(ours, tmp_path / "ours.safetensors"))
    mine = train(Run(arguments(network_args=args, network_weights=path), WanModel()), steps=2)
    musubis = train(Run(arguments(network_weights=path), WanModel()), steps=2, module=theirs)
    torch.testing.assert_close(mine.losses, musubis.losses, rtol=1e-6, atol=0)
