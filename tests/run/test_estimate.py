"""What a step will need, by arithmetic and against what real small runs hold on the cpu."""

import resource
import time
from pathlib import Path
from typing import Any

import pytest

from tests.learners import learner_of, small_config
from tests.run.large import large_wan
from tests.run.memory import allocated_at_peak, ready, really_held, really_kept
from tests.small import WIDTH, make_hunyuan, make_wan
from weft.contracts import Berth
from weft.data.buckets import Bucket
from weft.engines.residency import Residence, frozen_by_block
from weft.errors import ConfigError
from weft.run.estimate import activations, all_held, equal_blocks, estimate, held, rehearsals
from weft.run.shares import divided

SMALL = Bucket(frames=9, height=64, width=96, tokens=3 * 4 * 6)
LARGE = Bucket(frames=17, height=128, width=192, tokens=5 * 8 * 12)
RECOMPUTE = {"recompute": True}
OFFLOAD = {"recompute": True, "offload_inputs": True}
SELECTIVE = {"recompute": "selective"}
AWAY = {"offload_activations": True}
STATISTICS = 2 * SMALL.tokens * 4  # bytes that a norm holds of an item: mean and deviation of each token in fp32


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two double blocks and three single ones."""
    return make_hunyuan(tmp_path_factory.mktemp("hunyuan") / "model", 2, 3)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan of five blocks."""
    return make_wan(tmp_path_factory.mktemp("five") / "model", layers=5)


# ---- Activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "engine", "precision", "tolerance"), [
    ("native", {}, "fp32", 0.01),
    ("peft", {}, "bf16", 0.02),
    ("peft", RECOMPUTE, "fp32", 0.01),
    ("native", RECOMPUTE, "bf16", 0.05),
    ("native", OFFLOAD, "fp32", 0.01),
    ("peft", OFFLOAD, "bf16", 0.05),
    ("native", SELECTIVE, "fp32", 0.01),
    ("native", AWAY, "fp32", 0.01),
])  # fmt: skip
def test_a_rehearsal_holds_what_a_real_step_holds(world, tmp_path, backend, engine, precision, tolerance):
    """In bf16 fake tensors have the two statistics of a norm in half precision, which real ones have in fp32."""
    change: dict[str, Any] = {"engine": {"precision": precision, **engine}, "adapter": {"backend": backend}}
    config = small_config(tmp_path, world / "model", **change)
    kept, peak = really_held(config, SMALL)
    found = held(config, SMALL)
    ahead = 2 * SMALL.tokens * WIDTH * 4 if engine == OFFLOAD else 0  # on a GPU one input comes back before its time
    assert found.kept == pytest.approx(kept, rel=tolerance)
    assert found.peak - ahead == pytest.approx(peak, rel=tolerance)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_weights_that_are_decoded_are_there_while_they_are_multiplied(hunyuan, tmp_path, dtype):
    """A twelfth of what a small HunyuanVideo holds of one image."""
    image = Bucket(frames=1, height=64, width=64, tokens=16)
    change: dict[str, Any] = {"engine": RECOMPUTE, "data": {"batch_size": 1}}
    plain, packed = (
        small_config(tmp_path, hunyuan, family={"kind": "hunyuan-video", "dtype": each}, **change)
        for each in ("auto", dtype)
    )
    kept, peak = really_held(packed, image)
    found = held(packed, image)
    assert (found.kept, found.peak) == (kept, peak)
    assert peak > 1.05 * held(plain, image).peak


@pytest.mark.parametrize("kind", ["i2v21", "ti2v", "experts", "hunyuan"])
def test_every_family_is_rehearsed_with_all_that_it_is_told(hunyuan, tmp_path, kind):
    """An image, a time for each token, a mask of the text, one of two experts."""
    if kind == "hunyuan":
        model, family = hunyuan, {"kind": "hunyuan-video"}
    else:
        model, family = make_wan(tmp_path / "model", kind=kind), {"expert": "both"} if kind == "experts" else {}
    config = small_config(tmp_path, model, engine=RECOMPUTE, family=family)
    kept, peak = really_held(config, SMALL)
    found = held(config, SMALL)
    assert found.kept == pytest.approx(kept, rel=0.01)
    assert found.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_is_held_after_the_forward_pass_is_what_autograd_keeps(world, tmp_path, batch_size):
    """To that come the question's answer, the loss, and what seven norms hold by themselves."""
    config = small_config(tmp_path, world / "model", data={"batch_size": batch_size})
    beside = 7 * batch_size * STATISTICS
    assert held(config, SMALL).kept == pytest.approx(really_kept(config, SMALL) + beside, rel=0.01)


