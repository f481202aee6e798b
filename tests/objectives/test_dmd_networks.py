"""The distillation objective on a real small Wan: what every question is told, and the gradient that comes of it."""

import pytest
import torch
from torch.testing import assert_close

from tests.learners import TEXT_WIDTH, batch_of, learner_of, small_config
from tests.objectives.test_few_step import rng
from tests.small import make_wan
from weft.contracts import DEFAULT, Batch, NoState
from weft.families.wan_network import with_image
from weft.math.dmd import matching_gradient
from weft.objectives.dmd import Dmd
from weft.objectives.few_step import estimate, scene_of

DISTILLED = {"kind": "dmd", "timesteps": None}


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_a_network_that_goes_on_from_an_image_is_told_it_in_every_question(tmp_path, phase):
    """Wan's further channels are the image's, also for the teacher's question without the caption."""
    learner = learner_of(small_config(tmp_path, make_wan(tmp_path / "model", kind="i2v22"), objective=DISTILLED))
    family, objective = learner.model.family, learner.objective
    assert isinstance(objective, Dmd)
    chance, asked = torch.Generator().manual_seed(0), []
    shape = (1, 16, 2, 4, 4)
    told = {"image": torch.randn(shape, generator=chance), "text": torch.randn(1, 5, TEXT_WIDTH, generator=chance)}
    beside = {"negative/text": torch.randn(1, 3, TEXT_WIDTH, generator=chance)}
    batch = Batch({"latents": torch.randn(shape, generator=chance), **told, **beside}, ("clip",))
    network = learner.model.network
    network.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    with learner.model.adapters.use(phase):
        objective.loss(phase, learner.model, batch, NoState(), rng(1)).total.backward()
    channels = with_image(torch.zeros(shape), told["image"])[:, 16:]
    left = objective.rollout(family.experts[0], family).exit(rng(1), phase)
    assert len(asked) == left + (4 if phase == "student" else 2)
    assert all(torch.equal(kwargs["hidden_states"][:, 16:], channels) for kwargs in asked)
    texts = [kwargs["encoder_hidden_states"] for kwargs in asked]
    assert sum(torch.equal(text[:, :3], beside["negative/text"]) for text in texts) == (phase == "student")


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_a_students_phase_is_that_of_the_student_alone_on_what_critic_and_teacher_said(
    tmp_path, backend, recompute
):
    """Trap 42: with recomputation the last step's blocks run again in the backward pass, after critic and teacher were
    asked. By hand: the estimates first, then the student's step alone, and autograd's gradient of it."""
    change = {"adapter": {"backend": backend}, "engine": {"recompute": recompute}, "objective": DISTILLED}
    learner = learner_of(small_config(tmp_path, make_wan(tmp_path / "model"), **change))
    model, objective, batch = learner.model, learner.objective, both_texts()
    assert isinstance(objective, Dmd)
    with model.adapters.use("student"):
        objective.loss("student", model, batch, NoState(), rng(2)).total.backward()
    found = {name: p.grad for name, p in model.adapters.parameters("student").items()}

    scene, chance = scene_of(batch, "default", None), rng(2)
    way = objective.rollout(DEFAULT, model.family)
    left = way.exit(chance, "student")
    with torch.no_grad():
        sample = way.run(model, scene, left, chance, learn=False)
        t, noise = objective.look(DEFAULT, model.family, scene, chance), scene.noise(chance)
        x = scene.noised(sample, noise, t)
        fake = estimate(model, scene, x, t, "critic")
        real = estimate(model, scene, x, t, None, guidance=objective.guidance)
    way_again = rng(2)
    with model.adapters.use("student"):
        again = way.run(model, scene, left, way_again, learn=True)
        pull = (matching_gradient(sample, fake, real) / sample[0].numel()).detach()
        expected = torch.autograd.grad(again, list(model.adapters.parameters("student").values()), pull)
    assert any(gradient.any() for gradient in expected)
    for (name, gradient), by_hand in zip(found.items(), expected, strict=True):
        assert gradient is not None
        assert_close(gradient, by_hand, rtol=1e-4, atol=1e-6 * float(by_hand.abs().max()) + 1e-9, msg=name)
    assert all(p.grad is None for p in model.adapters.parameters("critic").values())


def both_texts() -> Batch:
    """Latents (2, 16, 2, 4, 4) with captions and a shorter negative prompt."""
    batch, chance = batch_of(2), torch.Generator().manual_seed(8)
    tensors = {name: batch[name] for name in ("latents", "text")}
    return Batch({**tensors, "negative/text": torch.randn(1, 3, TEXT_WIDTH, generator=chance)}, batch.keys)
