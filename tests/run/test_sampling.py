"""Samples are what diffusers' own pipeline makes of the same noise, told, steps and adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.testing import assert_close

from tests.learners import ROLE, learner_of, small_config, weights
from tests.run.test_resume import silent
from tests.small import config_of, plain_config
from weft.geometry import VideoGeometry
from weft.run.apply import apply_adapters
from weft.run.learner import Learner
from weft.run.sampling import decoded, denoise, generate
from weft.run.shots import Shot, Told, encoded, shape_problems
from weft.run.start import train_run

CPU = torch.device("cpu")
# Each of a few steps multiplies rounding by the guidance; the latents are of size 1.
ROUNDING = {"rtol": 0.0, "atol": 2e-4}
WAN = VideoGeometry(fps=16, space_stride=8, time_stride=4, patch=(1, 2, 2), latent_channels=16)


def shot(prompt: str = "a red circle", **change: Any) -> Shot:
    facts = {"negative": "blurred", "frames": 5, "width": 48, "height": 32, "steps": 4, "guidance": 1.0, "seed": 3}
    return Shot(prompt=prompt, **{**facts, **change})


@pytest.fixture(scope="module")
def learner(world, tmp_path_factory) -> Learner:
    learner = learner_of(small_config(tmp_path_factory.mktemp("sampling"), world / "model"))
    learner.model.network.eval()
    return learner


@pytest.fixture(scope="module")
def pipeline(world) -> WanPipeline:
    made = WanPipeline.from_pretrained(world / "model")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def told(learner) -> Told:
    family = learner.model.family
    encoders = family.encoders(CPU, lambda module: module)
    return encoded([shot("a red circle"), shot("two blue squares move")], family, encoders)


def sampled(learner: Learner, shots: Sequence[Shot], told: Told, role: str | None = None) -> Tensor:
    with learner.model.adapters.use(role):
        return denoise(learner.model, learner.engine, shots, told)


def by_diffusers(pipeline: WanPipeline, one: Shot, told: Told) -> Tensor:
    text = {prompt: made["text"] for prompt, made in told.texts.items()}

    def padded(states: Tensor) -> Tensor:
        return torch.cat([states.float(), torch.zeros(64 - len(states), states.shape[1])])[None]

    return pipeline(
        prompt_embeds=padded(text[one.prompt]), negative_prompt_embeds=padded(text[one.negative]),
        height=one.height, width=one.width, num_frames=one.frames, num_inference_steps=one.steps,
        guidance_scale=one.guidance, latents=one.noise(WAN), output_type="latent", return_dict=False,
        max_sequence_length=64,
    )[0]  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_are_those_of_diffusers_pipeline(learner, pipeline, told, guidance):
    one = shot(guidance=guidance)
    assert_close(sampled(learner, [one], told), by_diffusers(pipeline, one, told), **ROUNDING)


def test_guidance_counts_from_the_negative_prompt_so_that_0_is_the_negative_prompt_alone(learner, told):
    """u + g (c - u), Wan's convention; in c + g (c - u) it would be the prompt alone."""
    unguided = sampled(learner, [shot(guidance=0.0)], told)
    negative = sampled(learner, [shot("blurred", guidance=1.0)], told)
    assert_close(unguided, negative, **ROUNDING)
    assert not torch.allclose(sampled(learner, [shot(guidance=1.0)], told), negative, atol=1e-3)


def test_without_the_adapter_the_sample_is_that_of_the_bare_base(learner, told, world, tmp_path):
    bare = learner_of(small_config(tmp_path, world / "model"), shaken=False)
    assert torch.equal(sampled(learner, [shot()], told), sampled(bare, [shot()], told, ROLE))  # B is zero there
    assert not torch.allclose(sampled(learner, [shot()], told, ROLE), sampled(learner, [shot()], told), atol=1e-3)


def test_shots_that_are_denoised_together_are_what_they_are_alone(learner, told):
    """Prompts of unequal length: the shorter is padded by the longer."""
    shots = [shot(guidance=3.0), shot("two blue squares move", seed=4, guidance=3.0)]
    together = sampled(learner, shots, told, ROLE)
    for i, one in enumerate(shots):
        assert_close(together[i : i + 1], sampled(learner, [one], told, ROLE), **ROUNDING)