@pytest.mark.parametrize("engine", [{}, RECOMPUTE])
@pytest.mark.parametrize("backend", ["native", "peft"])
def test_the_peak_of_a_rehearsal_is_the_peak_of_the_allocator(world, tmp_path, backend, engine):
    """An operator's own scratch memory is seen by the allocator alone."""
    config = small_config(tmp_path, world / "model", engine=engine, adapter={"backend": backend})
    assert activations(config, LARGE) == pytest.approx(allocated_at_peak(config, LARGE), rel=0.05)


def test_what_is_kept_grows_with_the_batch(world, tmp_path):
    one, three = (small_config(tmp_path, world / "model", data={"batch_size": items}) for items in (1, 3))
    assert activations(three, SMALL) == pytest.approx(3 * activations(one, SMALL), rel=0.1)  # rotary tables are shared


def test_each_further_block_costs_a_recomputing_run_its_input_and_an_offloading_one_next_to_nothing(
    world, five, tmp_path
):
    """72 tokens of width 24 in fp32 for each of 2 items; one norm, and a block's six rows of modulation and one more,
    stay where they are: of what follows attention nothing does. Their share falls with the width: it is a hundredth at
    1536."""
    inputs = 3 * 2 * SMALL.tokens * WIDTH * 4
    stays = 3 * 2 * (STATISTICS + 7 * WIDTH * 4)
    for engine, more in ((RECOMPUTE, inputs + stays), (OFFLOAD, stays)):
        short, deep = (small_config(tmp_path, model, engine=engine) for model in (world / "model", five))
        assert activations(deep, SMALL) - activations(short, SMALL) == more
        assert really_held(deep, SMALL)[0] - really_held(short, SMALL)[0] == more


def test_a_long_row_of_equal_blocks_is_rehearsed_in_short(world, tmp_path, monkeypatch):
    config = small_config(tmp_path, make_wan(tmp_path / "seven", layers=7))
    assert equal_blocks(config) == 7
    short = held(config, SMALL)
    monkeypatch.setattr("weft.run.estimate.DEPTH", 7)
    assert short == held(config, SMALL)


def test_blocks_that_are_not_adapted_alike_are_rehearsed_one_by_one(five, tmp_path):
    config = small_config(tmp_path, five, adapter={"targets": r"blocks\.[34]\.attn1.*"})
    assert equal_blocks(config) == 0
    kept, peak = really_held(config, SMALL)
    found = held(config, SMALL)
    assert found.kept == pytest.approx(kept, rel=0.01)
    assert found.peak == pytest.approx(peak, rel=0.01)


def test_between_the_smallest_and_the_largest_bucket_memory_is_linear_in_tokens(world, tmp_path):
    middle = Bucket(frames=13, height=96, width=128, tokens=4 * 6 * 8)
    config = small_config(tmp_path, world / "model", engine=RECOMPUTE)
    found = {shape: each.peak for shape, each in all_held(config, [middle, LARGE, SMALL]).items()}
    assert found[middle] == pytest.approx(activations(config, middle), rel=0.02)
    assert (found[SMALL], found[LARGE]) == (activations(config, SMALL), activations(config, LARGE))


# ---- Weights and adapters -------------------------------------------------------------------------------------------


def test_the_adapter_costs_its_weights_gradients_moments_and_average_in_fp32(world, tmp_path):
    plain = small_config(tmp_path, world / "model")
    averaged = small_config(tmp_path, world / "model", ema={"decay": 0.9})
    small = small_config(tmp_path, world / "model", optimizer={"kind": "adamw8bit", "lr": 1e-4})
    costs = [estimate(config, [SMALL], {"default": 1000})[SMALL].adapter for config in (plain, averaged, small)]
    assert costs == [1000 * (4 + 4 + 8), 1000 * (4 + 4 + 8 + 4), 1000 * (4 + 4 + 2)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_count_what_the_loaded_network_takes(world, tmp_path, precision):
    config = small_config(tmp_path, world / "model", engine={"precision": precision})
    network = config.family.load(precision, "default", Berth())
    numbers = sum(t.nbytes for t in [*network.parameters(), *network.buffers()])
    assert estimate(config, [SMALL], {})[SMALL].weights == numbers


BLOCKS: dict[int | None, int] = {None: 70, **dict.fromkeys(range(6), 100)}


@pytest.mark.parametrize(("count", "away"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 3), (6, 4)])
def test_streamed_blocks_leave_the_device_but_for_a_ring_of_two(count, away):
    assert divided(BLOCKS, Residence(stream_blocks=count), 1, None) == (670 - 100 * away, 100 * count)


