"""The rungs of the memory ladder: their order, their sum, and that their lines are configs."""

import json
from collections.abc import Sequence
from dataclasses import replace
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
from weft.run.ladder import (
    Rung,
    changed_config,
    climb,
    descent,
    device_memory,
    ladder,
    needed,
    remedies,
    room_in,
    size_of,
    walked,
    without_idle,
)
from weft.run.parts import trained_of
from weft.run.rungs import Need, items_apart, smaller_batch, smaller_moments

GIB = 2**30
CLIP = Bucket(frames=81, height=480, width=832, tokens=32_760)
FEWEST = 21  # blocks of 40 that must be streamed for 24 GiB
SMALL = Bucket(frames=9, height=64, width=96, tokens=3 * 4 * 6)


@pytest.fixture(scope="module")
def big(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_wan(tmp_path_factory.mktemp("big") / "14b", world / "model", "14b")


@pytest.fixture(scope="module")
def large_need(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Need:
    """Of a 14B run in bf16 in which nothing is done to save memory."""
    change = {"engine": {"precision": "bf16"}, "adapter": {"rank": 32}, "data": {"batch_size": 1}}
    config = small_config(tmp_path_factory.mktemp("run"), big, **change)
    return needed(config, CLIP, Card(gpu=True, memory=None))


def advice(need: Need, gib: int) -> list[Rung]:
    """For a card of so many GiB."""
    return descent(replace(need, card=Card(gpu=True, memory=gib * GIB)), room_in(gib * GIB))


def typed(config: RunConfig, rungs: Sequence[Rung]) -> RunConfig:
    """The config with the rungs' lines as typed behind a command."""
    lines = [line for rung in rungs for line in rung.changes]
    return parse_config(read_text(json.dumps(config.resolved()), overrides=lines))


def test_a_14b_video_model_fits_24_gib_and_10_gib_with_the_same_numbers_as_without(large_need):
    """What approximates the model or the optimizer is not needed, and so not offered."""
    lines = {gib: [" ".join(rung.changes) for rung in advice(large_need, gib)] for gib in (24, 10)}
    exact = ["engine.recompute=true", "engine.offload_inputs=true"]
    assert lines[24] == [*exact, f"engine.stream_blocks={FEWEST}"]
    assert lines[10] == [*exact, "engine.stream_blocks=40"]


def test_what_is_offered_leaves_less_step_by_step_and_ends_within_the_room_that_a_plan_may_fill(large_need):
    for gib in (24, 10):
        sizes = [rung.bytes for rung in advice(large_need, gib)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] <= 0.92 * gib * GIB < sizes[-2]


def test_the_lines_of_a_ladder_make_a_config_that_needs_what_it_says_and_no_less_would_do(large_need):
    rungs = advice(large_need, 24)
    reached = large_need.of(typed(large_need.config, rungs), CLIP)
    assert reached.estimate.total == rungs[-1].bytes
    assert advice(reached, 24) == []
    fewer = changed_config(reached.config, {"engine.stream_blocks": FEWEST - 1})
    assert fewer is not None and large_need.of(fewer, CLIP).estimate.total > 0.92 * 24 * GIB
    kept = changed_config(reached.config, {"engine.offload_inputs": False})
    assert kept is not None and large_need.of(kept, CLIP).estimate.total > 0.92 * 24 * GIB


@pytest.mark.slow
def test_on_80_gib_a_14b_video_model_keeps_the_answers_of_its_attention(large_need):
    """Compiled blocks would fit under a memory budget of 0, which computes a third of all products again; selective
    recomputation those of the forward pass but for attention, a sixth."""
    assert [rung.changes for rung in advice(large_need, 80)] == [("engine.recompute=selective",)]


@pytest.mark.slow
def test_on_141_gib_compiled_blocks_keep_what_there_is_room_for(large_need):
    (rung,) = advice(large_need, 141)
    assert rung.changes[0] == "engine.compile=true" and rung.changes[1].startswith("engine.activation_budget=0.")
    assert rung.bytes <= 0.92 * 141 * GIB


def test_a_step_that_a_later_one_makes_needless_is_not_offered(world, tmp_path):
    """Moments in 8 bits save less than is missing, and one clip at a time far more."""
    config = small_config(tmp_path, world / "model", engine={"recompute": True})
    need = needed(config, SMALL, Card(gpu=False, memory=None))
    moments, batch = (step for make in (smaller_moments, smaller_batch) if (step := make(need, 1)) is not None)
    both = walked(need, [moments, batch])
    assert both is not None
    between = both[0].after.estimate.total - 1
    assert [each.step.name for each in without_idle(need, both, between)] == ["batch"]
    assert without_idle(need, both, both[-1].after.estimate.total) == both


def test_a_change_of_the_engine_leaves_the_family_with_all_that_it_knows_of_its_files(world, tmp_path):
    config = small_config(tmp_path, world / "model")
    engine, weights = (changed_config(config, {key: value}) for key, value in
                       (("engine.recompute", True), ("family.dtype", "fp8")))  # fmt: skip
    assert engine is not None and engine.family is config.family and engine.engine.recompute is True
    assert weights is not None and weights.family is not config.family and weights.family.dtype == "fp8"


def test_large_clips_are_taken_one_by_one_before_anything_is_computed_twice(world, tmp_path):
    need = needed(small_config(tmp_path, world / "model"), SMALL, Card(gpu=True, memory=None))
    large = replace(need, shape=Bucket(frames=33, height=512, width=512, tokens=9 * 16 * 16 * 4))
    assert items_apart(need, 1) is None
    step = items_apart(large, 1)
    assert step is not None and step.changes == {"data.batch_size": 1, "schedule.accumulate": 2}


def test_where_nothing_else_is_left_the_batch_and_then_the_bucket_shrink(world, tmp_path):
    rungs = ladder(small_config(tmp_path, world / "model"), [SMALL], 1)
    names = [rung.name for rung in rungs]
    assert names[-4:] == ["batch", "8-bit optimizer", "fp8 weights", "bucket"]
    assert rungs[-4].changes == ("data.batch_size=1", "schedule.accumulate=2")
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
    assert [rung.name for rung in found] == ["batch", "8-bit optimizer", "fp8 weights"]
    assert "optimizer.kind=adamw8bit" in found[1].line()


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