def test_shots_of_several_shapes_come_back_in_order(learner, told):
    shots = [shot(), shot(width=32, steps=2), shot(seed=9), shot("two blue squares move", frames=1)]
    generated = generate(learner.model, learner.engine, shots, told)
    for one, latents in zip(shots, generated, strict=True):
        assert latents.shape == (1, *WAN.latent_shape(one.frames, one.height, one.width))
        assert_close(latents, sampled(learner, [one], told), **ROUNDING)


def test_noise_depends_on_seed_and_size_alone():
    assert torch.equal(shot("a").noise(WAN), shot("b", steps=9, guidance=7.0).noise(WAN))
    assert not torch.equal(shot(seed=1).noise(WAN), shot(seed=2).noise(WAN))
    assert shot().noise(WAN).shape == (1, 16, 2, 4, 6)


def test_prompts_are_encoded_once_each_and_the_empty_negative_too(learner):
    family = learner.model.family
    shots = [shot("a", negative=""), shot("b", negative=""), shot("a", negative="")]
    found = encoded(shots, family, family.encoders(CPU, lambda module: module)).texts
    assert sorted(found) == ["", "a", "b"] and len(found[""]["text"]) == 1 and found[""]["text"].any()


def test_decoded_frames_are_bytes_of_height_by_width(learner):
    class Grey:
        def pixels(self, latents: Tensor) -> Tensor:
            return torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 5, 2, 4)

    frames = decoded(torch.zeros(1), Grey())  # type: ignore[arg-type]
    assert frames.shape == (5, 2, 4, 3) and frames.dtype == "uint8"
    assert frames[0, 0, 0].tolist() == [0, 128, 255]


def test_sizes_off_the_models_grid_are_refused_all_at_once_with_the_nearest():
    width, height, frames = shape_problems(WAN, shot(frames=80, width=840, height=478), "samples.")
    assert "samples.width: 840 does not divide by 16. The nearest is 832." in width  # half way: to the even multiple
    assert "samples.height: 478 does not divide by 16. The nearest is 480." in height
    assert "samples.frames: 80 is not of the form 4k+1. The nearest below is 77." in frames
    assert not shape_problems(WAN, shot(frames=81, width=832, height=480), "")


def test_ti2v_5b_takes_multiples_of_32_pixels():
    wan_5b = VideoGeometry(fps=24, space_stride=16, time_stride=4, patch=(1, 2, 2), latent_channels=48)
    assert not shape_problems(wan_5b, shot(frames=121, width=1280, height=704), "")
    (problem,) = shape_problems(wan_5b, shot(frames=121, width=1280, height=720), "")
    assert "height: 720 does not divide by 32" in problem


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """The folder of a short run with a scale that is not 1."""
    root = tmp_path_factory.mktemp("finished")
    plain = plain_config(root, world / "model", world / "clips")
    plain["data"]["cache_folder"] = str(world / "cache")
    change = {"schedule": {"steps": 4, "warmup": 0}, "adapter": {"alpha": 8}, "optimizer": {"lr": 3e-2}}
    config = config_of(plain, **change, validation={"every": 0}, save={"every": 0})
    train_run(config, silent)
    return config.folder


def test_diffusers_loads_the_trained_adapter_and_samples_what_weft_samples(finished, pipeline, told):
    one = shot(guidance=2.0)
    base = by_diffusers(pipeline, one, told)
    pipeline.load_lora_weights(finished / "adapter")
    try:
        theirs = by_diffusers(pipeline, one, told)
    finally:
        pipeline.unload_lora_weights()
    applied = apply_adapters([finished], None, "cpu", "fp32", 1.0)
    with applied.use():
        ours = denoise(applied.model, applied.engine, [one], told)
    assert_close(ours, theirs, **ROUNDING)
    assert (theirs - base).abs().max() > 100 * ROUNDING["atol"]


def test_an_adapter_at_strength_zero_is_the_base(finished, learner, told):
    applied = apply_adapters([finished], None, "cpu", "fp32", 0.0)
    with applied.use():
        ours = denoise(applied.model, applied.engine, [shot()], told)
    assert torch.equal(ours, sampled(learner, [shot()], told))


def test_sampling_moves_no_weight_and_leaves_the_chance_of_the_run_alone(learner, told):
    before = {name: p.detach().clone() for name, p in weights(learner).items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sampled(learner, [shot()], told, ROLE)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in weights(learner).items())
