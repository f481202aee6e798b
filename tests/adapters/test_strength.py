"""Dropouts, max-norm scaling, and the arithmetic of low-rank changes, against closed forms on one linear layer."""

from math import sqrt
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from weft.adapters.lora import Lora
from weft.errors import ModelError
from weft.math.lowrank import delta_norm, delta_weight, norm_ratio

BACKENDS = ("native", "peft")


def one_layer(backend: Any, **fields: Any):
    """A network of one zero layer 6 -> 6 with A and B so that the adapted answer is scale * (h, 0) with h = 2 x[:4]."""
    layer = nn.Linear(6, 6, bias=False)
    nn.init.zeros_(layer.weight)
    network = nn.Sequential(layer)
    adapters = Lora(rank=4, alpha=4, backend=backend, **fields).attach(network, ("0",), ("student",), 0)
    eye = torch.eye(6)
    adapters.load_state_dict("student", {"0.lora_A.weight": 2 * eye[:4], "0.lora_B.weight": eye[:, :4]})
    return network.train(), adapters


def answer(network, adapters, x):
    torch.manual_seed(0)
    with adapters.use("student"), torch.no_grad():
        return network(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_dropout_drops_single_rank_activations_and_rescales(backend):
    out = answer(*one_layer(backend, activation_dropout=0.25), torch.ones(64, 50, 6))[..., :4]
    assert set(out.unique().tolist()) == {0.0, torch.tensor(2 / 0.75).item()}
    assert_close(out.mean(), torch.tensor(2.0), atol=0.06, rtol=0)  # 12,800 draws: 5 deviations of the mean


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_dropout_keeps_or_drops_a_rank_for_all_tokens_of_an_item(backend):
    out = answer(*one_layer(backend, rank_dropout=0.5), torch.ones(400, 7, 6))[..., :4]
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, 4.0}
    assert_close(out.mean(), torch.tensor(2.0), atol=0.25, rtol=0)  # 1,600 draws
    assert (out[:, 0].std(dim=1) > 0).any()  # ranks of one item differ


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_dropout_drops_the_whole_call_and_does_not_rescale(backend):
    network, adapters = one_layer(backend, module_dropout=0.5)
    torch.manual_seed(0)
    with adapters.use("student"), torch.no_grad():
        calls = [network(torch.ones(3, 6))[:, :4] for _ in range(200)]
    assert all(torch.equal(call, call[:1, :1].expand_as(call)) for call in calls)
    values = torch.stack([call[0, 0] for call in calls])
    assert set(values.tolist()) == {0.0, 2.0} and 70 < (values > 0).sum() < 130


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_dropout_drops_inputs_of_a_and_rescales(backend):
    out = answer(*one_layer(backend, input_dropout=0.2), torch.ones(64, 50, 6))[..., :4]
    assert set(out.unique().tolist()) == {0.0, 2.5}
    assert_close(out.mean(), torch.tensor(2.0), atol=0.06, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["input_dropout", "activation_dropout", "rank_dropout", "module_dropout"])
def test_no_dropout_acts_in_eval_mode(backend, kind):
    network, adapters = one_layer(backend, **{kind: 0.9})
    assert torch.equal(answer(network.eval(), adapters, torch.ones(5, 6))[:, :4], torch.full((5, 4), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_norm_shrinks_a_large_change_to_the_limit_half_in_a_and_half_in_b(backend):
    _, adapters = one_layer(backend, max_norm=1.0)
    told = adapters.after_step("student")
    state = adapters.state_dict("student")
    # ||2 I_4||_F = 4, so dW is a quarter, and A and B are each halved.
    assert_close(state["0.lora_A.weight"], torch.eye(6)[:4])
    assert_close(state["0.lora_B.weight"], torch.eye(6)[:, :4] / 2)
    assert told == {"max_norm/scaled": 1.0, "max_norm/mean": 1.0, "max_norm/largest": 1.0}
    assert adapters.after_step("student")["max_norm/scaled"] == 0


@pytest.mark.parametrize("max_norm", [None, 4.5])
def test_max_norm_leaves_a_small_change_alone(max_norm):
    _, adapters = one_layer("native", max_norm=max_norm)
    before = {key: value.clone() for key, value in adapters.state_dict("student").items()}
    told = adapters.after_step("student")
    assert all(torch.equal(value, before[key]) for key, value in adapters.state_dict("student").items())
    assert told == ({} if max_norm is None else {"max_norm/scaled": 0.0, "max_norm/mean": 4.0, "max_norm/largest": 4.0})


def test_a_new_adapter_has_norm_zero_and_ratio_one():
    assert norm_ratio(torch.tensor([0.0, 0.4, 1.0, 4.0]), 1.0).tolist() == [1.0, 1.0, 1.0, 0.25]


def test_the_norm_is_that_of_the_whole_matrix():
    torch.manual_seed(0)
    a, b = torch.randn(3, 20), torch.randn(11, 3)
    assert_close(delta_norm(a, b, 0.7), torch.linalg.matrix_norm(delta_weight(a, b, 0.7)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dora_starts_at_the_base_and_its_magnitude_scales_whole_outputs(backend):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    expected = network(x)
    adapters = Lora(rank=2, dora=True, backend=backend).attach(network, ("0",), ("student",), 0)
    adapters.initialize()
    with adapters.use("student"):
        assert_close(network(x), expected)
        state = {key: value.clone() for key, value in adapters.state_dict("student").items()}
        state["0.lora_magnitude_vector"] *= 3
        adapters.load_state_dict("student", state)
        bias = network.get_parameter("0.bias" if backend == "native" else "0.base_layer.bias")
        assert_close(network(x), 3 * (expected - bias) + bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rslora_multiplies_by_alpha_over_the_root_of_rank(backend):
    plain, rooted = one_layer(backend), one_layer(backend, rslora=True)
    x = torch.ones(1, 6)
    assert_close(answer(*rooted, x), sqrt(4) * answer(*plain, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_do_not_fit_are_refused_naming_the_first_of_each_kind(backend):
    _, adapters = one_layer(backend)
    strange = {"0.lora_A.weight": torch.zeros(3, 6), "1.lora_B.weight": torch.zeros(6, 4)}
    with pytest.raises(ModelError) as caught:
        adapters.load_state_dict("student", strange)
    text = str(caught.value)
    assert "missing, first '0.lora_B.weight'" in text and "no place in it, first '1.lora_B.weight'" in text
    assert "'0.lora_A.weight': (3, 6) in place of (4, 6)" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_path_that_is_no_linear_layer_is_refused_before_anything_is_changed(backend):
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ModelError, match="no linear layers, first '1'"):
        Lora(backend=backend).attach(network, ("0", "1"), ("student",), 0)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
