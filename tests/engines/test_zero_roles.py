"""Student and critic on one base under DeepSpeed's ZeRO-2 and ZeRO-3: they learn what they learn on one process."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.engines.equality import BOUND, distance, shake
from tests.learners import ROLE, Given, NoMilestones, batch_of, small_config
from tests.multi import spawn
from tests.small import merged
from weft.contracts import Batch, BuildOptimizer, Denoise, Expert, Model, Phase, State
from weft.engines import zero_weights
from weft.run.assemble import assemble
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.train import Course, train

pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
pytestmark = pytest.mark.slow

STEPS, EVERY = 4, 2  # the student moves at every second step
MICRO_BATCHES = 4  # of a phase, on all processes together
LIMITS = {"critic": 0.05, "student": 0.004}  # below the gradients' own lengths
TORCH: dict[str, Any] = {"kind": "torch"}
TWO: dict[str, Any] = {"kind": "deepspeed", "zero": 2}
THREE: dict[str, Any] = {"kind": "deepspeed", "zero": 3}
OFFLOADED = {**THREE, "offload_optimizer": True, "offload_parameters": True}
FP16: dict[str, Any] = {"engine": {"precision": "fp16"}}
PEFT: dict[str, Any] = {"engine": {"recompute": True}, "adapter": {"backend": "peft"}}
FULL: dict[str, Any] = {"roles": {"critic": {"adapter": {"kind": "full", "targets": "attention"}}}}
# Without recomputation a student's graph waits while critic and teacher are asked.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero2": (TWO, {}), "zero2 fp16": (TWO, FP16), "zero3": (THREE, {}), "zero3 peft": (THREE, PEFT),
    "zero3 full": (OFFLOADED, FULL),
}  # fmt: skip
ALONE = {"": (TORCH, {}), "fp16": (TORCH, FP16), "peft": (TORCH, PEFT), "full": (TORCH, FULL)}


@dataclass(frozen=True)
class Dealt:
    """Micro-batches dealt out to the ranks in turn."""

    given: Sequence[Batch]
    last_step: int
    name: str = "dealt"
    epoch_draws: int | None = None

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        return islice(cycle(self.given), start + rank, None, world)

    def position(self, drawn: int) -> dict[str, Any]:
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None: ...


def micro_batch(seed: int) -> Batch:
    """One clip, and the negative prompt of the teacher's guidance."""
    clip = batch_of(1, seed)
    return Batch({**clip.tensors, "negative/text": batch_of(1, 99)["text"]}, clip.keys)


def learner_of(
    model: Path, engine: Mapping[str, Any], change: Mapping[str, Any], objective: Any = None
) -> tuple[Learner, RunConfig]:
    """A student that moves at every second step, a critic with another rate, and their config."""
    torch.set_num_threads(1)
    ranks = 1 if engine == TORCH else 2
    basis = {
        "engine": engine,
        "objective": {"kind": "dmd", "steps": 2, "student_every": EVERY, "guidance": 3.0, "timesteps": None},
        "roles": {"critic": {"optimizer": {"kind": "adamw", "lr": 3e-3}, "max_norm": LIMITS["critic"]}},
        "schedule": {"steps": STEPS, "accumulate": MICRO_BATCHES // ranks, "max_norm": LIMITS["student"]},
    }
    config = small_config(model.parent, model, **merged(basis, change))
    config = config if objective is None else config.model_copy(update={"objective": objective})
    learner = assemble(config, config.engine.open(config.parallel))
    for role in learner.model.adapters.names:
        shake(learner, role)
    return learner, config


def taken(learner: Learner, config: RunConfig, until: int) -> dict[str, Any]:
    """Steps until that one; what was told of them, and the state then: whole adapters and optimizers."""
    told: list[Any] = []
    learner.drawn = learner.pace.micro_batches(learner.step) * MICRO_BATCHES
    stream = [Dealt([micro_batch(seed) for seed in range(7)], until)]
    rates = {name: config.rate_of(name) for name in learner.optimizers}
    train(learner, stream, Course(config.schedule, NoMilestones(), told.append, rates=rates))
    adapters = learner.model.adapters
    return {
        "told": [event.metrics for event in told],
        "adapters": {role: copied(adapters.state_dict(role)) for role in adapters.names},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()},
        "engine": learner.engine.state_dict(),
    }


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def restored(learner: Learner, state: Mapping[str, Any], step: int) -> None:
    learner.step = step
    for role, tensors in state["adapters"].items():
        learner.model.adapters.load_state_dict(role, tensors)
    for name, saved in state["optimizers"].items():
        learner.optimizers[name].load_state_dict(saved)
    learner.engine.load_state_dict(state["engine"])


