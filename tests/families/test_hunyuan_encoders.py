"""Captions as HunyuanVideo's own pipeline encodes them, and latents scaled by its constant."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from torch import Tensor
from torch.testing import assert_close

from weft.families.hunyuan_encoders import HunyuanEncoders
from weft.families.hunyuan_video import HunyuanVideo

CPU = torch.device("cpu")
CAPTIONS = ["a red circle moves right", "", "the square " * 200]


@pytest.fixture(scope="module")
def encoders(hunyuan_folder) -> HunyuanEncoders:
    return HunyuanVideo(source=str(hunyuan_folder)).encoders(CPU, lambda module: module)


@pytest.fixture(scope="module")
def vae(hunyuan_folder) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo.from_pretrained(hunyuan_folder / "vae").eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """(2, 3, 5, 16, 32) in [-1, 1]."""
    return torch.rand(2, 3, 5, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_states_lengths_and_pooled_text_are_what_diffusers_pipeline_encodes(encoders):
    pipeline = HunyuanVideoPipeline(
        text_encoder=encoders.llama, tokenizer=encoders.tokenizer, transformer=None, vae=None, scheduler=None,
        text_encoder_2=encoders.clip, tokenizer_2=encoders.clip_tokenizer,
    )  # fmt: skip
    states, pooled, mask = pipeline.encode_prompt(CAPTIONS, device=CPU)
    for i, told in enumerate(encoders.text(CAPTIONS)):
        length = len(told["text"])
        assert length == int(mask[i].sum()) and mask[i, :length].all()
        assert_close(told["text"], states[i, :length])
        assert_close(told["pooled"], pooled[i])


def test_text_is_the_captions_own_and_ends_at_256_tokens(encoders):
    told = encoders.text(CAPTIONS)
    assert len(told[2]["text"]) == 256
    # The template's last token here, which is one longer than Llama's; 5 words; the end of the turn.
    assert (len(told[0]["text"]), len(told[1]["text"])) == (7, 2)
    assert {name: tensor.shape[-1] for name, tensor in told[0].items()} == {"text": 32, "pooled": 20}


def test_a_caption_is_encoded_the_same_alone_and_beside_a_longer_one(encoders):
    (alone,), beside = encoders.text(CAPTIONS[:1]), encoders.text(CAPTIONS)
    assert_close(alone["text"], beside[0]["text"])
    assert_close(alone["pooled"], beside[0]["pooled"])


@torch.no_grad()
def test_latents_are_the_posterior_mean_times_the_constant_and_decoding_divides_by_it(encoders, vae, pixels):
    posterior = vae.encode(pixels).latent_dist
    assert posterior.std.max() > 0  # a sample would be another tensor
    latents = encoders.latents(pixels)
    assert latents.shape == (2, 16, 2, 2, 4) and latents.dtype == torch.float32
    assert_close(latents, 0.476986 * posterior.mean)
    assert_close(encoders.pixels(latents), vae.decode(posterior.mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_no_first_frame_is_told(encoders, pixels):
    assert encoders.given(pixels) == {}


def test_all_encoders_are_frozen_and_the_vae_is_fp32(encoders):
    modules = (encoders.vae, encoders.llama, encoders.clip)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert {p.dtype for p in encoders.vae.parameters()} == {torch.float32}
