"""A few-step student's samples are its own way in training, and what diffusers makes with the same list of times."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from tests.learners import learner_of, small_config
from tests.run.test_image_sampling import learner_for
from tests.run.test_resume import silent
from tests.run.test_sampling import ROUNDING, shot
from tests.small import make_hunyuan, make_wan
from weft.few_steps import StepList
from weft.formats.adapter_file import STEP_LIST
from weft.formats.reading import read_adapter
from weft.math.chance import seed_of
from weft.objectives.few_step import Rollout, Scene
from weft.run.learner import Learner
from weft.run.milestones import Keeper
from weft.run.sampling import denoise, generate
from weft.run.shots import Shot, Told, encoded, in_few_steps
from weft.run.showing import Gallery, LazyEncoders

FOUR = StepList.of(4, 5.0)
FAMILY_TOKENS = 64
DMD = {"objective": {"kind": "dmd", "steps": 4, "shift": 5.0}}


def few(prompt: str = "a red circle", steps: StepList = FOUR, **change: Any) -> Shot:
    made = in_few_steps(shot(prompt), steps, {"default": 1.0})
    return replace(made, **change)


@pytest.fixture(scope="module")
def learner(world, tmp_path_factory) -> Learner:
    """A student and a critic whose weights change the network."""
    config = small_config(tmp_path_factory.mktemp("few"), world / "model", **DMD)
    learner = learner_of(config)
    learner.model.network.eval()
    return learner


@pytest.fixture(scope="module")
def told(learner) -> Told:
    family = learner.model.family
    encoders = family.encoders(torch.device("cpu"), lambda module: module)
    return encoded([few("a red circle"), few("two blue squares move")], family, encoders)


def sampled(learner: Learner, shots: list[Shot], told: Told) -> Tensor:
    with learner.model.adapters.use("student"):
        return denoise(learner.model, learner.engine, shots, told)


@dataclass(frozen=True)
class Noted(Scene):
    """A scene whose noises are given, the first one first."""

    noises: tuple[Tensor, ...] = ()

    def noise(self, rng: Any) -> Tensor:
        return next(rng)


def test_a_sample_is_the_students_own_way_in_training_to_its_last_step(learner, told):
    one, family = few(), learner.model.family
    noises = [one.noise(family.geometry(), step) for step in range(4)]
    text = told.texts[one.prompt]
    cond = {"text": text["text"][None], "text_mask": torch.ones(1, len(text["text"]), dtype=torch.bool)}
    scene = Noted(torch.zeros_like(noises[0]), cond, cond, None, "default")
    rollout = Rollout(FOUR, 0, (0, 1, 2, 3), (("student", "default"),) * 4)
    with torch.no_grad():
        expected = rollout.run(learner.model, scene, 3, iter(noises), learn=False)  # type: ignore[arg-type]
    assert_close(sampled(learner, [one], told), expected, **ROUNDING)


@pytest.fixture(scope="module")
def exported(learner, world, tmp_path_factory) -> Path:
    """The folder of the student's adapter, as a run writes it."""
    config = small_config(tmp_path_factory.mktemp("exported"), world / "model", **DMD)
    keeper = Keeper(config, {}, {"weft.seed": "5"}, silent, None, None)  # type: ignore[arg-type]
    (folder,) = keeper.saver.export(learner, "adapter")
    keeper.saver.close()
    return folder


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_the_student_alone_is_written_with_its_times_in_each_files_header(learner, exported, file):
    assert sorted(path.name for path in exported.parent.iterdir()) == ["adapter"]
    adapter = read_adapter(exported / file)
    said = json.loads(adapter.metadata[STEP_LIST])
    assert said["times"] == pytest.approx([1, 0.9375, 0.8333333, 0.625])
    assert (said["shift"], said["steps"], said["guidance"]) == (5.0, 4, 1.0)
    assert adapter.step_list == FOUR and adapter.metadata["weft.seed"] == "5"
    for key, tensor in learner.model.adapters.parameters("student").items():
        assert torch.equal(adapter.tensors[key], tensor)


