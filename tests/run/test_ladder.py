"""The rungs of the memory ladder: their order, their sum, and that their lines are configs."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.learners import small_config
from tests.run.large import large_wan
from tests.small import make_wan
from weft.config.source import read_text
from weft.data.buckets import Bucket
from weft.errors import ConfigError
from weft.run.config import RunConfig, parse_config
from weft.run.estimate import Card, Held, composed, estimate
from weft.run.ladder import Rung, changed_config, climb, device_memory, ladder, needed, remedies, size_of
from weft.run.parts import trained_of

GIB = 2**30
CLIP = Bucket(frames=81, height=480, width=832, tokens=32_760)
SMALL = Bucket(frames=9, height=64, width=96, tokens=3 * 4 * 6)


@pytest.fixture(scope="module")
def big(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_wan(tmp_path_factory.mktemp("big") / "14b", world / "model", "14b")


CARD = Card(gpu=True, memory=16 * GIB)


@pytest.fixture(scope="module")
def large_run(big: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[Rung]]:
    """A 14B run in bf16 in which nothing is done to save memory, and its ladder to 16 GiB."""
    change = {"engine": {"precision": "bf16"}, "adapter": {"rank": 32}, "data": {"batch_size": 1}}
    config = small_config(tmp_path_factory.mktemp("run"), big, **change)
    return config, ladder(config, [CLIP, SMALL], CARD.memory or 0, CARD)


def typed(config: RunConfig, rungs: Sequence[Rung]) -> RunConfig:
    """The config with the rungs' lines as typed behind a command."""
    lines = [line for rung in rungs for line in rung.changes]
    return parse_config(read_text(json.dumps(config.resolved()), overrides=lines))


@pytest.mark.slow
def test_rungs_come_in_their_order_and_each_leaves_less(large_run):
    _, rungs = large_run
    names = [rung.name for rung in rungs]
    assert names == ["recompute", "offload_inputs", "8-bit optimizer", "fp8 weights", "stream_blocks"]
    sizes = [rung.bytes for rung in rungs]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 16 * GIB < sizes[-2]
    assert all(rung.cost for rung in rungs)


@pytest.mark.slow
def test_the_lines_of_a_ladder_make_a_config_that_needs_what_it_says(large_run):
    config, rungs = large_run
    changed = typed(config, rungs)
    assert needed(changed, CLIP, CARD).estimate.total == rungs[-1].bytes
    assert ladder(changed, [CLIP], CARD.memory or 0, CARD) == []


@pytest.mark.slow
def test_no_more_blocks_are_streamed_than_must_be(large_run):
    changed = typed(*large_run)
    count = changed.engine.stream_blocks
    fewer = changed_config(changed, {"engine.stream_blocks": count - 1})
    assert count > 2 and fewer is not None
    assert needed(fewer, CLIP, CARD).estimate.total > 16 * GIB


def test_where_nothing_else_is_left_the_batch_and_then_the_bucket_shrink(world, tmp_path):
    rungs = ladder(small_config(tmp_path, world / "model"), [SMALL], 1)
    assert [rung.name for rung in rungs][-2:] == ["batch", "bucket"]
    assert rungs[-2].changes == ("data.batch_size=1", "schedule.accumulate=2")
    assert rungs[-1].changes == (f"data.buckets.token_budget={4 * 6}",)  # one latent frame


def test_a_run_that_fits_needs_no_ladder(world, tmp_path):
    config = small_config(tmp_path, world / "model")
    total = estimate(config, [SMALL], trained_of(config))[SMALL].total
    assert ladder(config, [SMALL], total) == []
    assert ladder(config, [SMALL], total - 1) != []


def test_on_a_cpu_nothing_is_offered_that_only_moves_memory_to_the_host(world, tmp_path):
    config = small_config(tmp_path, world / "model", data={"cache": "off"})
    names = [rung.name for rung in ladder(config, [SMALL], 1)]
    assert names[0] == "cache"
    assert not {"offload_inputs", "stream_blocks", "one expert"} & set(names)
    assert "recompute" in names and "batch" in names


def test_two_experts_are_parted_before_blocks_are_streamed(world, tmp_path):
    model = make_wan(tmp_path / "experts", kind="experts", layers=6)
    change = {"family": {"expert": "both"}, "engine": {"experts": "together"}}
    config = small_config(tmp_path, model, **change)
    card = Card(gpu=True, memory=None)
    names = [rung.name for rung in climb(needed(config, SMALL, card), 1)]
    assert names.index("one expert") < names.index("stream_blocks")
    one = changed_config(config, {"engine.experts": "one"})
    assert one is not None
    both, single = (composed(c, Held(0, 0), {}, card) for c in (config, one))
    assert (both.weights, both.host) == (2 * single.weights, 0)
    assert single.host == both.weights


def test_remedies_are_the_next_three_rungs_whatever_the_estimate_says(world, tmp_path):
    config = small_config(tmp_path, world / "model", engine={"recompute": True})
    found = remedies(config, SMALL, 10**15)
    assert [rung.name for rung in found] == ["8-bit optimizer", "fp8 weights", "batch"]
    assert "optimizer.kind=adamw8bit" in found[0].line()


@pytest.mark.parametrize(("text", "size"), [
    ("16GiB", 16 * GIB), ("16 GiB", 16 * GIB), ("24GB", 24 * 10**9), ("24g", 24 * 10**9), ("900M", 900 * 10**6),
    ("1.5 gib", 3 * GIB // 2), ("80TiB", 80 * 2**40), ("1024", 1024), ("512 b", 512),
])  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "16 GiBs", "-3GB", "sixteen", "0", "1e9"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="Write it like 16GiB"):
        size_of(text)


def test_a_cpu_has_the_memory_of_the_machine_or_its_container(world, tmp_path):
    total = device_memory(small_config(tmp_path, world / "model"))
    assert total is not None and 2**28 < total < 2**50
