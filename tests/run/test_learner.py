"""Chance that belongs to its place in the run, and moving averages against their closed form."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from weft.contracts import Rng
from weft.engines.single_device import SingleEngine
from weft.run.learner import Learner, MovingAverage


class RankOf(SingleEngine):
    """An engine that says it is one of several."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(torch.device("cpu"), "fp32")
        self.rank, self.world = rank, world  # type: ignore[misc]


def at(step: int = 3, drawn: int = 5, rank: int = 0, world: int = 1, seed: int = 7, phase: str = "train") -> Rng:
    learner = Learner(None, None, None, RankOf(rank, world), {}, seed, None, step=step, drawn=drawn)  # type: ignore[arg-type]
    return learner.rng(phase, drawn - 1)


def own(rng: Rng) -> float:
    return torch.rand((), generator=rng.own).item()


def test_the_same_place_draws_the_same_whatever_was_drawn_before():
    first, dropout = own(at()), torch.rand(3)
    torch.manual_seed(99)
    assert own(at()) == first
    assert torch.equal(torch.rand(3), dropout)  # dropout draws from the global generator


OTHERS = [{"step": 4}, {"drawn": 6}, {"rank": 1, "world": 2}, {"seed": 8}, {"phase": "critic"}]


@pytest.mark.parametrize("other", OTHERS)
def test_every_other_place_draws_something_else(other):
    first, dropout = own(at()), torch.rand(3)
    assert own(at(**other)) != first
    assert not torch.equal(torch.rand(3), dropout)


def test_ranks_share_one_generator_and_have_one_of_their_own():
    ranks = [at(rank=rank, world=2) for rank in range(2)]
    assert len({torch.rand((), generator=rng.shared).item() for rng in ranks}) == 1
    assert len({own(rng) for rng in ranks}) == 2


def test_the_numbers_of_draws_of_all_ranks_have_no_gap_and_no_double():
    draws = [at(drawn=drawn, rank=rank, world=3).draw for drawn in (1, 2, 3) for rank in range(3)]
    assert draws == list(range(9))


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
