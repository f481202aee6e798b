"""Threads that make items ahead: bounded, in order, ended when nobody listens, and never silent about a failure."""

import threading
import time
from collections.abc import Iterator

import pytest

from weft.contracts import Batch
from weft.data.ahead import ahead, ahead_in_each
from weft.errors import DataError


def counted(made: list[int], last: int = 10_000) -> Iterator[Batch]:
    for i in range(last):
        made.append(i)
        yield Batch({}, (str(i),))


def loader_threads() -> int:
    return sum(thread.name == "weft-loader" for thread in threading.enumerate())


def test_a_few_batches_are_made_ahead_and_no_more():
    made: list[int] = []
    batches = ahead(counted(made), 3)
    assert next(batches).keys == ("0",)
    time.sleep(0.3)
    assert 4 <= len(made) <= 5  # taken: one; waiting: three; one more in the hand of the thread
    batches.close()


def test_a_stream_that_is_left_early_ends_its_thread():
    before = loader_threads()
    batches = ahead(counted([]), 2)
    next(batches)
    batches.close()
    assert loader_threads() == before


def test_what_fails_in_the_thread_is_raised_after_the_batches_before_it():
    def failing() -> Iterator[Batch]:
        yield Batch({}, ("0",))
        raise DataError("clip 1 is gone")

    batches = ahead(failing(), 2)
    assert next(batches).keys == ("0",)
    with pytest.raises(DataError, match="clip 1 is gone"):
        next(batches)


def test_a_stream_that_ends_ends():
    assert len(list(ahead(counted([], last=5), 2))) == 5


# ---- Several streams ----------------------------------------------------------------------------------------------


def slow(name: str, seconds: float, opened: list[str]) -> Iterator[str]:
    opened.append(name)
    for i in range(3):
        time.sleep(seconds)
        yield f"{name}{i}"


def test_items_of_several_streams_come_in_one_order_whichever_is_faster():
    opened: list[str] = []
    streams = (slow(name, seconds, opened) for name, seconds in (("a", 0.03), ("b", 0.0), ("c", 0.01)))
    assert list(ahead_in_each(streams, 2, 2)) == [f"{name}{i}" for name in "abc" for i in range(3)]


def test_no_more_streams_are_open_than_there_are_workers():
    opened: list[str] = []
    items = ahead_in_each((slow(name, 0.0, opened) for name in "abcdef"), 2, 1)
    next(items)
    time.sleep(0.1)
    assert sorted(opened) == ["a", "b"]
    items.close()


def test_streams_are_read_at_once():
    all_there = threading.Barrier(4)

    def meeting(name: str) -> Iterator[str]:
        all_there.wait(timeout=60)  # one after the other they would never meet
        yield name

    assert list(ahead_in_each((meeting(name) for name in "abcd"), 4, 1)) == list("abcd")


def test_a_consumer_that_fails_leaves_no_thread_behind():
    before = loader_threads()
    with pytest.raises(KeyboardInterrupt):
        for _ in (items := ahead_in_each((slow(name, 0.0, []) for name in "abc"), 3, 1)):
            items.throw(KeyboardInterrupt)
    assert loader_threads() == before