def test_of_two_experts_one_waits_when_both_would_fill_more_than_half_of_the_card():
    assert divided(BLOCKS, Residence(), 2, 2680) == (1340, 0)
    assert divided(BLOCKS, Residence(), 2, 2679) == (670, 1340)
    assert divided(BLOCKS, Residence(experts="one"), 2, 10_000) == (670, 1340)
    assert divided(BLOCKS, Residence(experts="one", stream_blocks=4), 2, 10_000) == (270 + 200, 2 * 670)
    assert divided(BLOCKS, Residence(experts="one"), 1, 100) == (670, 0)


def test_more_streamed_blocks_than_there_are_is_refused_before_weights_are_read(world, tmp_path):
    config = small_config(tmp_path, world / "model", engine={"recompute": True, "stream_blocks": 3})
    with pytest.raises(ConfigError, match="stream_blocks: 3 is too many for a network of 2 blocks"):
        estimate(config, [SMALL], {})


def test_streamed_weights_are_where_the_estimate_says(five, tmp_path):
    """Padding of a parcel's tensors to 256 bytes counts for much on blocks so small."""
    config = small_config(tmp_path, five, engine={"recompute": True, "stream_blocks": 4})
    learner = learner_of(config)
    (stream,) = learner.engine.streams
    found = estimate(config, [SMALL], {})[SMALL]
    parcels = stream.parcels.values()
    assert found.host == sum(t.nbytes for parcel in parcels for t in parcel.tensors)
    base = [t for t in frozen_by_block(learner.model.network, ())[None] if id(t) not in stream.tensors]
    ring = 2 * max(sum(t.nbytes for t in parcel.tensors) for parcel in parcels)
    assert found.weights == sum(p.nbytes for p in base) + ring


def test_the_1_3b_model_at_81_frames_of_480p_is_rehearsed_in_seconds_without_its_memory(world, tmp_path):
    """Real, it would take 2.8 GB of weights and tens of GB of activations."""
    folder = large_wan(tmp_path / "wan-1.3b", world / "model")
    bucket = Bucket(frames=81, height=480, width=832, tokens=32_760)
    change = {"data": {"batch_size": 1}, "family": {"text_length": 512}, "adapter": {"rank": 32}}
    config = small_config(tmp_path, folder, engine={"precision": "bf16", "recompute": True}, **change)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(config, [bucket], trained={"default": 43_745_280})[bucket]
    assert time.process_time() - began < 30
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30
    assert found.weights == pytest.approx(2 * 1.42e9, rel=0.02)  # the conditioning embedder is in fp32
    inputs = 30 * 32_760 * 1536 * 2  # bytes: what recomputation keeps of each block in bf16
    assert inputs < found.activations < 4 * inputs
    assert found.total == found.weights + found.adapter + found.activations + found.fixed


# ---- What waits in host memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [OFFLOAD, AWAY])
def test_what_the_backward_pass_is_to_read_counts_for_the_host(world, tmp_path, engine):
    """As a real step sends it, beside no frozen weights that wait."""
    config = small_config(tmp_path, world / "model", engine=engine)
    learner, loss = ready(config, LARGE)
    with learner.model.adapters.use(learner.shown[0]):
        answer = loss()
        engine_here: Any = learner.engine
        inputs, away = engine_here.inputs, engine_here.activations
        sent = inputs.moved if inputs is not None else away.pool.used
        del answer
    found = estimate(config, [LARGE], {})[LARGE]
    assert found.host == sent > 0
    if engine == OFFLOAD:  # 480 tokens of 2 items, for each of 2 blocks
        assert sent == 2 * 2 * LARGE.tokens * WIDTH * 4


@pytest.mark.slow
def test_a_budget_of_compiled_blocks_counts_for_what_they_send_to_the_host(tmp_path):
    model = make_wan(tmp_path / "four", layers=4)
    config = small_config(tmp_path, model, engine={"compile": True, "offload_activations": True})
    (found,) = rehearsals(config, LARGE).values()
    whole, little = found.at(1.0), found.at(0.1)
    assert whole.host > 1.5 * little.host > 0
    assert whole.peak > little.peak and whole.kept > little.kept


@pytest.mark.slow
def test_a_second_number_of_tokens_is_traced_in_numbers_as_the_first_was(world, tmp_path):
    """torch traces what it has seen change as a symbol, and a sum of bytes that holds one cannot be compared."""
    config = small_config(tmp_path, world / "model", engine={"compile": True})
    between = Bucket(frames=13, height=96, width=128, tokens=4 * 6 * 8)
    found = [rehearsals(config, shape) for shape in (SMALL, LARGE, between)]
    kept = [next(iter(each.values())).at(0.5).kept for each in found]
    assert [type(number) for number in kept] == [int] * 3
    assert kept[0] < kept[2] < kept[1]
    (again,) = rehearsals(config, SMALL).values()
    assert again.at(0.5).kept == kept[0]