def with_times(pipeline: DiffusionPipeline, scheduler: Any, one: Shot) -> dict[str, Any]:
    """Set a pipeline up as Weft's documents say; further arguments of its call give it the noises of a shot."""
    scheduler.sigma_min = 1 / one.steps
    pipeline.scheduler = scheduler
    torch.manual_seed(seed_of(one.seed, "sample", 1))

    def seeded(pipe: DiffusionPipeline, step: int, timestep: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        torch.manual_seed(seed_of(one.seed, "sample", step + 2))
        return dict(given)

    return {
        "callback_on_step_end": seeded, "num_inference_steps": one.steps, "guidance_scale": 1.0, "height": one.height,
        "width": one.width, "num_frames": one.frames, "output_type": "latent", "return_dict": False,
    }  # fmt: skip


def padded(states: Tensor, length: int = FAMILY_TOKENS) -> Tensor:
    return torch.cat([states.float(), torch.zeros(length - len(states), states.shape[1])])[None]


SCHEDULERS = {
    "lcm": lambda shift: FlowMatchLCMScheduler(shift=shift),
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True),
}


@pytest.mark.parametrize("steps", [FOUR, StepList.of(1, 5.0), StepList.of(3, 8.0)], ids=str)
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_diffusers_makes_the_same_video_of_the_students_file(learner, exported, told, world, scheduler, steps):
    """Two of its schedulers mix with fresh noise. Their default times end near 0: sigma_min = 1 / steps makes them
    ours, before the shift."""
    one = few(steps=steps)
    pipeline = WanPipeline.from_pretrained(world / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(exported)
    arguments = with_times(pipeline, SCHEDULERS[scheduler](steps.shift), one)
    theirs = pipeline(
        prompt_embeds=padded(told.texts[one.prompt]["text"]), max_sequence_length=FAMILY_TOKENS,
        latents=one.noise(learner.model.family.geometry()), **arguments,
    )[0]  # fmt: skip
    assert_close(pipeline.scheduler.sigmas[:-1], torch.tensor(steps.times), rtol=0, atol=1e-7)
    assert_close(sampled(learner, [one], told), theirs, **ROUNDING)
    with learner.model.adapters.use(None):
        assert (denoise(learner.model, learner.engine, [one], told) - theirs).abs().max() > 100 * ROUNDING["atol"]


def test_a_given_first_frame_stays_clean_at_every_step(tmp_path):
    path = tmp_path / "first.png"
    Image.new("RGB", (64, 32), (20, 200, 90)).save(path)
    learner = learner_for(tmp_path, "ti2v")
    one = few(image=path, width=64, height=32, frames=9)
    family = learner.model.family
    told = encoded([one], family, family.encoders(torch.device("cpu"), lambda module: module))
    with learner.model.adapters.use(None):
        ours = denoise(learner.model, learner.engine, [one], told)
    assert torch.equal(ours[:, :, :1], told.image_of(one)["first"])
    pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path / "ti2v")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=Image.open(path), prompt_embeds=padded(told.texts[one.prompt]["text"], family.tokens_of_text),
        latents=one.noise(family.geometry()), max_sequence_length=family.tokens_of_text,
        **with_times(pipeline, FlowMatchLCMScheduler(shift=5.0), one),
    )[0]  # fmt: skip
    assert_close(ours, theirs, **ROUNDING)


def test_fresh_noise_is_each_shots_own_whatever_it_is_sampled_with(learner, told):
    shots = [few(), few("two blue squares move", seed=4), few(steps=StepList.of(2, 5.0)), few(seed=9)]
    with learner.model.adapters.use("student"):
        together = generate(learner.model, learner.engine, shots, told)
    for one, latents in zip(shots, together, strict=True):
        assert_close(latents, sampled(learner, [one], told), **ROUNDING)
    geometry = learner.model.family.geometry()
    noises = [few().noise(geometry, step) for step in range(3)]
    assert torch.equal(noises[0], shot(steps=30, guidance=5.0).noise(geometry))
    assert all(abs(float((a * b).mean())) < 0.1 for a, b in pairwise(noises))


def test_a_student_that_is_told_its_guidance_is_told_what_it_learned_under(tmp_path):
    """HunyuanVideo's guidance is an input; the 1 of a step list says that nothing is asked twice."""
    family = {"kind": "hunyuan-video", "guidance": 6.0}
    learner = learner_of(small_config(tmp_path, make_hunyuan(tmp_path / "hunyuan"), family=family))
    told = encoded([few()], learner.model.family, learner.model.family.encoders(torch.device("cpu"), lambda m: m))

    def latents(guidance: float) -> Tensor:
        with learner.model.adapters.use(None):
            return denoise(learner.model, learner.engine, [few(guidance=guidance)], told)

    assert torch.equal(latents(1.0), latents(6.0))
    assert not torch.equal(latents(6.0), latents(2.0))


