"""The order of items: each as often as it repeats, the same after a restart, shared out between ranks."""

from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from weft.data.sampler import BucketSampler, chance

BUCKETS = ((0, 1, 2, 2, 3), (4, 5), (6,))

groups = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=4)


@given(buckets=groups, batch_size=st.integers(1, 5), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_shows_every_item_as_often_as_it_repeats(buckets, batch_size, seed, epoch):
    sampler = BucketSampler(buckets, batch_size, seed)
    shown = Counter(chain.from_iterable(sampler.epoch(epoch)))
    assert shown == Counter(chain.from_iterable(buckets))


def test_a_batch_is_of_one_bucket_and_the_last_partial_batch_is_kept():
    batches = BucketSampler(BUCKETS, batch_size=2, seed=0).epoch(0)
    assert len(batches) == 3 + 1 + 1 == BucketSampler(BUCKETS, 2, 0).batches_per_epoch
    assert all(any(set(batch) <= set(bucket) for bucket in BUCKETS) for batch in batches)


def test_epochs_differ_and_seeds_differ():
    big = (tuple(range(50)),)
    orders = {tuple(BucketSampler(big, 1, seed).epoch(e)) for seed in range(3) for e in range(3)}
    assert len(orders) == 9


def test_the_batches_of_the_buckets_are_mixed():
    two = (tuple(range(20)), tuple(range(20, 40)))
    first_half = [batch[0] < 20 for batch in BucketSampler(two, 1, 0).epoch(0)[:20]]
    assert 5 <= sum(first_half) <= 15


def test_a_restart_at_any_draw_gives_the_same_sequence():
    whole = BucketSampler(BUCKETS, 2, seed=7)
    sequence = [whole.batch_indices(draw) for draw in range(23)]
    for start in (0, 4, 5, 11):
        fresh = BucketSampler(BUCKETS, 2, seed=7)
        assert [fresh.batch_indices(draw) for draw in range(start, 23)] == sequence[start:]


def test_ranks_share_out_each_epoch_without_overlap():
    sampler = BucketSampler(BUCKETS, 1, seed=3)
    per_epoch, world = sampler.batches_per_epoch, 4
    draws = [draw for rank in range(world) for draw in range(rank, per_epoch, world)]
    shown = Counter(chain.from_iterable(sampler.batch_indices(draw) for draw in draws))
    assert shown == Counter(chain.from_iterable(BUCKETS))


def test_chance_is_even_between_zero_and_one():
    drawn = [chance(1, "caption", i) for i in range(4000)]
    assert min(drawn) >= 0 and max(drawn) < 1
    assert abs(sum(d < 0.1 for d in drawn) / 4000 - 0.1) < 0.015  # three standard deviations
