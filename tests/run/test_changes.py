"""What an adapter changes of a layer is what PEFT's own merge makes of it, for every kind; differences are exact."""

from math import inf
from pathlib import Path

import pytest
import torch
from torch import nn

from weft.adapters.loha import LoHa
from weft.adapters.lokr import LoKr
from weft.adapters.lora import Lora
from weft.adapters.oft import Oft
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.run.changes import Change, change_of, difference

RECIPES = {
    "lora": Lora(rank=4, alpha=3.0, targets=("0",)),
    "rslora": Lora(rank=4, alpha=3.0, rslora=True, targets=("0",)),
    "dora": Lora(rank=4, alpha=3.0, dora=True, targets=("0",)),
    "loha": LoHa(rank=3, alpha=2.0, targets=("0",)),
    "lokr": LoKr(rank=2, alpha=3.0, factor=4, targets=("0",)),
    "lokr-both": LoKr(rank=1, alpha=3.0, factor=4, decompose_both=True, targets=("0",)),
    "oft": Oft(block_size=4, targets=("0",)),
    "oft-inverse": Oft(block_size=4, series=None, targets=("0",)),
    "oft-shared": Oft(block_size=4, share_blocks=True, targets=("0",)),
}


def trained(recipe, network: nn.Module) -> SavedAdapter:
    """An adapter with values as after training: none is zero."""
    adapters = recipe.attach(network, ("0",), ("default",), seed=1)
    adapters.initialize()
    chance = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters("default").values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance)
    tensors = {name: tensor.detach().clone() for name, tensor in adapters.state_dict("default").items()}
    return SavedAdapter(**recipe.exported(tensors), targets=("0",))


@pytest.mark.parametrize("name", RECIPES)
def test_a_changed_weight_is_the_one_that_peft_merges(name, tmp_path: Path):
    from peft import PeftModel

    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(16, 24, bias=False))
    weight = plain[0].weight.detach().clone()
    adapter = trained(RECIPES[name], nn.Sequential(nn.Linear(16, 24, bias=False)))
    if adapter.dora:  # its lengths begin at those of the weight
        adapter.tensors["0.lora_magnitude_vector"].copy_(1.1 * weight.norm(dim=1))
    folder = PeftFolder().write(tmp_path, adapter)
    merged = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    expected = merged[0].weight.detach()
    assert not torch.allclose(expected, weight, atol=1e-3)
    torch.testing.assert_close(change_of(adapter, "0").applied(weight), expected, atol=2e-6, rtol=1e-5)


def test_a_difference_is_that_of_the_products_and_not_of_the_factors():
    chance = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 8, generator=chance).double(), torch.randn(6, 3, generator=chance).double()
    one = Change(factors=(b, a))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=chance).double())[0]
    assert difference(one, Change(factors=(b @ turn, turn.mT @ a))) < 1e-14
    assert difference(one, Change(factors=(1.25 * b, a))) == pytest.approx(0.25, rel=1e-12)
    assert difference(one, Change(whole=1.25 * b @ a)) == pytest.approx(0.25, rel=1e-12)
    padded = Change(factors=(torch.nn.functional.pad(b, (0, 2)), torch.cat((a, torch.randn(2, 8).double()))))
    assert difference(one, padded) < 1e-14


def test_changes_by_nothing_are_equal_and_unlike_kinds_are_not():
    zero = Change(factors=(torch.zeros(4, 2).double(), torch.ones(2, 4).double()))
    some = Change(factors=(torch.ones(4, 2).double(), torch.ones(2, 4).double()))
    assert difference(zero, zero) == 0 and difference(zero, some) == inf
    assert difference(some, Change(factors=some.factors, magnitude=torch.ones(4).double())) == inf
    assert difference(some, Change(factors=(torch.ones(5, 2).double(), torch.ones(2, 4).double()))) == inf


def test_a_weaker_dora_is_refused():
    dora = Change(factors=(torch.ones(4, 2).double(), torch.ones(2, 4).double()), magnitude=torch.ones(4).double())
    with pytest.raises(ValueError, match="as it was trained"):
        dora.applied(torch.ones(4, 4), 0.5)