def gone_on(model: Path, engine: Mapping[str, Any], state: Mapping[str, Any], steps: range) -> dict[str, Any]:
    """What a fresh learner makes of a state."""
    learner, config = learner_of(model, engine, {})
    restored(learner, state, steps.start)
    return taken(learner, config, steps.stop)


def all_taken(model: Path, cases: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    found = {}
    for name, (engine, change) in cases.items():
        learner, config = learner_of(model, engine, change)
        found[name] = taken(learner, config, STEPS) | {"whole": whole(learner.model.network)}
    return found


def whole(network: nn.Module) -> int:
    """Numbers of frozen weights that ZeRO-3 spreads and that are whole in this process now."""
    return sum(p.numel() for p in network.parameters() if not p.requires_grad and hasattr(p, "ds_id"))


def left_behind(model: Path) -> dict[str, int]:
    """Numbers of the last block's weights that are whole when a student's backward pass has reached the first one, by
    who was asked while its graph waited."""
    learner, _ = learner_of(model, THREE, {})
    network, adapters = learner.model.network, learner.model.adapters
    found, batch = {}, micro_batch(0)
    question = Denoise(batch["noise"], batch["t"], {"text": batch["text"]})
    for name, others in {"nobody": [], "critic and teacher": ["critic", None]}.items():
        seen: list[int] = []

        def watch(block: nn.Module, inputs: object, output: Tensor, seen: list[int] = seen) -> None:
            output.register_hook(lambda _: seen.append(whole(network.get_submodule("blocks.1"))))

        with adapters.use("student"):
            watched = network.get_submodule("blocks.0").register_forward_hook(watch)
            loss = learner.model.velocity(question).square().mean()
            watched.remove()
            for other in others:
                with torch.no_grad(), adapters.use(other):
                    learner.model.velocity(question)
            learner.engine.backward(loss, last=True, optimizers=("student",))
        learner.engine.step(learner.optimizers["student"], 0.0)
        (found[name],) = seen
    # What a network says of keys and values of its text has no input with a gradient, and stays until the end.
    layers = (network.get_submodule(f"blocks.1.attn2.{name}") for name in ("to_k", "to_v"))
    found["of text"] = sum(p.ds_shape.numel() for layer in layers for p in vars(layer)["_parameters"].values())
    return found


def through_zero(model: Path, began: Mapping[str, Any]) -> dict[str, Any]:
    """Of each kind: what becomes of a state of one process, and of a state of its own when it is read back."""
    found = {}
    for name, engine in {"zero2": TWO, "zero3": THREE}.items():
        learner, config = learner_of(model, engine, {})
        restored(learner, began, 1)
        middle = taken(learner, config, 3)
        straight = taken(learner, config, STEPS)
        found[name] = {"middle": middle, "straight": straight, "read": gone_on(model, engine, middle, range(3, STEPS))}
    return found


class Halves(Given):
    """Flow matching in one phase that moves two optimizers, one of A and one of B."""

    def optimizers(self, model: Model, state: State, build: BuildOptimizer) -> dict[str, Optimizer]:
        own = model.adapters.parameters(ROLE)
        return {half: build(half, {key: p for key, p in own.items() if f"lora_{half}" in key}) for half in ("A", "B")}

    def phases(self, step: int, experts: Sequence[Expert]) -> tuple[Phase, ...]:
        return (Phase("train", ROLE, ("A", "B")),)


def both_moved(model: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
    """What two steps of that come to."""
    learner, config = learner_of(model, engine, {}, Halves())
    return taken(learner, config, 2)


def all_shown(model: Path, began: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in the same two processes."""
    zero_weights.KEPT = 0  # else none of a network so small is ever taken apart again
    return {
        "cases": all_taken(model, CASES), "left": left_behind(model), "through": through_zero(model, began),
        "both": both_moved(model, THREE),
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    return all_taken(model, ALONE)


@pytest.fixture(scope="module")
def shown(model: Path) -> list[dict[str, Any]]:
    learner, config = learner_of(model, TORCH, {})
    return spawn(2, all_shown, model, taken(learner, config, 1), timeout=280)  # one step: the middle of a cycle


@pytest.fixture(scope="module")
def together(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [said["cases"] for said in shown]


@pytest.mark.parametrize("name", CASES)
def test_student_and_critic_learn_on_two_processes_what_they_learn_on_one(alone, together, name):
    expected, found = alone[name.partition(" ")[2]], together[0][name]
    for told, wanted in zip(found["told"], expected["told"], strict=True):
        assert told == pytest.approx(wanted, rel=BOUND)
    for role in ("student", "critic"):
        assert distance(found["adapters"][role], expected["adapters"][role]) < BOUND


def test_norms_are_of_the_role_that_moves_and_long_enough_to_be_cut(alone):
    for step, told in enumerate(alone[""]["told"], start=1):
        norms = {key: value for key, value in told.items() if key.endswith("grad_norm")}
        assert set(norms) == ({"critic/grad_norm", "student/grad_norm"} if step % EVERY == 0 else {"critic/grad_norm"})
        assert all(norm > LIMITS[key.partition("/")[0]] for key, norm in norms.items())


@pytest.mark.parametrize("name", CASES)
def test_each_optimizer_moves_in_its_own_steps_alone(together, name):
    """A student that is not moved keeps its moments: the critic's steps are none of its own."""
    for said in together:
        for role, steps in (("student", STEPS // EVERY), ("critic", STEPS)):
            entries = said[name]["optimizers"][role]["state"]
            assert entries and all(float(entry["step"]) == steps for entry in entries.values())


@pytest.mark.parametrize("name", CASES)
def test_every_process_ends_with_the_same_bits_of_both_roles(together, name):
    first, other = (said[name]["adapters"] for said in together)
    assert all(torch.equal(other[role][key], t) for role, tensors in first.items() for key, t in tensors.items())


def test_under_zero_3_no_weight_of_the_base_stays_whole_after_a_step(together):
    assert [said[name]["whole"] for said in together for name in CASES if name.startswith("zero3")] == [0] * 6


def test_a_students_backward_pass_gives_weights_back_as_it_goes_whoever_was_asked_meanwhile(shown):
    for left in (said["left"] for said in shown):
        assert left["critic and teacher"] == left["nobody"] == left["of text"]


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_state_from_the_middle_of_a_cycle_goes_on_bit_for_bit(shown, kind):
    for said in shown:
        straight, read = said["through"][kind]["straight"], said["through"][kind]["read"]
        assert read["told"] == straight["told"]
        for role, tensors in straight["adapters"].items():
            assert all(torch.equal(read["adapters"][role][key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_what_one_process_began_goes_on_under_zero_and_comes_back(model, alone, shown, kind):
    """One step of one process, two of two under ZeRO, one of one again, against four of one."""
    back = gone_on(model, TORCH, shown[0]["through"][kind]["middle"], range(3, STEPS))
    for role in ("student", "critic"):
        assert distance(back["adapters"][role], alone[""]["adapters"][role]) < BOUND


def test_a_phase_moves_both_of_its_optimizers_by_one_backward_pass(model, shown):
    expected = both_moved(model, TORCH)
    for found in (said["both"] for said in shown):
        for told, wanted in zip(found["told"], expected["told"], strict=True):
            assert told == pytest.approx(wanted, rel=BOUND)
        assert distance(found["adapters"][ROLE], expected["adapters"][ROLE]) < BOUND
