"""Chance that belongs to its place in the run, and moving averages against their closed form."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from weft.contracts import DEFAULT, Rng
from weft.engines.single_device import SingleEngine
from weft.objectives.flow_matching import FlowMatching
from weft.run.learner import Learner
from weft.run.moving_average import MovingAverage
from weft.run.pace import Pace


class RankOf(SingleEngine):
    """An engine that says it is one of several; those of a sequence group have one place among the readers of data."""

    def __init__(self, rank: int, world: int, sequence: int = 1) -> None:
        super().__init__(torch.device("cpu"), "fp32")
        self.rank, self.world = rank, world  # type: ignore[misc]
        self.data_rank, self.data_world = rank // sequence, world // sequence  # type: ignore[misc]
        self.sequence = SimpleNamespace(rank=rank % sequence, size=sequence) if sequence > 1 else None  # type: ignore


def at(
    step: int = 3, micro_batch: int = 0, accumulate: int = 1, rank: int = 0, world: int = 1, sequence: int = 1,
    seed: int = 7, phase: str = "train",
) -> Rng:  # fmt: skip
    pace = Pace(FlowMatching(), (DEFAULT,), 10)
    pace.steps["critic"] = pace.steps["train"]
    learner = Learner(None, None, None, RankOf(rank, world, sequence), {}, seed, pace, step=step)  # type: ignore[arg-type]
    return learner.rng(phase, micro_batch, accumulate)


def own(rng: Rng) -> float:
    return torch.rand((), generator=rng.own).item()


def test_the_same_place_draws_the_same_whatever_was_drawn_before():
    first, dropout = own(at()), torch.rand(3)
    torch.manual_seed(99)
    assert own(at()) == first
    assert torch.equal(torch.rand(3), dropout)  # dropout draws from the global generator


OTHERS = [{"step": 4}, {"micro_batch": 1}, {"rank": 1, "world": 2}, {"seed": 8}, {"phase": "critic"}]


@pytest.mark.parametrize("other", OTHERS)
def test_every_other_place_draws_something_else(other):
    first, dropout = own(at()), torch.rand(3)
    assert own(at(**other)) != first
    assert not torch.equal(torch.rand(3), dropout)


def test_ranks_share_one_generator_and_have_one_of_their_own():
    ranks = [at(rank=rank, world=2) for rank in range(2)]
    assert len({torch.rand((), generator=rng.shared).item() for rng in ranks}) == 1
    assert len({own(rng) for rng in ranks}) == 2


@pytest.mark.parametrize(("world", "accumulate"), [(2, 6), (3, 4), (4, 3), (12, 1)])
def test_a_draw_has_the_same_chance_on_any_number_of_processes(world, accumulate):
    def chances(world: int, accumulate: int) -> dict[int, tuple[float, list[float]]]:
        found = {}
        for micro_batch in range(accumulate):
            for rank in range(world):
                rng = at(micro_batch=micro_batch, accumulate=accumulate, rank=rank, world=world)
                found[rng.draw] = (own(rng), torch.rand(2).tolist())
        return found

    assert chances(world, accumulate) == chances(1, 12)
    assert sorted(chances(world, accumulate)) == list(range(36, 48))  # three steps of twelve came before


def test_ranks_of_a_sequence_group_share_noise_and_drop_other_tokens():
    one, dropped = at(rank=0, world=2, sequence=2), torch.rand(3)
    other, dropped_there = at(rank=1, world=2, sequence=2), torch.rand(3)
    assert (own(one), one.draw) == (own(other), other.draw)
    assert not torch.equal(dropped, dropped_there)


def test_an_average_after_n_steps_is_the_geometric_sum_of_the_weights():
    weight = nn.Parameter(torch.tensor([1.0]))
    average, values = MovingAverage(decay=0.9, start=0), [1.0, 3.0, -2.0, 5.0]
    for step, value in enumerate(values, start=1):
        weight.data.fill_(value)
        average.update(step, {"w": weight})
    expected = 0.9**3 * 1 + 0.1 * (0.9**2 * 3 + 0.9 * -2 + 5)  # the first weights are where it begins
    assert_close(average.tensors["w"], torch.tensor([expected]))


def test_up_to_its_start_the_average_equals_the_weights_and_never_shares_their_memory():
    weight = nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage(decay=0.5, start=2)
    for step, expected in ((1, 1.0), (2, 2.0), (3, 2.5)):
        weight.data.fill_(float(step))
        average.update(step, {"w": weight})
        assert average.tensors["w"].item() == expected
    weight.data.fill_(100.0)
    assert average.tensors["w"].item() == 2.5
