"""Moving averages: against their closed form, in one memory or in many, and through steps that were skipped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from weft.adapters.lora import Lora
from weft.adapters.low_rank import shrink
from weft.math.end_to_end import EndToEnd
from weft.run.moving_average import MovingAverage

SHAPES = {"a": (30, 5), "b": (70,), "c": (8, 8)}
MOVED, SKIPPED = torch.tensor(True), torch.tensor(False)


def parameters_of(flat: bool) -> dict[str, nn.Parameter]:
    found = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    if flat:
        where = EndToEnd([list(found.values())])
        for p, view in zip(found.values(), where.views(torch.zeros(where.length)), strict=True):
            p.data = view
    return found


def set_to(parameters: dict[str, nn.Parameter], value: float) -> None:
    for number, p in enumerate(parameters.values()):
        p.data.fill_(value + number)


def followed(average: MovingAverage, parameters: Any, values: list[float], moved: list[bool], start: int = 1) -> None:
    for step, (value, did) in enumerate(zip(values, moved, strict=True), start=start):
        if did:
            set_to(parameters, value)
        average.update(step, parameters, MOVED if did else SKIPPED)


@pytest.mark.parametrize("flat", [True, False])
def test_an_average_is_the_geometric_sum_of_the_weights_that_moved(flat):
    parameters, average = parameters_of(flat), MovingAverage(decay=0.9, start=0)
    followed(average, parameters, [1.0, 3.0, 7.0, -2.0, 5.0], [True, True, False, True, True])
    expected = 0.9**3 * 1 + 0.1 * (0.9**2 * 3 + 0.9 * -2 + 5)
    for number, (name, p) in enumerate(parameters.items()):
        assert_close(average.tensors[name], torch.full_like(p, expected + number).detach())


@pytest.mark.parametrize("flat", [True, False])
def test_it_begins_at_the_first_step_that_moves_and_until_then_there_is_none(flat):
    parameters, average = parameters_of(flat), MovingAverage(decay=0.5, start=0)
    followed(average, parameters, [9.0, 9.0], [False, False])
    assert average.tensors == {}
    followed(average, parameters, [4.0, 8.0], [True, True], start=3)
    assert all(torch.equal(average.tensors[n], p.detach() - 2) for n, p in parameters.items())


@pytest.mark.parametrize("flat", [True, False])
def test_up_to_its_start_it_equals_the_weights_and_never_shares_their_memory(flat):
    parameters, average = parameters_of(flat), MovingAverage(decay=0.5, start=2)
    for step, expected in ((1, 1.0), (2, 2.0), (3, 2.5)):
        set_to(parameters, float(step))
        average.update(step, parameters)
        assert float(average.tensors["a"].max()) == float(average.tensors["a"].min()) == expected
    set_to(parameters, 100.0)
    assert float(average.tensors["a"].max()) == 2.5


@pytest.mark.parametrize("flat", [True, False])
def test_it_goes_on_to_the_bit_from_what_was_saved_also_when_weights_have_moved_to_another_memory(flat):
    parameters, average = parameters_of(flat), MovingAverage(decay=0.99, start=0)
    followed(average, parameters, [0.1, 0.7], [True, True])
    again, others = MovingAverage(decay=0.99, start=0), parameters_of(flat)
    again.tensors = {name: t.clone() for name, t in average.tensors.items()}
    for one, of in ((average, parameters), (again, others)):
        set_to(of, 0.3)
        one.update(3, of, MOVED)
    whole = parameters_of(True)
    set_to(whole, 0.9)
    set_to(parameters, 0.9)
    average.update(4, parameters, MOVED)
    again.update(4, whole, MOVED)  # as an optimizer lays them at its first step
    assert all(torch.equal(t, again.tensors[name]) for name, t in average.tensors.items())


def test_one_memory_is_averaged_as_one():
    parameters, average = parameters_of(True), MovingAverage(decay=0.9, start=0)
    average.update(1, parameters, MOVED)
    assert len({t.untyped_storage().data_ptr() for t in average.tensors.values()}) == 1


@pytest.mark.parametrize("flat", [True, False])
def test_following_and_shrinking_on_a_gpu_read_no_number(flat):
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        ends = {"l.lora_A.weight": (4, 8), "l.lora_B.weight": (8, 4)}
        own = {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in ends.items()}
        if flat:
            where = EndToEnd([list(own.values())])
            for p, view in zip(own.values(), where.views(torch.zeros(where.length, device=device)), strict=True):
                p.data = view
        average, moved = MovingAverage(decay=0.9, start=1), torch.ones((), device=device) > 0
        for step in range(3):
            with torch.no_grad():
                told = shrink(Lora(targets=("all",), rank=4, max_norm=1.0), ["l"], own, moved)
            average.update(step, own, moved)
        assert all(isinstance(value, Tensor) and value.device == device for value in told.values())


def test_a_step_that_was_skipped_is_not_shrunk_either():
    limit = Lora(targets=("all",), rank=4, max_norm=1.0)
    own = {"l.lora_A.weight": nn.Parameter(torch.eye(4)), "l.lora_B.weight": nn.Parameter(torch.eye(4))}
    with torch.no_grad():
        shrink(limit, ["l"], own, SKIPPED)
        assert torch.equal(own["l.lora_A.weight"], torch.eye(4))
        shrink(limit, ["l"], own, MOVED)
    assert not torch.equal(own["l.lora_A.weight"], torch.eye(4))
