"""How many processes make which layout, and what is said of those that cannot."""

import pytest

from weft.engines.parallel import Layout, Parallel
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "world", "layout"),
    [
        ({}, 1, Layout(1, 1, 1)),
        ({}, 8, Layout(8, 1, 1)),
        ({"shard": 4}, 8, Layout(2, 4, 1)),
        ({"shard": "auto"}, 8, Layout(1, 8, 1)),
        ({"data": 2, "shard": "auto"}, 8, Layout(2, 4, 1)),
        ({"sequence": 2}, 8, Layout(4, 1, 2)),
        ({"data": 8, "shard": 4, "sequence": 2}, 64, Layout(8, 4, 2)),
    ],
)
def test_what_is_left_open_follows_from_the_number_of_processes(asked, world, layout):
    assert Parallel(**asked).resolved(world) == layout


@pytest.mark.parametrize(
    ("asked", "world", "said"),
    [
        ({"shard": 4}, 6, r"takes a multiple of 4 processes, but 6 were started.*: data=2 shard=3 sequence=1; "),
        ({"data": 2, "shard": 2}, 1, r"takes 4 processes, but 1 was started.*can do: data=1 shard=1 sequence=1\.$"),
        ({"data": 3, "shard": 2}, 4, r"takes 6 processes, but 4 were started.*: data=2 shard=2 sequence=1; "),
        ({"sequence": 3}, 2, r"multiple of 3 processes.* data=1 shard=1 sequence=2"),
    ],
)
def test_an_impossible_product_is_refused_with_the_nearest_possible_ones(asked, world, said):
    with pytest.raises(ConfigError, match=said):
        Parallel(**asked).resolved(world)


def test_a_plan_counts_the_fewest_processes_that_are_meant():
    assert Parallel(shard=4, sequence=2).least() == Layout(1, 4, 2)
    assert Parallel(data=2, shard="auto").least().world == 2


def test_every_layout_of_twelve_processes_is_known_once():
    """12 = 2^2 x 3: the two 2s go to 3 places in C(4, 2) = 6 ways, the 3 in 3 ways."""
    layouts = Parallel().possible(12)
    assert len(set(layouts)) == len(layouts) == 18
    assert {layout.world for layout in layouts} == {12}


def test_ranks_of_one_sequence_group_stand_together_and_read_the_same_data():
    layout = Layout(data=2, shard=2, sequence=2)
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert layout.data_world == 4


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("offload_inputs", {"recompute": True, "offload_inputs": True}),
        ("stream_blocks", {"recompute": True, "stream_blocks": 3}),
        ("experts", {"experts": "one"}),
    ],
)
def test_what_keeps_weights_off_a_device_is_refused_where_they_are_sharded(name, engine):
    section = Torch(device="cpu", **engine)
    section.check(Layout(data=4))
    with pytest.raises(ConfigError, match=rf"engine\.{name}: not with parallel\.shard=2"):
        section.check(Layout(shard=2))


def test_fast_weights_are_offered_where_weights_are_whole_and_nothing_is_recomputed():
    assert "functional" in Torch().can(Layout(data=2))
    assert "functional" not in Torch().can(Layout(shard=2))
    assert "functional" not in Torch(recompute=True).can(Layout())
