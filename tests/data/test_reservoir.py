"""What a replay memory holds: the published rule, uniform, the same from any place on, and shared evenly by strata."""

import time
from collections import Counter

import numpy
import pytest

from weft.data.reservoir import BalancedReservoir, Reservoir, fractions, permutation, sample


def algorithm_r(size: int, entered: int, drawn: numpy.ndarray, off_by_one: bool = False) -> list[int]:
    """Vitter's rule, one document after the other: randrange(age), and with the quirk randint(0, age)."""
    held: list[int] = []
    for number in range(entered):
        age = number + 1
        if len(held) < size:
            held.append(number)
            continue
        place = int(drawn[number] * (age + off_by_one))
        if place < size:
            held[place] = number
    return held


@pytest.mark.parametrize("off_by_one", [False, True])
def test_the_memory_is_vitters_place_by_place(off_by_one):
    memory, drawn = Reservoir(7, 100, 3, 1, off_by_one=off_by_one), fractions(100, 3, 1)
    for entered in range(101):
        assert memory.held(entered).tolist() == algorithm_r(7, entered, drawn, off_by_one)


@pytest.mark.parametrize("stride", [1, 3, 10, 37])
def test_whoever_begins_in_the_middle_finds_what_others_hold(stride):
    strata = (permutation(200, 5) % 3).tolist()
    for whole, late in (
        (Reservoir(16, 200, 9), Reservoir(16, 200, 9)),
        (BalancedReservoir(16, strata, 9), BalancedReservoir(16, strata, 9)),
    ):
        found = {entered: whole.held(entered).tolist() for entered in range(0, 201, stride)}
        for entered in sorted(found, key=lambda number: number % 7):  # forth and back
            assert late.held(entered).tolist() == found[entered]


def chi_square(counts: numpy.ndarray) -> float:
    """How far counts are from being equal, in standard deviations of chi-square with len - 1 degrees of freedom."""
    expected = counts.sum() / len(counts)
    free = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5)


def kept(make, entered: int, seeds: int) -> numpy.ndarray:
    """How often each document is in the memory, over seeds."""
    counts = numpy.zeros(entered)
    for seed in range(seeds):
        counts[make(seed).held(entered)] += 1
    return counts


def test_trap_13_every_document_is_held_as_often_as_any_other():
    counts = kept(lambda seed: Reservoir(10, 60, seed), 60, 1500)
    assert counts.sum() == 10 * 1500
    assert abs(chi_square(counts)) < 4  # it would be below zero were documents more even than chance: 50 of 60 are free


def test_the_published_rule_favours_the_old_ones_as_it_does():
    """The quirk keeps the document of age a with probability size / (a + 1), the last one so with 10 / 61."""
    counts = kept(lambda seed: Reservoir(10, 60, seed, off_by_one=True), 60, 3000)
    for place in (59, 40):
        chance = 10 / 61  # of any document beyond the first ten: size/(a+1) and then kept by every later one
        assert abs(counts[place] / 3000 - chance) < 4 * (chance * (1 - chance) / 3000) ** 0.5
    assert counts[:10].mean() > counts[10:].mean()


def test_trap_15_strata_share_a_memory_evenly_and_a_small_one_is_held_whole():
    strata = [1 if number % 30 == 0 else 0 for number in range(600)]  # 20 of the rare kind
    numbered = [0 if each == strata[0] else 1 for each in strata]
    assert Counter(numbered[i] for i in BalancedReservoir(100, numbered, 4).held(600)) == {0: 20, 1: 80}
    assert Counter(numbered[i] for i in BalancedReservoir(20, numbered, 4).held(600)) == {0: 10, 1: 10}
    assert sum(strata[i] for i in Reservoir(100, 600, 4).held(600)) < 10  # what a uniform memory keeps of them


def test_within_its_share_a_stratum_is_held_uniformly_also_after_it_gave_up_room():
    """Strata that come one after the other, as years do: the first has all the room, then half, then a third."""
    strata = [number // 40 for number in range(120)]
    counts = kept(lambda seed: BalancedReservoir(11, strata, seed), 120, 1500).reshape(3, 40)
    assert counts.sum(1).tolist() == [4 * 1500, 4 * 1500, 3 * 1500]
    assert all(abs(chi_square(own)) < 4 for own in counts)


def test_the_room_of_a_full_stratum_never_grows_again():
    strata = (permutation(400, 8) % 5).tolist()
    memory, before = BalancedReservoir(23, strata, 2), Counter[int]()
    for entered in range(401):
        held = memory.held(entered)
        now = Counter(strata[i] for i in held)
        shown = Counter(strata[:entered])
        assert len(held) == min(entered, 23)
        assert all(now[s] <= before[s] for s in before if before[s] < shown[s] - (strata[entered - 1] == s))
        before = now


def test_draws_are_without_replacement_and_uniform():
    held = numpy.arange(100, 130)
    counts = numpy.zeros(30)
    for draw in range(4000):
        found = sample(held, 6, 7, draw)
        assert len(set(found.tolist())) == 6
        counts[found - 100] += 1
    assert abs(chi_square(counts)) < 4
    assert sorted(sample(held, 50, 1).tolist()) == held.tolist()
    assert len(sample(numpy.zeros(0, numpy.int64), 5, 1)) == 0


def test_the_published_draws_may_take_one_document_twice():
    held = numpy.arange(4)
    found = [sample(held, 8, 3, draw, replacement=True) for draw in range(2000)]
    assert {len(each) for each in found} == {8}
    assert abs(chi_square(numpy.bincount(numpy.concatenate(found), minlength=4))) < 5


def test_chance_is_of_its_parts_alone():
    assert fractions(5, 1, 2).tolist() == fractions(9, 1, 2)[:5].tolist()
    assert fractions(5, 1, 2).tolist() != fractions(5, 2, 1).tolist()
    assert sorted(permutation(50, 3).tolist()) == list(range(50))


def test_a_hundred_thousand_documents_are_passed_over_in_less_than_two_seconds():
    count = 100_000
    began = time.thread_time()
    Reservoir(200, count, 1).held(count)
    BalancedReservoir(200, (permutation(count, 2) % 12).tolist(), 1).held(count)
    assert time.thread_time() - began < 2
