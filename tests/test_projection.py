"""What a frozen layer says of itself: alone, under both backends, with hooks and forwards of somebody else."""

from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn

from weft.adapters.attach import attach
from weft.adapters.loha import LoHa
from weft.adapters.lora import Lora
from weft.adapters.named import NamedAdapters
from weft.adapters.recipe import Recipe, Standing
from weft.projection import PLAIN, LowRank, Opaque, projection

BACKENDS: tuple[Literal["native", "peft"], ...] = ("native", "peft")


def standing(**recipes: Recipe) -> tuple[nn.Sequential, NamedAdapters]:
    """Adapters with random values on one layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 10))
    adapters = attach(network, {name: Standing(recipe, ("0",)) for name, recipe in recipes.items()}, 0)
    for name in recipes:
        state = adapters.state_dict(name)
        adapters.load_state_dict(name, {key: torch.randn(t.shape) for key, t in state.items()})
    return network, adapters


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_tells_the_factors_of_the_role_in_use_and_nothing_under_none(backend):
    network, adapters = standing(
        student=Lora(rank=2, alpha=6, backend=backend), critic=Lora(rank=3, backend=backend)
    )  # fmt: skip
    for name, scale in (("student", 3.0), ("critic", 1.0), ("student", 3.0)):
        with adapters.use(name):
            known = projection(network[0])
        a, b = adapters.parameters(name).values()
        assert known.kernel is PLAIN and isinstance(known.change, LowRank)
        assert known.change.a is a and known.change.b is b and known.change.scale == scale
    with adapters.use(None):
        known = projection(network[0])
        assert known.kernel is PLAIN and known.change is None and known.tensors[0] is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", [{"dora": True}, {"init": "pissa"}, {"fused": False}], ids=str)
def test_what_is_more_than_two_factors_has_its_module_called(backend, fields: dict[str, Any]):
    network, adapters = standing(student=Lora(rank=2, backend=backend, **fields))
    with adapters.use("student"):
        assert projection(network[0]).kernel is None
    with adapters.use(None):
        network(torch.zeros(1, 12))
        assert projection(network[0]).kernel is PLAIN


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropout_is_opaque_in_training_alone(backend):
    network, adapters = standing(student=Lora(rank=2, backend=backend, rank_dropout=0.5))
    with adapters.use("student"):
        assert projection(network.train()[0]).kernel is None
        assert projection(network.eval()[0]).change is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("touch", ["hook", "pre-hook", "forward"])
def test_a_layer_that_somebody_else_has_a_say_in_is_called_and_answers_the_same_to_rounding(backend, touch):
    network, adapters = standing(student=Lora(rank=2, backend=backend))
    x = torch.randn(3, 12)
    with adapters.use("student"):
        expected = network(x)
        layer = network[0] if backend == "native" else network[0].base_layer
        if touch == "forward":
            layer.forward = partial(nn.Linear.forward, layer)
        elif touch == "hook":
            layer.register_forward_hook(lambda *_: None)
        else:
            layer.register_forward_pre_hook(lambda *_: None)
        assert projection(network[0]).kernel is None
        torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)


def test_wrappers_in_each_other_tell_what_the_one_in_use_adds():
    network, adapters = standing(student=Lora(rank=2), critic=LoHa(rank=2), third=Lora(rank=2, backend="native"))
    for name, known in (("student", True), ("critic", False), ("third", True), (None, True)):
        with adapters.use(name):
            network(torch.zeros(1, 12))
            assert (projection(network[0]).kernel is PLAIN) is known
            assert (projection(network[0]).change is not None) is (known and name is not None)


def test_two_adapters_that_answer_at_once_are_opaque():
    network, adapters = standing(student=Lora(rank=2), third=Lora(rank=2, backend="native"))
    for carrier in adapters.carriers:
        carrier.answer(carrier.names[0])
    network(torch.zeros(1, 12))
    assert isinstance(network[0].weft_change(), Opaque) and projection(network[0]).kernel is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_and_unfused_give_the_same_answers_and_gradients_to_a_millionth(backend):
    found = []
    for fused in (True, False):
        network, adapters = standing(student=Lora(rank=4, alpha=3, backend=backend, fused=fused))
        torch.manual_seed(1)
        x = torch.randn(64, 12, requires_grad=True)
        with adapters.use("student"):
            y = network(x)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *adapters.parameters("student").values()])])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()  # fp32 sums in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_scale_and_an_adapter_put_aside_compile_nothing_again(backend):
    torch._dynamo.reset()
    network, adapters = standing(student=Lora(rank=2, backend=backend))
    network[0].compile(backend="eager", fullgraph=True)
    x = torch.randn(3, 12)
    for scale in (1.0, 0.25):
        if backend == "native":
            network[0].weft_adapters["student"].scale = scale
        else:
            network[0].scaling["student"] = scale
        for name in ("student", None):
            with adapters.use(name), torch._dynamo.config.patch(error_on_recompile=scale != 1.0):
                answer = network(x)
                base = network[0] if backend == "native" else network[0].base_layer
                a, b = adapters.parameters("student").values()
                expected = x @ base.weight.T + base.bias + (scale * x @ a.T @ b.T if name else 0)
                torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
