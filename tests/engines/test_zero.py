"""DeepSpeed's ZeRO-2 and ZeRO-3 learn what one process learns, and their state goes on anywhere: a small real Wan."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tests.engines.equality import MAX_NORM, Case, Learned, all_learned, distance, learner_of, taught
from tests.learners import ROLE, batch_of, parts
from tests.multi import spawn

pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
pytestmark = pytest.mark.slow

# Sums over processes are taken in another order than one process takes them, and ZeRO sums each micro-batch at once:
# about 1e-7 of a gradient, of which five steps of AdamW leave less than twenty times that.
BOUND = 2e-6
RECOMPUTED = {"recompute": True}
WHAT = {
    "native": Case(),
    "peft": Case(engine=RECOMPUTED, adapter={"backend": "peft"}),
    "dora": Case(adapter={"dora": True}),
    "bf16": Case(engine={"precision": "bf16"}),
    "fp16": Case(engine={"precision": "fp16"}),
    "int8": Case(family={"dtype": "int8"}, engine=RECOMPUTED),
}
ZERO: dict[str, dict[str, Any]] = {
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "zero2-offload": {"zero": 2, "offload_optimizer": True},
    "zero3-offload": {"zero": 3, "offload_optimizer": True, "offload_parameters": True},
}
SHOWN = {
    2: ["zero2 native", "zero2 peft", "zero2 fp16", "zero2-offload native", "zero3 bf16", "zero3 peft", "zero3 dora",
        "zero3 int8", "zero3-offload native"],
    4: ["zero2 native", "zero3 native"],
}  # fmt: skip
OF_ZERO_3 = {name.partition(" ")[2] for names in SHOWN.values() for name in names if name.startswith("zero3")}
PLACES = [(world, name) for world, names in SHOWN.items() for name in names]


def case_of(name: str) -> Case:
    zero, _, what = name.partition(" ")
    case = WHAT[what]
    return replace(case, engine={**case.engine, "kind": "deepspeed", **ZERO[zero]})


class Passed(torch.autograd.Function):
    """What goes in comes out, and so does its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def passed(given: Any) -> Any:
    """The same tensors behind such functions."""
    if isinstance(given, tuple):
        return tuple(map(passed, given))
    return Passed.apply(given) if isinstance(given, Tensor) else given


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Learned]:
    """By what is learned. ZeRO-3 puts a function before and after each module, to know of its backward pass, so that
    gradients of a tensor that several modules read are added in another order: that is 4e-3 of a sum in bf16."""
    found = all_learned(model, WHAT)
    before = register_module_forward_pre_hook(lambda module, inputs: passed(inputs))
    after = register_module_forward_hook(lambda module, inputs, output: passed(output))
    # Under its hooks the modules themselves are called, which round in other places than fused and lean ones.
    called = {name: replace(case, family={**case.family, "lean": False}, adapter={**case.adapter, "fused": False})
              for name, case in WHAT.items() if name in OF_ZERO_3}  # fmt: skip
    found |= {f"zero3 {name}": learned for name, learned in all_learned(model, called).items()}
    before.remove()
    after.remove()
    return found


@pytest.fixture(scope="module")
def together(model: Path) -> dict[tuple[int, str], list[Learned]]:
    """By the number of processes and the name: what each rank says that it learned."""
    found: dict[tuple[int, str], list[Learned]] = {}
    for world, names in SHOWN.items():
        for said in spawn(world, all_learned, model, {name: case_of(name) for name in names}, timeout=280):
            for name, learned in said.items():
                found.setdefault((world, name), []).append(learned)
    return found


@pytest.mark.parametrize(("world", "name"), PLACES)
def test_processes_under_zero_learn_what_one_learns(alone, together, world, name):
    zero, _, what = name.partition(" ")
    expected, (first, *_) = alone[f"zero3 {what}" if zero.startswith("zero3") else what], together[world, name]
    assert first.losses == pytest.approx(expected.losses, rel=BOUND)
    assert first.norms == pytest.approx(expected.norms, rel=BOUND)
    assert distance(first.adapter, expected.adapter) < BOUND
    torch.testing.assert_close(first.answer, expected.answer, rtol=5 * BOUND, atol=0)


@pytest.mark.parametrize(("world", "name"), PLACES)
def test_every_process_under_zero_ends_with_the_same_bits(together, world, name):
    first, *others = together[world, name]
    assert len(others) == world - 1
    for other in others:
        assert (other.losses, other.norms) == (first.losses, first.norms)
        assert all(torch.equal(other.adapter[key], tensor) for key, tensor in first.adapter.items())


