"""Adapters on a base that is kept in 8 bits: what holds on a plain one holds here."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.adapters.conftest import PRESETS, new_wan
from tests.adapters.recipes import KINDS, saved
from weft.adapters.full import FullChange
from weft.adapters.lora import Lora
from weft.adapters.modules import dense_weight
from weft.adapters.recipe import recipe_of
from weft.families.storage import PACKINGS, Packed, PackedLinear, encoded, packable

RECIPES = {
    **KINDS,
    "dora": Lora(rank=2, dora=True),
    "native dora": Lora(rank=2, dora=True, backend="native"),
    "full": FullChange(targets="attention+ffn"),
}


def pack(network, kind="fp8", dtype=torch.float32):
    """Every linear layer of the blocks in 8 bits."""
    for path, linear in packable(network, list(network.blocks)).items():
        parent = network.get_submodule(path.rpartition(".")[0])
        codes, scale = encoded(PACKINGS[kind], linear.weight.detach())
        shape = (linear.out_features, linear.in_features)
        bias = linear.bias.detach() if linear.bias is not None else None
        packed = PackedLinear(Packed(codes, scale, shape, PACKINGS[kind]), bias, dtype)
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            parent[int(path.rpartition(".")[2])] = packed
        else:
            setattr(parent, path.rpartition(".")[2], packed)
    return network


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_kind_trains_on_a_packed_base_and_leaves_it_as_it_was(recipe, kind, tiny_wan, ask, attach):
    network = pack(tiny_wan(), kind)
    expected = ask(network)
    codes = {key: p.clone() for key, p in network.named_parameters() if key.endswith("codes")}
    adapters = attach(recipe, network)
    optimizer = torch.optim.AdamW(adapters.parameters("student").values(), lr=1e-2)
    losses = []
    for _ in range(3):
        with adapters.use("student"):
            loss = (ask(network) - 1).square().mean()
            loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.parameters("student").values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < losses[0] and torch.equal(ask(network), expected)
    after = {key.replace(".base_layer", ""): p for key, p in network.named_parameters() if key.endswith("codes")}
    assert codes and all(torch.equal(p, codes[key]) for key, p in after.items())


@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", *(["nf4"] if find_spec("bitsandbytes") else [])])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_adapters_stand_on_a_base_before_it_has_numbers_and_are_none_until_they_begin(recipe, kind, attach):
    """As where each process keeps a part of what is read: in the network one number stands in for a weight."""
    network, other = (net if kind == "plain" else pack(net, kind) for net in (new_wan(1), new_wan(1)))
    numbers = [(parameter, parameter.data) for parameter in network.parameters()]
    for parameter, tensor in numbers:
        parameter.data = torch.full((1,), 77, dtype=tensor.dtype).expand(tensor.shape)
    adapters = recipe.attach(network, recipe.match(recipe.layers(network), PRESETS, {}).paths, ("student",), 7)
    assert all(tensor.isnan().all() for tensor in adapters.state_dict("student").values())
    for parameter, tensor in numbers:
        parameter.data = tensor
    expected = attach(recipe, other).state_dict("student")
    for _ in range(2):  # it may be called again
        adapters.initialize()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in adapters.state_dict("student").items())


@pytest.mark.parametrize("recipe", [KINDS["pissa"], KINDS["pissa native"]], ids=["peft", "native"])
@torch.no_grad()
def test_pissa_of_a_packed_base_is_exported_for_that_base(recipe, tiny_wan, ask, attach, shaken):
    recipe = recipe.model_copy(update={"pissa_iterations": None})
    network = pack(tiny_wan())
    expected = ask(network)
    path = "blocks.0.attn1.to_q"
    weight = dense_weight(network.get_submodule(path))
    adapters = attach(recipe, network)
    with adapters.use("student"):
        assert_close(ask(network), expected, atol=1e-6, rtol=1e-6)
    state = adapters.state_dict("student")
    u, s, vh = torch.linalg.svd(weight)
    product = recipe.scale * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
    assert_close(product, u[:, :4] * s[:4] @ vh[:4], atol=1e-4, rtol=1e-3)
    shaken(adapters)
    written = saved(recipe, adapters)
    other = pack(tiny_wan())
    applied = recipe_of(written, written.targets).attach(other, written.targets, ("default",), 0)
    applied.load_state_dict("default", written.tensors)
    with adapters.use("student"), applied.use("default"):
        assert_close(ask(other), ask(network), atol=2e-5, rtol=1e-4)
