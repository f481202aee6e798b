"""A whole matrix beside a layer's weight learns what full fine-tuning of that weight learns."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.adapters.conftest import PRESETS, new_wan
from weft.adapters.full import FullChange
from weft.errors import ConfigError

EVERYWHERE = FullChange(targets=("attention+ffn", "patch_embedding"))


def weight_of(network: nn.Module, key: str) -> nn.Parameter:
    """The base's parameter beside which a tensor of the adapter stands."""
    path, _, name = key.rpartition(".full.")
    return network.get_parameter(f"{path}.{name}")


def test_it_begins_as_the_base(tiny_wan, ask, attach):
    network = tiny_wan()
    adapters = attach(EVERYWHERE, network)
    with adapters.use("student"):
        assert torch.equal(ask(network), ask(tiny_wan()))
    assert {str(t.dtype) for t in adapters.state_dict("student").values()} == {"torch.float32"}


def test_answers_and_gradients_are_those_of_w_plus_d(tiny_wan, ask, attach, shaken):
    network, tuned = tiny_wan(), tiny_wan().requires_grad_(True)
    adapters = attach(EVERYWHERE, network)
    shaken(adapters)
    with torch.no_grad():
        for key, d in adapters.parameters("student").items():
            weight_of(tuned, key).add_(d)
    with adapters.use("student"):
        found, expected = ask(network), ask(tuned)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)  # W x + D x in place of (W + D) x
        found.square().sum().backward()
        expected.square().sum().backward()
    for key, d in adapters.parameters("student").items():
        gradient = weight_of(tuned, key).grad
        assert gradient is not None and d.grad is not None and gradient.any()
        assert (d.grad - gradient).norm() < 1e-4 * gradient.norm(), key
    assert torch.equal(ask(network), ask(tiny_wan()))


def test_a_step_of_sgd_moves_the_answer_as_it_does_in_full_fine_tuning(tiny_wan, ask, attach):
    network, tuned = tiny_wan(), tiny_wan().requires_grad_(False)
    adapters = attach(EVERYWHERE, network)
    own = adapters.parameters("student")
    theirs = [weight_of(tuned, key).requires_grad_(True) for key in own]
    for model, parameters in ((network, list(own.values())), (tuned, theirs)):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(3):
            with adapters.use("student"):
                (ask(model) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with adapters.use("student"):
        assert_close(ask(network), ask(tuned), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ask(network), ask(tuned), atol=1e-3)


def test_on_a_bf16_base_under_autocast_small_changes_are_not_lost(attach):
    """D of 2^-12 of W would vanish in a bf16 sum with W, which has 8 bits."""
    network = new_wan().bfloat16()
    adapters = attach(FullChange(targets="attn1.to_q", bias=False), network)
    layer = network.get_submodule("blocks.0.attn1.to_q")
    assert isinstance(layer, nn.Linear)
    d = layer.weight.detach().float() * 2**-12
    state = {key: torch.zeros_like(t) for key, t in adapters.state_dict("student").items()}
    adapters.load_state_dict("student", state | {"blocks.0.attn1.to_q.full.weight": d})
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    for inputs, autocast in ((x.to(torch.bfloat16), False), (x, True)):
        with adapters.use("student"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert layer(inputs).dtype == torch.bfloat16
            change = layer.get_submodule("weft_adapters.student")(layer, inputs, torch.zeros(3, 48))
        expected = inputs.double() @ d.double().T
        assert (change - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_changed_where_there_are_some_and_counted_so(bias, attach):
    network = nn.ModuleDict({"with": nn.Linear(6, 4), "without": nn.Linear(6, 4, bias=False)})
    network["kernel"] = nn.Conv2d(3, 4, 2)
    recipe = FullChange(targets=("with", "without", "kernel"), bias=bias)
    report = recipe.match(recipe.layers(network), {}, {})
    own = attach(recipe, network).parameters("student")
    biases = ["with.full.bias", "kernel.full.bias"] if bias else []
    assert sorted(own) == sorted([*(f"{path}.full.weight" for path in network), *biases])
    assert recipe.trainable(report) == sum(p.numel() for p in own.values()) == 24 + 24 + 48 + 4 * len(biases)


def test_sets_hold_no_convolutions_and_exclude_takes_layers_away(tiny_wan):
    recipe = FullChange(targets="attention", exclude=("attn2.to_k",))
    report = recipe.match(recipe.layers(tiny_wan()), PRESETS, {})
    assert not report.convolutions and len(report.paths) == 14  # 2 blocks of 8 projections, less one each
    assert sorted(report.biases) == sorted(f"{path}.bias" for path in report.paths)


def test_it_is_refused_where_files_are_asked_for(tmp_path, attach, tiny_wan):
    with pytest.raises(ValueError, match=r"start_from: kind full is for roles that are not exported"):
        FullChange(start_from=tmp_path)
    adapters = attach(FullChange(), tiny_wan())
    with pytest.raises(
        ConfigError, match=r"kind full is for roles that are not exported, such as roles.critic.adapter"
    ):
        FullChange().exported(adapters.state_dict("student"))
