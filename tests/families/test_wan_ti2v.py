"""A clean first frame in TI2V-5B: its tokens are at time 0, and what is asked equals diffusers' own question."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.testing import assert_close

from weft.contracts import Denoise
from weft.families.wan import Wan
from weft.families.wan_network import token_timesteps
from weft.families.weights import HERE

CPU = torch.device("cpu")
T = torch.tensor([0.8333, 0.25, 0.5])


@pytest.fixture(scope="module")
def family(wan_folder) -> Wan:
    return Wan(source=str(wan_folder("ti2v")))


@pytest.fixture(scope="module")
def network(family):
    return family.load("fp32", "default", HERE)


@pytest.fixture(scope="module")
def plain(family) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(f"{family.source}/transformer")


@pytest.fixture(scope="module")
def question() -> Denoise:
    chance = torch.Generator().manual_seed(0)
    return Denoise(
        torch.randn(3, 48, 3, 4, 6, generator=chance), T, {"text": torch.randn(3, 64, 128, generator=chance)}
    )


def given(*rows: list[bool]) -> Tensor:
    return torch.tensor(rows)


FIRST, NONE, TWO = [True, False, False], [False, False, False], [True, False, True]


def asked(question: Denoise, known: Tensor | None) -> Denoise:
    return Denoise(question.x, question.t, question.cond, known)


def test_the_model_takes_a_clean_frame_runs_at_24_frames_a_second_and_16_pixels_a_cell(family):
    geometry = family.geometry()
    assert family.image == "frames"
    assert (geometry.fps, geometry.space_stride, geometry.side_multiple, geometry.latent_channels) == (24, 16, 32, 48)
    assert geometry.latent_shape(121, 704, 1280) == (48, 31, 44, 80)
    assert geometry.tokens(121, 704, 1280) == 27_280


def test_latents_have_48_channels_and_the_clip_may_begin_with_one_frame(family):
    encoders = family.encoders(CPU, lambda module: module)
    pixels = torch.rand(2, 3, 5, 64, 32) * 2 - 1
    latents = encoders.latents(pixels)
    assert latents.shape == (2, 48, 2, 4, 2)
    # The autoencoder is causal: the first latent frame knows the first frame of pixels alone, and may be given clean.
    assert_close(latents[:, :, :1], encoders.latents(pixels[:, :, :1]))
    assert encoders.pixels(latents).shape == pixels.shape
    assert encoders.given(pixels) == {}


def test_tokens_of_given_frames_are_at_time_0_and_the_others_at_1000_t(family):
    times = token_timesteps(T, given(FIRST, NONE, TWO), torch.zeros(3, 48, 3, 4, 6), (1, 2, 2))
    assert times.shape == (3, 18) and times.dtype == torch.float32
    expected = torch.tensor([[0, 833.3, 833.3], [250, 250, 250], [0, 500, 0]]).repeat_interleave(6, 1)
    assert_close(times, expected)


@pytest.mark.parametrize("items", [1, 2, 3])
@torch.no_grad()
def test_a_clean_first_frame_is_asked_as_diffusers_pipeline_asks(family, network, plain, question, items):
    """Its mask, 0 on the first frame, times t, one value for each patch, for one item and for several."""
    known = given(*[FIRST] * items)
    mask = torch.ones(3, 4, 6)
    mask[0] = 0
    x, text = question.x[:items], question.cond["text"][:items]
    times = torch.stack([(mask[:, ::2, ::2] * t).flatten() for t in 1000 * T[:items]])
    expected = plain(x, times, text, return_dict=False)[0]
    ours = family.forward(network, Denoise(x, T[:items], {"text": text}, known))
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_nothing_given_is_the_same_question_with_one_time_for_each_token(family, network, question):
    with_tokens = family.forward(network, asked(question, given(NONE, NONE, NONE)))
    assert_close(with_tokens, family.forward(network, asked(question, None)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_item_of_a_batch_has_its_own_given_frames(family, network, question):
    known = given(FIRST, NONE, TWO)
    together = family.forward(network, asked(question, known))
    for i in range(3):
        part = slice(i, i + 1)
        alone = Denoise(question.x[part], question.t[part], {"text": question.cond["text"][part]}, known[part])
        assert_close(together[part], family.forward(network, alone), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_given_frames_change_the_answer(family, network, question):
    free, first = (family.forward(network, asked(question, given(*[row] * 3))) for row in (NONE, FIRST))
    assert (free - first).abs().max() > 1e-3