def at_step(model: Path, engine: Mapping[str, Any], steps: range, state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Go on from a state, take so many steps, and tell the state then: the whole adapter and the optimizer's own."""
    learner = learner_of(model, Case(engine=engine))
    ((_, optimizer),) = learner.optimizers.items()
    if state is not None:
        learner.model.adapters.load_state_dict(ROLE, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    for step in steps:
        taught(learner, parts(batch_of(4, seed=step), 1, 1, 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        learner.engine.step(optimizer, MAX_NORM)
    adapter = {key: tensor.clone() for key, tensor in learner.model.adapters.state_dict(ROLE).items()}
    return {"adapter": adapter, "optimizer": optimizer.state_dict(), "spoilt": spoilt(learner, optimizer)}


def spoilt(learner: Any, optimizer: Any) -> dict[str, Any]:
    """What a step with a gradient that is not finite says, and how far it moved the adapter and the moments."""
    adapters, before = learner.model.adapters, optimizer.state_dict()["state"]
    weights = {key: tensor.clone() for key, tensor in adapters.state_dict(ROLE).items()}
    batch = batch_of(1)
    batch["latents"][:] = float("inf") if learner.engine.rank == 0 else 0.0
    taught(learner, [batch] * learner.engine.data_world)
    stepped = learner.engine.step(optimizer, MAX_NORM)
    moved = [key for key, tensor in adapters.state_dict(ROLE).items() if not torch.equal(tensor, weights[key])]
    after = optimizer.state_dict()["state"]
    return {"stepped": stepped, "moved": moved, "same": same(before, after)}


def same(one: Mapping[Any, Mapping[str, Tensor]], other: Mapping[Any, Mapping[str, Tensor]]) -> bool:
    """Whether two states have the same bits."""
    assert one.keys() == other.keys() and one
    return all(torch.equal(value, other[i][key]) for i, entry in one.items() for key, value in entry.items())


def reloaded(model: Path, engine: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether a state comes out as it went in."""
    learner = learner_of(model, Case(engine=engine))
    ((_, optimizer),) = learner.optimizers.items()
    optimizer.load_state_dict(state["optimizer"])
    learner.model.adapters.load_state_dict(ROLE, state["adapter"])
    adapter, found = learner.model.adapters.state_dict(ROLE), optimizer.state_dict()
    kept = all(torch.equal(adapter[key], tensor) for key, tensor in state["adapter"].items())
    return kept and same(found["state"], state["optimizer"]["state"])


def through_zero(model: Path, began: Mapping[str, Any]) -> dict[str, Any]:
    """Two more steps of what one process began, under ZeRO-2 and ZeRO-3, each read back by itself and by the other."""
    zero2, zero3 = ({"kind": "deepspeed", **ZERO[name]} for name in ("zero2", "zero3"))
    two = at_step(model, zero2, range(2, 4), began)
    three = at_step(model, zero3, range(2, 4), began)
    read = [reloaded(model, zero2, three), reloaded(model, zero3, two), reloaded(model, zero3, began)]
    return {"zero2": two, "zero3": three, "read": read, "shares": shares_of(model)}


def shares_of(model: Path) -> dict[str, float]:
    """Of a network under ZeRO-3: numbers that this process keeps, numbers that there are, and those still whole."""
    learner = learner_of(model, Case(engine={"kind": "deepspeed", **ZERO["zero3"]}))
    frozen: list[Any] = [p for p in learner.model.network.parameters() if not p.requires_grad]
    return {
        "kept": sum(p.ds_tensor.numel() for p in frozen), "all": sum(p.ds_numel for p in frozen),
        "whole": sum(p.numel() for p in frozen), "parameters": len(frozen),
    }  # fmt: skip


TORCH = {"kind": "torch"}


@pytest.fixture(scope="module")
def began(model: Path) -> dict[str, Any]:
    return at_step(model, TORCH, range(2), None)


@pytest.fixture(scope="module")
def went_on(model: Path, began: dict[str, Any]) -> list[dict[str, Any]]:
    return spawn(2, through_zero, model, began, timeout=280)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_what_one_process_began_goes_on_under_zero_and_comes_back(model, began, went_on, zero):
    """Two steps of one process, two of two under ZeRO, two of one again, against six of one."""
    back = at_step(model, TORCH, range(4, 6), went_on[0][zero])
    straight = at_step(model, TORCH, range(6), None)
    assert distance(back["adapter"], straight["adapter"]) < BOUND
    for i, entry in straight["optimizer"]["state"].items():
        assert torch.equal(back["optimizer"]["state"][i]["step"], entry["step"])
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(back["optimizer"]["state"][i][moment], entry[moment], rtol=1e-4, atol=1e-9)


def test_a_state_comes_out_of_zero_as_it_went_in_bit_for_bit(went_on):
    assert all(said["read"] == [True, True, True] for said in went_on)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_on_one_process_moves_nothing_on_any(went_on, zero):
    for said in went_on:
        spoilt = said[zero]["spoilt"]
        assert not spoilt["stepped"].moved and not spoilt["stepped"].scaled
        assert spoilt["moved"] == [] and spoilt["same"]


def test_under_zero_3_each_process_keeps_its_part_of_every_frozen_weight_alone(went_on):
    for said in went_on:
        shares = said["shares"]
        assert shares["whole"] == 0
        assert shares["all"] / 2 <= shares["kept"] <= shares["all"] / 2 + shares["parameters"]