# ---- Two experts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A model whose boundary is 0.9, which in fp32 is above 900 / 1000."""
    folder = make_wan(tmp_path_factory.mktemp("pair") / "model", kind="experts")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.9}))
    return folder


def asked(learner: Learner, one: Shot) -> list[tuple[str, int]]:
    """Which network is asked at each step, and how many questions at once."""
    told = encoded([one], learner.model.family, learner.model.family.encoders(learner.engine.device, lambda m: m))
    heard: list[tuple[str, int]] = []

    def hear(name: str) -> Any:
        return lambda module, args, kwargs, made: heard.append((name, len(kwargs["hidden_states"])))

    experts = learner.model.network.named_children()
    hooks = [network.register_forward_hook(hear(name), with_kwargs=True) for name, network in experts]
    with learner.model.adapters.use(None):
        denoise(learner.model, learner.engine, [one], told)
    for hook in hooks:
        hook.remove()
    return heard


def test_each_step_asks_the_expert_of_its_time_and_only_an_undistilled_one_twice(pair, tmp_path):
    learner = learner_of(small_config(tmp_path, pair, family={"expert": "both"}))
    both = in_few_steps(shot(), FOUR, {"high": 1.0, "low": 1.0})
    assert asked(learner, both) == [("high", 1), ("high", 1), ("low", 1), ("low", 1)]
    half = in_few_steps(shot(), StepList((1.0, 0.9, 0.5), 5.0), {"high": 1.0, "low": 4.0})
    assert asked(learner, half) == [("high", 1), ("high", 1), ("low", 2)]


# ---- Samples of a run ---------------------------------------------------------------------------------------------


def gallery(root: Path, model: Path, experts: str = "all", **change: Any) -> Gallery:
    samples = {"prompts": ["a square", "a ring"], "steps": 30, "guidance": 5.0, "frames": 5, "width": 32, "height": 32,
               "experts": experts}  # fmt: skip
    config = small_config(root, model, **{**DMD, "samples": samples, **change})
    return Gallery(config, silent, LazyEncoders(lambda: config.family.encoders(torch.device("cpu"), lambda m: m)), 8.0)


def facts(shots: list[Shot]) -> set[tuple[Any, ...]]:
    return {(one.steps, one.guidance, one.guidance_low, one.step_list) for one in shots}


def test_a_run_samples_its_student_in_few_steps_and_the_base_as_samples_say(world, tmp_path):
    made = gallery(tmp_path, world / "model")
    student, teacher = made.shots(True), made.shots(False)
    assert facts(student) == {(4, 1.0, None, FOUR)} and facts(teacher) == {(30, 5.0, None, None)}
    for a, b in zip(student, teacher, strict=True):
        assert (a.prompt, a.seed) == (b.prompt, b.seed)
    plain = small_config(tmp_path, world / "model", samples={"prompts": ["a"], "steps": 30})
    assert facts(replace(made, config=plain).shots(True)) == {(30, 5.0, None, None)}


@pytest.mark.parametrize(
    ("expert", "experts", "guidance"),
    [("both", "all", (1.0, 1.0)), ("high", "all", (1.0, 5.0)), ("low", "all", (5.0, 1.0)), ("low", "trained", (1, 1))],
)
def test_an_expert_without_a_student_keeps_the_guidance_of_samples(pair, tmp_path, expert, experts, guidance):
    data = {"inputs": "data"}  # with which one expert can be distilled alone
    made = gallery(tmp_path, pair, experts, family={"expert": expert}, objective={**DMD["objective"], **data})
    assert facts(made.shots(True)) == {(4, *guidance, FOUR)}


def test_the_files_of_a_students_samples_are_called_as_ever(learner, world, tmp_path):
    made = gallery(tmp_path, world / "model")
    made.sample(learner)
    assert sorted(path.name for path in (made.config.folder / "samples" / "step_000000").iterdir()) == [
        "00.mp4", "01.mp4", "sheet.png",
    ]  # fmt: skip
