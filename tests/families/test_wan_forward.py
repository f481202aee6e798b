"""What Wan is asked: diffusers' own network at 1000 t, with text padded by zeros that are attended to."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.testing import assert_close

from weft.contracts import Denoise
from weft.errors import ConfigError
from weft.families.wan import Wan
from weft.families.weights import HERE

CPU = torch.device("cpu")
T = torch.tensor([0.8333, 0.00042])  # 833.3 and 0.42: neither is a whole timestep


@pytest.fixture
def question() -> Denoise:
    chance = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, 128, generator=chance)
    return Denoise(torch.randn(2, 16, 3, 4, 6, generator=chance), T, {"text": text})


@pytest.fixture
def plain_network(folder) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / "transformer")


@torch.no_grad()
def asked(network, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    return network(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


@torch.no_grad()
def test_the_velocity_is_the_networks_answer_at_1000_t_with_text_zero_padded_to_512(folder, plain_network, question):
    family = Wan(source=str(folder), text_length=512)
    text = torch.cat([question.cond["text"], torch.zeros(2, 507, 128)], 1)
    expected = asked(plain_network, question.x, torch.tensor([833.3, 0.42]), text)
    network = family.load("fp32", "default", HERE)
    assert_close(family.forward(network, question), expected, rtol=1e-5, atol=1e-6)  # 1000 * 0.8333 is rounded once


@torch.no_grad()
def test_a_timestep_is_not_truncated_to_a_whole_number(wan, question):
    network, seen = wan.load("fp32", "default", HERE), []
    network.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    wan.forward(network, question)
    assert seen[0].dtype == torch.float32
    assert_close(seen[0], torch.tensor([833.3, 0.42]))


@torch.no_grad()
def test_padding_is_attended_to_and_not_masked(wan, plain_network, question):
    """64 tokens of which 59 are zeros draw attention away from the 5 that are not."""
    padded = wan.forward(wan.load("fp32", "default", HERE), question)
    bare = asked(plain_network, question.x, 1000 * question.t, question.cond["text"])
    assert (padded - bare).abs().max() > 1e-3


@torch.no_grad()
def test_text_that_is_cached_at_its_own_length_or_padded_in_a_batch_is_the_same_text(wan, question):
    network = wan.load("fp32", "default", HERE)
    text = torch.cat([question.cond["text"], torch.zeros(2, 9, 128)], 1)
    longer = Denoise(question.x, question.t, {"text": text})
    assert torch.equal(wan.forward(network, question), wan.forward(network, longer))


def test_text_is_512_tokens_long_unless_the_tokenizer_ends_before(own):
    limit = own / "tokenizer" / "tokenizer_config.json"
    for said, length in ((64, 64), (512, 512), (10**30, 512)):
        limit.write_text(f'{{"model_max_length": {said}}}')
        assert Wan(source=str(own)).tokens_of_text == length


def test_frozen_weights_lie_in_the_engines_precision_or_in_the_one_that_is_asked_for(folder):
    network = Wan(source=str(folder)).load("bf16", "default", HERE)
    assert network.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert {p.dtype for p in network.condition_embedder.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in network.parameters())
    full = Wan(source=str(folder), dtype="fp32").load("bf16", "default", HERE)
    assert full.blocks[0].attn1.to_q.weight.dtype == torch.float32


def test_the_sampler_is_the_sources_at_its_shift_or_at_the_one_that_is_asked_for(folder):
    scheduler = Wan(source=str(folder)).scheduler()
    assert type(scheduler).__name__ == "UniPCMultistepScheduler" and scheduler.config.flow_shift == 3.0
    at_five = Wan(source=str(folder), shift=5.0).sampler(4, CPU)
    # 5 s / (1 + 4 s) at the scheduler's own times, which begin a thousandth below 1.
    even = torch.linspace(1, 1 / 1000, 5)[:-1]
    assert_close(at_five.sigmas[:-1].float(), 5 * even / (1 + 4 * even), rtol=0, atol=2e-3)


def test_a_copy_with_another_source_looks_there(folder, wan_folder):
    first = Wan(source=str(folder))
    assert first.image == "none"
    other = first.model_copy(update={"source": str(wan_folder("ti2v"))})
    assert (first.image, other.image) == ("none", "frames")


def test_half_precision_weights_under_an_fp32_engine_are_refused_with_both_ways_out(folder):
    with pytest.raises(ConfigError, match=r"family\.dtype: bf16 .* family\.dtype=auto, or engine\.precision=bf16"):
        Wan(source=str(folder), dtype="bf16").weight_dtype("fp32")


def test_the_skeleton_has_the_networks_names_and_shapes_and_reads_no_weights(own, plain_network):
    for path in own.rglob("*.safetensors"):
        path.unlink()
    skeleton = Wan(source=str(own)).skeleton()
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in plain_network.named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == shapes
