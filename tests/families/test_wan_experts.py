"""Two networks, one for noisy times and one for times near data: which is which, and where one ends."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from weft.contracts import DEFAULT, Denoise, Expert
from weft.errors import ConfigError
from weft.families.wan import Wan
from weft.families.weights import HERE


@pytest.fixture
def source(wan_folder) -> str:
    return str(wan_folder("experts"))


HIGH, LOW = Expert("high", (0.875, 1.0)), Expert("low", (0.0, 0.875))


@pytest.mark.parametrize(("asked", "trained"), [("high", (HIGH,)), ("low", (LOW,)), ("both", (HIGH, LOW))])
def test_an_expert_is_trained_at_its_own_times_and_samples_need_both_the_noisy_one_first(source, asked, trained):
    family = Wan(source=source, expert=asked)
    assert family.experts == trained
    assert family.all_experts == (HIGH, LOW)


def test_image_to_video_parts_its_experts_at_nine_tenths(wan_folder):
    high, low = Wan(source=str(wan_folder("i2v-experts")), expert="both").experts
    assert (high.times, low.times) == ((0.9, 1.0), (0.0, 0.9))


def test_the_boundary_can_be_set(source):
    high, low = Wan(source=source, expert="both", boundary=0.5).experts
    assert (high.times, low.times) == ((0.5, 1.0), (0.0, 0.5))


@pytest.mark.parametrize(("expert", "part"), [("high", "transformer"), ("low", "transformer_2")])
def test_diffusers_transformer_is_the_expert_for_noisy_times(wan_folder, source, expert, part):
    network = Wan(source=source, expert=expert).load("fp32", expert, HERE)
    weights = load_file(wan_folder("experts") / part / "diffusion_pytorch_model.safetensors")
    for name in ("blocks.0.attn1.to_q.weight", "proj_out.weight"):
        assert torch.equal(network.get_parameter(name), weights[name])


@torch.no_grad()
def test_both_experts_answer_and_differ(source):
    family = Wan(source=source, expert="both")
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    question = Denoise(x, torch.tensor([0.9]), family.conditions(1, 2, 4, 4))
    high, low = (family.forward(family.load("fp32", e.name, HERE), question) for e in family.experts)
    assert high.shape == low.shape == x.shape
    with pytest.raises(AssertionError):
        assert_close(high, low)


def test_of_two_experts_one_has_to_be_chosen(source):
    with pytest.raises(ConfigError, match=r"family\.expert: .* two networks\. .* high \(times from 0\.875\), .*both"):
        Wan(source=source).experts  # noqa: B018


def test_a_model_with_one_network_has_no_expert_to_choose(wan_folder):
    source = str(wan_folder("t2v"))
    assert Wan(source=source).experts == Wan(source=source).all_experts == (DEFAULT,)
    with pytest.raises(ConfigError, match=r"family\.expert: .* has one network, and no 'low' one"):
        Wan(source=source, expert="low").experts  # noqa: B018
    with pytest.raises(ConfigError, match=r"family\.boundary: .* has one network, for all times"):
        Wan(source=source, boundary=0.9).experts  # noqa: B018


def test_the_identity_is_that_of_the_experts_that_are_trained(source):
    high, low, both = (Wan(source=source, expert=name).identity() for name in ("high", "low", "both"))
    assert len({high["network"], low["network"], both["network"]}) == 3
    assert high["latents"] == low["latents"] and high["text"] == low["text"]


def test_each_expert_takes_as_many_bytes_as_its_file_says(source):
    family = Wan(source=source, expert="both")
    for expert in family.experts:
        network = family.load("fp32", expert.name, HERE)
        real = sum(t.nbytes for t in [*network.parameters(), *network.buffers()])
        assert sum(family.weight_bytes("fp32").values()) == real
