"""Kinds of adapters on single layers, against their papers' formulas."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from tests.adapters.conftest import PRESETS
from weft.adapters.initial import principal_factors
from weft.adapters.loha import LoHa
from weft.adapters.lokr import LoKr, sides
from weft.adapters.lora import Lora
from weft.adapters.low_rank import Product
from weft.adapters.modules import dense_weight, layers_of
from weft.adapters.oft import Oft
from weft.errors import ConfigError, ModelError


def one_linear(fan_in=12, out=10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(fan_in, out))


def shaken_state(adapters, seed=5):
    chance = torch.Generator().manual_seed(seed)
    state = {k: v + 0.3 * torch.randn(v.shape, generator=chance) for k, v in adapters.state_dict("s").items()}
    adapters.load_state_dict("s", state)
    return state


def changed(network, adapters, x):
    base = network(x)
    with adapters.use("s"), torch.no_grad():
        return network(x) - base


def test_loha_is_the_product_of_two_low_rank_changes_number_by_number():
    network = one_linear()
    adapters = LoHa(rank=2, alpha=3).attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    t = shaken_state(adapters)
    delta = 1.5 * (t["0.hada_w1_a"] @ t["0.hada_w1_b"]) * (t["0.hada_w2_a"] @ t["0.hada_w2_b"])
    x = torch.randn(4, 12)
    assert_close(changed(network, adapters, x), x @ delta.T, atol=1e-5, rtol=1e-4)


def test_lokr_is_a_kronecker_product():
    network = one_linear()
    adapters = LoKr(rank=1, alpha=2).attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    t = shaken_state(adapters)
    assert t["0.lokr_w1"].shape == (2, 3)  # of 10 = 2 x 5 and 12 = 3 x 4
    delta = 2 * torch.kron(t["0.lokr_w1"], t["0.lokr_w2_a"] @ t["0.lokr_w2_b"])
    x = torch.randn(4, 12)
    assert_close(changed(network, adapters, x), x @ delta.T, atol=1e-5, rtol=1e-4)


def test_sides_are_divided_by_the_factor_or_near_the_root():
    assert (sides(3072, -1), sides(127, -1), sides(128, 4), sides(10, 4)) == ((48, 64), (1, 127), (4, 32), (2, 5))


def test_oft_keeps_the_length_of_every_row_and_the_angles_between_them():
    network = one_linear(fan_in=16)
    weight = network[0].weight.detach().clone()
    adapters = Oft(block_size=8, series=None).attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    shaken_state(adapters)
    with adapters.use("s"), torch.no_grad():
        rotated = (network(torch.eye(16)) - network(torch.zeros(1, 16))).T
    assert not torch.allclose(rotated, weight, atol=1e-2)
    assert_close(rotated @ rotated.T, weight @ weight.T, atol=1e-5, rtol=1e-4)


def test_oft_in_blocks_that_do_not_divide_a_layer_is_refused_with_sizes_that_do():
    layers = {"a.to_q": (24, 24), "a.to_k": (24, 36)}
    with pytest.raises(
        ConfigError, match=r"8 does not divide the 36 inputs of 'a\.to_k'.* Sizes that divide all: 4, 6, 12"
    ):
        Oft(block_size=8, targets=("to_q", "to_k")).match(layers, {}, {})


# ---- PiSSA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [None, 16])
def test_principal_factors_are_the_best_approximation_of_their_rank(iterations):
    """Eckart and Young: the residual's norm is that of the singular values left out."""
    torch.manual_seed(1)
    u, v = torch.linalg.qr(torch.randn(30, 20))[0], torch.linalg.qr(torch.randn(20, 20))[0]
    values = 2.0 ** -torch.arange(20)
    weight = u * values @ v.T
    a, b = principal_factors(weight, 4, 0.5, iterations, seed=3)
    assert a.shape == (4, 20) and b.shape == (30, 4)
    residual = torch.linalg.matrix_norm(weight - 0.5 * b @ a)
    assert_close(residual, values[4:].square().sum().sqrt(), rtol=1e-4, atol=1e-6)
    assert_close(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0))


