"""Text as Wan's own pipeline encodes it, and latents that are the posterior's mean in the VAE's own units."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, UMT5EncoderModel

from tests.families.conftest import MEAN, STD
from weft.families.wan import Wan
from weft.families.wan_encoders import WanEncoders, clean_prompt

CPU = torch.device("cpu")
MEAN_C, STD_C = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (MEAN, STD))
CAPTIONS = ["a red circle moves right", "", "a&amp;b", "square " * 100]


@pytest.fixture(scope="module")
def encoders(folder) -> WanEncoders:
    return Wan(source=str(folder)).encoders(CPU, lambda module: module)


@pytest.fixture(scope="module")
def vae(folder) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(folder / "vae").eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """(1, 3, 5, 16, 16) in [-1, 1]."""
    return torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_text_cut_to_its_length_and_padded_with_zeros_is_what_diffusers_encodes(encoders, folder):
    # In fp32, for sums in fp16 depend on how a kernel splits them.
    text_model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    exact = replace(encoders, text_model=text_model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = WanPipeline(tokenizer, text_model, vae=None, scheduler=None)
    theirs, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=64, device=CPU)
    for told, expected in zip(exact.text(CAPTIONS), theirs, strict=True):
        ours = told["text"]
        padded = torch.cat([ours, ours.new_zeros(64 - len(ours), ours.shape[1])])
        assert not expected[len(ours) :].any()
        assert_close(padded, expected, rtol=0, atol=1e-5)  # fp32 rounding


def test_text_ends_where_its_tokens_end_and_at_the_limit(encoders):
    lengths = [len(told["text"]) for told in encoders.text(CAPTIONS)]
    assert lengths[1] == 1 and lengths[3] == 64
    assert 1 < lengths[0] < 64


def test_the_empty_prompt_is_an_encoded_end_token_and_not_zeros(encoders):
    (empty,) = (told["text"] for told in encoders.text([""]))
    (space,) = (told["text"] for told in encoders.text(["  \n "]))
    end = encoders.text_model(torch.tensor([[encoders.tokenizer.eos_token_id]])).last_hidden_state[0]
    assert empty.shape == (1, 128) and empty.abs().max() > 0
    assert_close(empty, end, rtol=0, atol=5e-3)  # fp16, alone and among 63 masked tokens
    assert torch.equal(empty, space)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a &lt;red&gt; circle", "a <red> circle"),
        ("tom &amp;amp; jerry", "tom & jerry"),
        ("a cafÃ© in the rain", "a café in the rain"),
        ("  two\t lines \n\n of   text ", "two lines of text"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_of_entities_mojibake_and_whitespace_as_diffusers_does(written, read):
    assert clean_prompt(written) == prompt_clean(written) == read


def test_a_caption_is_cleaned_before_it_is_encoded(encoders):
    dirty, clean = encoders.text(["a  red &amp;\n blue circle", "a red & blue circle"])
    assert torch.equal(dirty["text"], clean["text"])


@torch.no_grad()
def test_latents_are_the_posterior_mean_normalised_by_the_vaes_constants(encoders, vae, pixels):
    posterior = vae.encode(pixels).latent_dist
    assert posterior.std.max() > 0  # a sample would be another tensor
    assert_close(encoders.latents(pixels), (posterior.mean - MEAN_C) / STD_C)


def test_latents_are_no_sample_they_repeat_bit_by_bit(encoders, pixels):
    torch.manual_seed(0)
    first = encoders.latents(pixels)
    torch.manual_seed(1)
    assert torch.equal(first, encoders.latents(pixels))
    assert first.dtype == torch.float32 and first.shape == (1, 16, 2, 2, 2)


@torch.no_grad()
def test_decoding_undoes_the_normalisation(encoders, vae):
    latents = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents * STD_C + MEAN_C).sample.clamp(-1, 1)
    assert_close(encoders.pixels(latents), expected)


def test_pixels_that_are_not_finite_give_latents_that_are_not_and_never_zeros(encoders, pixels):
    broken = pixels.clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    assert encoders.latents(broken).isnan().any()


def test_both_encoders_are_frozen_and_the_vae_is_fp32(encoders):
    parameters = [*encoders.vae.parameters(), *encoders.text_model.parameters()]
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in encoders.vae.parameters()} == {torch.float32}


@torch.no_grad()
def test_tiling_is_the_autoencoders_own_and_another_identity(folder, encoders, pixels):
    """Frames larger than a tile, 256 pixels a side, are encoded in several."""
    tiled = Wan(source=str(folder), vae_tiling=True)
    large = torch.nn.functional.interpolate(pixels, size=(5, 272, 16))
    parts = tiled.encoders(CPU, lambda module: module)
    assert parts.vae.use_tiling and not encoders.vae.use_tiling
    whole, by_tiles = encoders.latents(large), parts.latents(large)
    assert whole.shape == by_tiles.shape and not torch.equal(whole, by_tiles)
    assert tiled.identity()["latents"] != Wan(source=str(folder)).identity()["latents"]
