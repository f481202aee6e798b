"""Which stretches of a clip are used, by the definitions of the table in musubi's dataset guide, and by counting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.clips import WAN
from weft.data.buckets import Buckets
from weft.data.windows import Chunk, Full, Head, Random, Slide, Uniform, covered

BUCKETS = Buckets(sides=(64,), frames=(49, 17))


def test_head_is_the_first_frames():
    assert Head().starts(100, 17, "a") == [0]


def test_chunks_follow_each_other_while_they_fit():
    assert Chunk().starts(100, 33, "a") == [0, 33, 66]
    assert Chunk().starts(98, 33, "a") == [0, 33]


def test_sliding_windows_begin_every_step_while_they_fit():
    assert Slide(step=10).starts(50, 25, "a") == [0, 10, 20]
    assert Slide(step=25).starts(50, 25, "a") == [0, 25]


def test_uniform_windows_reach_from_the_beginning_to_the_end():
    assert Uniform(count=4).starts(100, 40, "a") == [0, 20, 40, 60]
    assert Uniform(count=3).starts(50, 25, "a") == [0, 12, 25]  # 12.5 is floored
    assert Uniform(count=1).starts(100, 40, "a") == [0]


def test_windows_that_would_begin_alike_are_one():
    assert Uniform(count=5).starts(27, 25, "a") == [0, 1, 2]
    assert Uniform(count=5).starts(25, 25, "a") == [0]


def test_random_windows_depend_on_the_seed_and_the_clip_alone():
    one = Random(count=3, seed=1)
    assert one.starts(1000, 17, "a") == one.starts(1000, 17, "a")
    assert one.starts(1000, 17, "a") != one.starts(1000, 17, "b")
    assert one.starts(1000, 17, "a") != Random(count=3, seed=2).starts(1000, 17, "a")


def test_random_windows_begin_anywhere_alike():
    drawn = [start for i in range(500) for start in Random().starts(20, 17, str(i))]
    assert set(drawn) == {0, 1, 2, 3}
    assert all(abs(drawn.count(start) - 125) < 30 for start in range(4))  # three standard deviations


@pytest.mark.parametrize(("frames", "longest"), [(30, 29), (48, 45), (49, 49), (200, 49), (3, 1)])
def test_full_takes_whole_latent_frames_up_to_the_longest_bucket(frames, longest):
    assert max(Full().shapes(BUCKETS, frames, WAN).frames) == longest
    assert Full().starts(frames, longest, "a") == [0]


def test_frames_in_two_windows_count_once():
    assert covered([0, 10, 20], 25) == 45
    assert covered([0, 30], 25) == 50
    assert covered([0], 25) == 25


KINDS = [Head(), Chunk(), Slide(step=7), Uniform(count=4), Random(count=5)]


@given(kind=st.sampled_from(KINDS), length=st.integers(1, 60), more=st.integers(0, 300), name=st.text(max_size=5))
def test_every_window_lies_inside_its_clip_and_there_is_one(kind, length, more, name):
    starts = kind.starts(length + more, length, name)
    assert starts and starts == sorted(set(starts))
    assert all(0 <= start <= more for start in starts)
    assert covered(starts, length) == len({frame for start in starts for frame in range(start, start + length)})