@pytest.mark.parametrize("backend", ["peft", "native"])
def test_pissa_learns_what_pefts_own_learns_and_leaves_the_base_alone(backend, tiny_wan, ask, attach):
    """PEFT takes B0 A0 out of the base's weights; we take it away beside them. SGD does not see the signs that a
    decomposition is free in."""
    recipe = Lora(rank=4, alpha=8, init="pissa", pissa_iterations=None, backend=backend)
    network = tiny_wan()
    adapters = attach(recipe, network)
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=list(adapters.paths), use_rslora=False
    )
    theirs = get_peft_model(tiny_wan(), config)
    ours = torch.optim.SGD(adapters.parameters("student").values(), lr=0.05)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        losses = []
        with adapters.use("student"):
            losses.append((ask(network) - 1).square().mean())
            losses[0].backward()
        losses.append((ask(theirs) - 1).square().mean())
        losses[1].backward()
        assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        for optimizer in (ours, other):
            optimizer.step()
            optimizer.zero_grad()
    with adapters.use("student"), torch.no_grad():
        assert_close(ask(network), ask(theirs), atol=1e-3, rtol=1e-3)
    assert torch.equal(ask(network), ask(tiny_wan()))


def test_pissas_first_values_are_the_same_factors_twice_and_cancel_exactly():
    for backend in ("peft", "native"):
        network = one_linear()
        adapters = Lora(rank=3, init="pissa", backend=backend).attach(network, ("0",), ("s",), 0)
        adapters.initialize()
        state = adapters.state_dict("s")
        assert torch.equal(state["0.lora_A.weight"], state["0.lora_A.first"]) and state["0.lora_A.first"].any()
        assert not changed(network, adapters, torch.randn(7, 12)).any()
        assert set(adapters.parameters("s")) == {"0.lora_A.weight", "0.lora_B.weight"}


@pytest.mark.parametrize("backend", ["peft", "native"])
def test_a_small_change_is_not_lost_in_bf16_beside_the_principal_part(backend):
    """A change of a thousandth of W: as a difference of two products it would drown in their rounding, 2^-9 of W."""
    network = one_linear(fan_in=32, out=24).to(torch.bfloat16)
    adapters = Lora(rank=8, init="pissa", backend=backend).attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    chance = torch.Generator().manual_seed(5)
    state = adapters.state_dict("s")
    moved = {k: v + 1e-3 * v.std() * torch.randn(v.shape, generator=chance) for k, v in state.items() if "weight" in k}
    adapters.load_state_dict("s", {**state, **moved})
    t = {key: tensor.double() for key, tensor in adapters.state_dict("s").items()}
    delta = t["0.lora_B.weight"] @ t["0.lora_A.weight"] - t["0.lora_B.first"] @ t["0.lora_A.first"]
    x = torch.randn(64, 32, generator=chance).to(torch.bfloat16)
    layer = network.get_submodule("0")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if backend == "peft":
            found = layer.lora_B["s"](layer.lora_A["s"](x))
        else:
            found = layer.weft_adapters["s"].low_rank(Product(layer), x)
    expected = x.double() @ delta.T
    assert (found - expected).norm() / expected.norm() < 2**-6  # some roundings of 2^-9 each


@pytest.mark.parametrize("backend", ["peft", "native"])
def test_pissa_reads_the_weights_of_a_quantized_base(backend):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    packed = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(plain.state_dict())
    packed = packed.to("cpu")
    packed(torch.zeros(1, 64))
    assert packed.weight.shape != (64, 64)
    dense = bitsandbytes.functional.dequantize_4bit(packed.weight, packed.weight.quant_state)
    assert_close(dense_weight(packed), dense.float(), atol=1e-6, rtol=1e-5)
    network = nn.Sequential(packed)
    adapters = Lora(rank=4, init="pissa", backend=backend, pissa_iterations=None).attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    state = adapters.state_dict("s")
    u, s, vh = torch.linalg.svd(dense.float())
    best = u[:, :4] * s[:4] @ vh[:4]
    assert_close(state["0.lora_B.weight"] @ state["0.lora_A.weight"], best, atol=1e-5, rtol=1e-4)
    assert changed(network, adapters, torch.randn(3, 64)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [LoHa(rank=2), LoKr(rank=2)])
