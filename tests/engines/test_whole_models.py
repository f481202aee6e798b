"""Every family and every way to keep weights, streamed, offloaded and taking turns: the gradients of a plain run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learners import learner_of, small_config
from tests.small import make_hunyuan, make_wan
from weft.contracts import Batch
from weft.engines.residency import frozen_by_block
from weft.engines.streaming import Turns
from weft.run.learner import Learner

LAYERS = 5
TRAVEL = {"recompute": True, "stream_blocks": 3, "offload_inputs": True}
KINDS = {"t2v": "wan", "i2v21": "wan", "ti2v": "wan", "experts": "wan", "hunyuan": "hunyuan-video"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    made = {kind: make_wan(root / kind, LAYERS, kind) for kind in ("t2v", "i2v21", "ti2v", "experts")}  # type: ignore[arg-type]
    return {**made, "hunyuan": make_hunyuan(root / "hunyuan", 3, 3)}


def learner_with(root: Path, models: dict[str, Path], kind: str, engine: dict[str, Any], **family: Any) -> Learner:
    both = {"expert": "both"} if kind == "experts" else {}
    change: dict[str, Any] = {"family": {"kind": KINDS[kind], **both, **family}, "engine": engine}
    return learner_of(small_config(root, models[kind], **change), shaken=False)


def batch_for(learner: Learner) -> Batch:
    """Two clips of 9x64x64 with conditions of the right shapes."""
    torch.manual_seed(0)
    family = learner.model.family
    shape = family.geometry().latent_shape(9, 64, 64)
    return Batch({"latents": torch.randn(2, *shape), **family.conditions(2, *shape[1:])}, ("a", "b"))


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Of the objective's own loss in each of its phases, B included since A's would be zero at the start."""
    batch, found = batch_for(learner), {}
    for phase in learner.objective.phases(0, learner.experts):
        parameters = learner.model.adapters.parameters(phase.role)
        with torch.no_grad():
            for number, parameter in enumerate(parameters.values()):
                chance = torch.Generator().manual_seed(number)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
        with learner.model.adapters.use(phase.role), learner.engine.computing():
            rng = learner.rng(phase.name, 0, accumulate=1)
            loss = learner.objective.loss(phase.name, learner.model, batch, learner.state, rng)
            learner.engine.backward(loss.total, last=True)
        found |= {f"{phase.role}/{name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        assert len(found) >= len(parameters)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert torch.isfinite(gradient).all(), name
        assert torch.equal(found[name], gradient), name
    assert any(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("kind", ["t2v", "i2v21", "ti2v", "hunyuan"])
def test_every_family_learns_the_same_from_blocks_that_travel(models, tmp_path, kind):
    expected = gradients(learner_with(tmp_path, models, kind, {}))
    assert_same(gradients(learner_with(tmp_path, models, kind, TRAVEL)), expected)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_and_scales_travel_with_their_block(models, tmp_path, dtype, precision):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    engine = {"precision": precision}
    expected = gradients(learner_with(tmp_path, models, "t2v", engine, dtype=dtype))
    learner = learner_with(tmp_path, models, "t2v", {**engine, **TRAVEL}, dtype=dtype)
    assert_same(gradients(learner), expected)
    (stream,) = learner.engine.streams  # type: ignore[attr-defined]
    taken = [t.dtype for parcel in stream.parcels.values() for t in parcel.tensors]
    assert {torch.uint8, torch.int8} & set(taken), "the codes are not among what is streamed"


@pytest.mark.parametrize(
    "engine", [{"experts": "one"}, {"experts": "one", **TRAVEL}, {"experts": "together", **TRAVEL}]
)
def test_two_experts_learn_the_same_wherever_the_other_waits(models, tmp_path, engine):
    plain, learner = (learner_with(tmp_path, models, "experts", e) for e in ({"experts": "together"}, engine))
    for step in range(4):
        plain.step = learner.step = step
        assert_same(gradients(learner), gradients(plain))
        for one in (plain, learner):
            for optimizer in one.optimizers.values():
                optimizer.zero_grad()


def test_of_two_experts_only_one_is_on_the_device(models, tmp_path):
    learner = learner_with(tmp_path, models, "experts", {"experts": "one"})
    turns = learner.model.ready
    assert isinstance(turns, Turns)
    hosts = {p.host.untyped_storage().data_ptr() for own in turns.parcels.values() for p in own}
    for name in ("low", "high", "low"):
        turns(name)
        there = {
            other: any(
                t.untyped_storage().data_ptr() not in hosts
                for t in frozen_by_block(learner.model.network.get_submodule(other), ())[None]
            )
            for other in ("high", "low")
        }
        assert there == {"high": name == "high", "low": name == "low"}
