"""Videos from an image, and HunyuanVideo's, are what diffusers' own pipelines make of the same noise."""

import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import HunyuanVideoPipeline, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from tests.learners import learner_of, small_config
from tests.run.test_sampling import CPU, ROUNDING, shot
from tests.small import make_hunyuan, make_wan
from weft.run.learner import Learner
from weft.run.sampling import denoise
from weft.run.shots import Shot, Told, encoded

HEIGHT, WIDTH = 32, 64  # pixels, of the picture and of the video: diffusers squeezes a picture, we cut it


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "first.png"
    chance = numpy.random.default_rng(0)
    Image.fromarray(chance.integers(0, 255, (HEIGHT, WIDTH, 3), numpy.uint8)).save(path)
    return path


def learner_for(root: Path, kind: str) -> Learner:
    options = {"expert": "both"} if "experts" in kind else {}
    model = make_wan(root / kind, kind=kind)  # type: ignore[arg-type]
    learner = learner_of(small_config(root, model, family=options))
    learner.model.network.eval()
    return learner


def ours(learner: Learner, shots: list[Shot]) -> tuple[Tensor, Told]:
    family = learner.model.family
    told = encoded(shots, family, family.encoders(CPU, lambda module: module))
    with learner.model.adapters.use(None):
        return denoise(learner.model, learner.engine, shots, told), told


@pytest.mark.parametrize("kind", ["i2v21", "i2v22", "i2v-experts", "ti2v"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_video_from_an_image_is_that_of_diffusers(kind, guidance, image, tmp_path):
    learner = learner_for(tmp_path, kind)
    family = learner.model.family
    one = shot(image=image, width=WIDTH, height=HEIGHT, frames=9, guidance=guidance)
    latents, told = ours(learner, [one])
    length = family.tokens_of_text

    def padded(states: Tensor) -> Tensor:
        return torch.cat([states.float(), torch.zeros(length - len(states), states.shape[1])])[None]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path / kind)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=Image.open(image), height=HEIGHT, width=WIDTH, num_frames=one.frames, num_inference_steps=one.steps,
        prompt_embeds=padded(told.texts[one.prompt]["text"]), guidance_scale=guidance, output_type="latent",
        negative_prompt_embeds=padded(told.texts[one.negative]["text"]), latents=one.noise(family.geometry()),
        return_dict=False, max_sequence_length=length,
    )[0]  # fmt: skip
    assert_close(latents, theirs, **ROUNDING)


def test_a_clean_first_frame_stays_in_the_video_and_a_video_without_one_has_another(image, tmp_path):
    learner = learner_for(tmp_path, "ti2v")
    one = shot(image=image, width=WIDTH, height=HEIGHT, frames=9)
    latents, told = ours(learner, [one])
    assert torch.equal(latents[:, :, :1], told.image_of(one)["first"])
    free, _ = ours(learner, [shot(width=WIDTH, height=HEIGHT, frames=9)])
    assert (free[:, :, 1:] - latents[:, :, 1:]).abs().max() > 1e-3


def test_shots_from_two_images_are_what_they_are_alone(image, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (WIDTH, HEIGHT), (20, 200, 90)).save(other)
    learner = learner_for(tmp_path, "i2v22")
    shots = [shot(image=path, width=WIDTH, height=HEIGHT, guidance=2.0) for path in (image, other)]
    together, _ = ours(learner, shots)
    for i, one in enumerate(shots):
        assert_close(together[i : i + 1], ours(learner, [one])[0], **ROUNDING)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_hunyuan_video_is_asked_with_its_guidance_as_an_input_and_samples_what_diffusers_samples(tmp_path):
    model = make_hunyuan(tmp_path / "hunyuan")
    family: dict[str, Any] = {"kind": "hunyuan-video"}
    learner = learner_of(small_config(tmp_path, model, family=family))
    learner.model.network.eval()
    one = shot("a red square", width=64, height=32, frames=5, guidance=6.0, steps=5)
    latents, told = ours(learner, [one])
    pipeline = HunyuanVideoPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    text = told.texts[one.prompt]["text"].float()
    embeds = torch.cat([text, torch.randn(256 - len(text), text.shape[1])])[None]  # what is masked does not count
    theirs = pipeline(
        prompt_embeds=embeds, prompt_attention_mask=(torch.arange(256) < len(text))[None],
        pooled_prompt_embeds=told.texts[one.prompt]["pooled"][None], height=one.height, width=one.width,
        num_frames=one.frames, num_inference_steps=one.steps, guidance_scale=6.0, output_type="latent",
        latents=one.noise(learner.model.family.geometry()), return_dict=False,
    )[0]  # fmt: skip
    assert_close(latents, theirs, **ROUNDING)
    weak, _ = ours(learner, [shot("a red square", width=64, height=32, frames=5, guidance=1.0, steps=5)])
    assert (weak - latents).abs().max() > 1e-4