def test_kinds_that_take_their_shape_from_the_weight_refuse_a_packed_one(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    packed(torch.zeros(1, 64))
    with pytest.raises(ModelError, match=rf"{kind.kind} cannot stand on '0', whose weight is packed \(Linear4bit\)"):
        kind.attach(nn.Sequential(packed), ("0",), ("s",), 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"init": "pissa", "input_dropout": 0.1, "max_norm": 1.0},
            "init: pissa does not go with input_dropout, max_norm",
        ),
        ({"init": "pissa", "start_from": "x"}, "init: pissa does not go with start_from"),
        ({"dora": True, "conv_rank": 4}, "dora does not go with conv_rank"),
        ({"conv_alpha": 4}, "conv_alpha has no meaning without conv_rank"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        Lora(**fields)


@pytest.mark.parametrize("section", [LoHa, LoKr, Oft])
@pytest.mark.parametrize("field", ["lora_plus", "max_norm", "input_dropout", "rank_dropout", "backend", "dora"])
def test_what_belongs_to_lora_is_no_key_of_other_kinds(section, field):
    with pytest.raises(ValidationError, match="Extra inputs"):
        section(**{field: 1})


# ---- Convolutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["peft", "native"])
def test_a_convolutions_change_is_a_convolution_with_the_product_kernel(backend):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 7, (1, 2, 2), stride=(1, 2, 2), padding=(0, 1, 1)))
    recipe = Lora(rank=9, conv_rank=2, conv_alpha=6, targets="0", backend=backend)
    adapters = recipe.attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    t = shaken_state(adapters)
    assert t["0.lora_A.weight"].shape == (2, 3, 1, 2, 2) and t["0.lora_B.weight"].shape == (7, 2, 1, 1, 1)
    kernel = 3 * torch.einsum("or,rixyz->oixyz", t["0.lora_B.weight"].flatten(1), t["0.lora_A.weight"])
    x = torch.randn(2, 3, 4, 6, 6)
    expected = functional.conv3d(x, kernel, stride=(1, 2, 2), padding=(0, 1, 1))
    assert_close(changed(network, adapters, x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["peft", "native"])
def test_rank_dropout_of_a_convolution_drops_ranks_and_not_places(backend):
    network = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False))
    recipe = Lora(conv_rank=4, rank_dropout=0.5, targets="0", backend=backend)
    adapters = recipe.attach(network.train(), ("0",), ("s",), 0)
    adapters.initialize()
    shaken_state(adapters)
    torch.manual_seed(0)
    out = changed(network, adapters, torch.ones(64, 3, 6, 6))
    assert_close(out, out[..., :1, :1].expand_as(out)) and len(out[:, 0, 0, 0].unique()) > 1


def test_max_norm_holds_for_a_convolution_too():
    network = nn.Sequential(nn.Conv2d(3, 5, 3))
    adapters = Lora(conv_rank=2, conv_alpha=1, max_norm=0.5, targets="0").attach(network, ("0",), ("s",), 0)
    adapters.initialize()
    shaken_state(adapters)
    adapters.after_step("s")
    t = adapters.state_dict("s")
    kernel = 0.5 * torch.einsum("or,rixy->oixy", t["0.lora_B.weight"].flatten(1), t["0.lora_A.weight"])
    assert_close(torch.linalg.vector_norm(kernel), torch.tensor(0.5))


def test_convolutions_are_adapted_only_with_a_rank_and_by_their_names(tiny_wan):
    layers = layers_of(tiny_wan())
    assert layers["patch_embedding"] == (48, 16, 1, 2, 2)
    with pytest.raises(ConfigError, match=r"'patch_embedding' is a convolution, and adapter\.conv_rank is not given"):
        Lora(targets=("attention", "patch_embedding")).match(layers, PRESETS, {})
    with pytest.raises(
        ConfigError, match=r"no target is a convolution\. Add one to adapter.targets, such as 'patch_embe"
    ):
        Lora(conv_rank=4, targets="all-linear").match(layers, PRESETS, {})
    report = Lora(rank=4, conv_rank=2, targets=("attention", "patch_embedding")).match(layers, PRESETS, {})
    assert len(report.paths) == 17 and report.convolutions == {"patch_embedding": (48, 16, 1, 2, 2)}
    assert report.parameters(4, conv_rank=2) == 16 * 4 * 96 + 2 * (16 * 4 + 48)


def test_a_convolution_with_groups_is_refused():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ModelError, match="'0' is a convolution with groups"):
        Lora(conv_rank=2).attach(network, ("0",), ("s",), 0)
