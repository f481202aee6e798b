"""Rows of texts: none is lost or doubled, rows are full, and what a draw holds depends on its number alone."""

from collections import Counter
from itertools import chain
from math import ceil

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.contracts import UNLEARNED
from weft.data.chat_loader import collated
from weft.data.packing import RowSampler, packed
from weft.data.sampler import chance
from weft.data.tokens import Text

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)


@given(LENGTHS)
def test_packing_loses_and_doubles_nothing_and_no_row_is_too_long(lengths):
    rows = packed(lengths, 64)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert ceil(sum(lengths) / 64) <= len(rows) <= 11 / 9 * fewest(lengths) + 1


def fewest(lengths: list[int]) -> int:
    """An upper bound of the fewest rows: first fit, in the given order and by decreasing length."""

    def first_fit(order: list[int]) -> int:
        room: list[int] = []
        for length in order:
            fits = next((i for i, left in enumerate(room) if left >= length), None)
            room = [*room, 64 - length] if fits is None else [*room[:fits], room[fits] - length, *room[fits + 1 :]]
        return len(room)

    return min(first_fit(lengths), first_fit(sorted(lengths, reverse=True)))


def test_each_text_goes_into_the_fullest_row_that_has_room():
    assert packed([5, 6, 4, 3, 2], 10) == [(1, 2), (0, 3, 4)]
    assert packed([7, 5, 3, 2], 10) == [(0, 2), (1, 3)]


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 3))
def test_an_epoch_shows_every_text_once(lengths, batch_size, pack, shuffle, epoch):
    sampler = RowSampler(lengths, 64 if pack else None, batch_size, seed=1, shuffle=shuffle)
    batches = [
        sampler.batch(draw)
        for draw in range(epoch * sampler.batches_per_epoch, (epoch + 1) * sampler.batches_per_epoch)
    ]
    assert Counter(i for batch in batches for row in batch for i in row) == Counter(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(sum(lengths[i] for i in row) <= 64 for batch in batches for row in batch)
    assert sum(map(len, batches)) == sampler.rows_per_epoch


def lengths_of_chats(count: int) -> list[int]:
    """Many short ones and a long tail, from 16 to 2048 tokens."""
    return [int(16 * 128 ** chance("length", i)) for i in range(count)]


def test_rows_of_some_hundred_conversations_are_more_than_95_percent_full():
    lengths = lengths_of_chats(300)
    rows = packed(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.95


def test_epochs_differ_and_a_restart_at_any_draw_repeats_them():
    lengths = [1 + i % 9 for i in range(90)]
    whole = RowSampler(lengths, 16, 2, seed=5)
    draws = [whole.batch(draw) for draw in range(3 * whole.batches_per_epoch)]
    for start in (0, 7, whole.batches_per_epoch, 2 * whole.batches_per_epoch + 3):
        fresh = RowSampler(lengths, 16, 2, seed=5)
        assert [fresh.batch(draw) for draw in range(start, len(draws))] == draws[start:]
    first, second = draws[: whole.batches_per_epoch], draws[whole.batches_per_epoch : 2 * whole.batches_per_epoch]
    assert first != second and {frozenset(row) for batch in first for row in batch} != {
        frozenset(row) for batch in second for row in batch
    }


def test_unpacked_batches_hold_texts_of_about_one_length():
    lengths = [1 + (37 * i) % 50 for i in range(50)]  # 1 to 50, mixed
    batches = RowSampler(lengths, None, 5, seed=0).epoch(0)
    spans = sorted((min(lengths[i] for (i,) in batch), max(lengths[i] for (i,) in batch)) for batch in batches)
    assert spans == [(5 * k + 1, 5 * k + 5) for k in range(10)]


def test_without_shuffling_rows_come_in_the_order_of_the_files():
    lengths = [3, 1, 2, 2]
    assert RowSampler(lengths, None, 2, 0, shuffle=False).epoch(4) == [((0,), (1,)), ((2,), (3,))]
    assert RowSampler(lengths, 4, 1, 0, shuffle=False).epoch(4) == [((0, 1),), ((2, 3),)]


def text(key: str, ids: list[int], learned: list[bool]) -> Text:
    return Text(key, key, torch.tensor(ids, dtype=torch.int32).numpy(), torch.tensor(learned).numpy())


def test_positions_begin_anew_in_each_text_and_in_the_padding_and_labels_are_what_comes_next():
    one, two = text("one", [5, 6, 7], [False, True, True]), text("two", [8, 9], [True, True])
    batch = collated([[one, two], [two]], capacity=7, padding=1)
    assert batch["ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1], [8, 9, 1, 1, 1, 1, 1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    x = UNLEARNED
    assert batch["labels"].tolist() == [[6, 7, x, 9, x, x, x], [9, x, x, x, x, x, x]]
    assert batch.keys == ("one", "two", "two")
    assert {tensor.dtype for tensor in batch.tensors.values()} == {torch.int64}
    assert collated([[one], [two]], None, 1)["ids"].shape == (2, 3)
