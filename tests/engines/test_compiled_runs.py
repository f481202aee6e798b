"""Runs whose blocks are compiled: roles, strengths, dropout, a resume to the bit, and shards on two processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.testing import assert_close

from tests.engines import equality
from tests.engines.test_compiling import compiled_learner, losses, traced_only
from tests.engines.test_streaming_compiled import parted
from tests.learners import ROLE, batch_of, learner_of, parts, small_config, trained, weights
from tests.multi import spawn
from tests.small import make_wan
from weft.contracts import Denoise
from weft.engines.compiling import Compiler
from weft.math.sharded import whole
from weft.run.assemble import assemble
from weft.run.checkpoint_tree import adopt, learner_state, pack, unpack
from weft.run.learner import Learner

DMD = {"kind": "dmd", "steps": 2, "student_every": 2, "guidance": 3.0, "timesteps": None}
ASKED = ("student", "critic", None, "critic", "student", None)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("shallow") / "model", layers=1)


def asked(learner: Learner, roles: Sequence[str | None]) -> list[Tensor]:
    """The velocity under each role, and what its square teaches the role."""
    batch, found = batch_of(2), []
    question = Denoise(batch["noise"], batch["t"], {"text": batch["text"]})
    for role in roles:
        with learner.model.adapters.use(role), torch.set_grad_enabled(role is not None):
            answer = learner.model.velocity(question)
            found.append(answer.detach())
            if role is not None:
                answer.square().mean().backward()
                own = learner.model.adapters.parameters(role)
                found += [p.grad.clone() for p in own.values() if p.grad is not None]
                for parameter in own.values():
                    parameter.grad = None
    return found


def scale(learner: Learner, strength: float) -> None:
    """As PEFT itself changes what its adapters are multiplied by."""
    for module in learner.model.network.modules():
        if isinstance(module, BaseTunerLayer):
            for role in ("student", "critic"):
                module.set_scale(role, strength)


@pytest.mark.slow
def test_roles_that_take_turns_and_strengths_that_change_compile_nothing_anew(shallow, tmp_path):
    """Of a lean network with adapters fused: one graph for each role and for the base."""
    config = small_config(tmp_path, shallow, objective=DMD, adapter={"backend": "peft", "targets": "attn1.to_q"})
    compiled, plain = compiled_learner(config, Compiler(backend=traced_only)), learner_of(config)
    (region,) = compiled.engine.regions  # type: ignore[attr-defined]
    for strength in (1.0, 0.5, 0.25):
        for learner in (compiled, plain):
            scale(learner, strength)
        for one, other in zip(asked(compiled, ASKED), asked(plain, ASKED), strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert region.graphs == 3 and region.stopped is None


def test_dropout_is_drawn_in_compiled_blocks_as_in_others(shallow, tmp_path):
    dropping = {"input_dropout": 0.2, "rank_dropout": 0.2, "targets": "attn1.to_q"}
    config = small_config(tmp_path, shallow, adapter=dropping, schedule={"steps": 4})
    learner, batches = compiled_learner(config, Compiler(backend=traced_only)), [batch_of(2, seed) for seed in range(2)]
    found = losses(trained(learner, config, batches))
    assert found == pytest.approx(losses(trained(learner_of(config), config, batches)), rel=1e-6)
    assert learner.engine.regions[0].graphs <= 2 and learner.engine.regions[0].stopped is None  # type: ignore[attr-defined]
    sure = small_config(tmp_path, shallow, adapter={"targets": "attn1.to_q"}, schedule={"steps": 4})
    assert found != pytest.approx(losses(trained(learner_of(sure), sure, batches)), rel=1e-6)


@pytest.mark.slow
def test_a_run_of_compiled_blocks_is_resumed_to_the_bit(shallow, tmp_path):
    """Parted into a forward and a backward graph under a budget, as inductor's blocks are."""
    config = small_config(tmp_path, shallow, adapter={"targets": "attn1.to_q"}, schedule={"steps": 6})
    batches = [batch_of(2, seed) for seed in range(3)]

    def fresh() -> Learner:
        return compiled_learner(config, Compiler(budget=0.5, backend=parted))

    straight, first, second = fresh(), fresh(), fresh()
    expected = losses(trained(straight, config, batches))
    half = config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": 3})})
    told = losses(trained(first, half, batches))
    tensors: dict[str, Tensor] = {}
    tree = pack(learner_state(first), tensors)
    adopt(second, unpack(tree, {name: tensor.clone() for name, tensor in tensors.items()}))
    assert told + losses(trained(second, config, batches)) == expected
    assert all(torch.equal(p, weights(second)[name]) for name, p in weights(straight).items())


def sharded_gradients(model: Path, compiled: bool) -> tuple[dict[str, Tensor], list[Any]]:
    """Of two micro-batches, one on each process; and of each network its graphs, and why it stopped."""
    config = small_config(model.parent, model, parallel={"shard": "auto"}, adapter={"targets": "attn1.to_q"})
    engine: Any = config.engine.open(config.parallel)
    engine.compile_with(Compiler(backend=traced_only) if compiled else None)
    learner = assemble(config, engine)
    equality.shake(learner, ROLE)
    for _ in range(2):
        for parameter in weights(learner).values():
            parameter.grad = None
        equality.taught(learner, parts(batch_of(2), 1, 1))
    found = {name: whole(p.grad).clone() for name, p in weights(learner).items() if p.grad is not None}
    return found, [(region.graphs, region.stopped) for region in engine.regions]


@pytest.mark.slow
def test_compiled_blocks_whose_weights_lie_in_shards_have_the_gradients_of_plain_ones(model):
    """FSDP2 gathers and frees the weights around a block's compiled forward."""
    expected, _ = sharded_gradients(model, compiled=False)
    for found, regions in spawn(2, sharded_gradients, model, True):
        assert found.keys() == expected.keys() and len(found) > 0
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        assert regions == [(2, None)]  # the first block's input wants no gradient
