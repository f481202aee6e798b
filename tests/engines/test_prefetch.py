"""Batches on their way to the device: in order, counted on the host, each whole before it is used."""

from collections.abc import Iterator

import numpy
import pytest
import torch

from weft.contracts import Batch
from weft.data.slots import Slots, room_for
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.errors import DataError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = {"latents": (torch.float32, (2, 16, 21, 30, 52))}


def numbered(count: int, slots: Slots, size: dict = SHAPE) -> Iterator[Batch]:
    """Batches full of their own number, in memory that is used again."""
    for number in range(count):
        room = room_for(size, slots)
        room["latents"].fill_(number)
        yield Batch(room, (str(number),))
        del room


def count(batch: Batch) -> int:
    assert batch["latents"].device.type == "cpu", "items are counted on the host"
    return len(batch.keys)


def test_on_a_cpu_nothing_is_made_before_it_is_asked_for():
    made: list[str] = []

    def told() -> Iterator[Batch]:
        for batch in numbered(3, Slots()):
            made.append(batch.keys[0])
            yield batch

    engine = SingleEngine.open("cpu", "fp32")
    feed = engine.feeding(told(), count)
    assert made == []
    batch, items = next(feed)
    assert (batch.keys, items, made) == (("0",), 1, ["0"])


def test_host_memory_of_a_cpu_is_as_the_system_gives_it():
    memory = SingleEngine.open("cpu", "fp32").host_memory(100)
    assert memory.shape == (100,) and memory.dtype == torch.uint8 and not memory.is_pinned()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def test_every_number_of_half_precision_is_the_same_in_fp32(device: str):
    bits = numpy.arange(1 << 16, dtype=numpy.uint16)
    bf16, fp16 = (torch.from_numpy(bits.view(numpy.int16)).view(dtype) for dtype in (torch.bfloat16, torch.float16))
    known = {"bf16": torch.from_numpy((bits.astype(numpy.uint32) << 16).view(numpy.float32)),
             "fp16": torch.from_numpy(bits.view(numpy.float16).astype(numpy.float32))}  # fmt: skip
    put = SingleEngine.open(device, "fp32").put(Batch({"bf16": bf16, "fp16": fp16}, ("a",)))
    for name, expected in known.items():
        found, finite = put[name].cpu(), expected.isfinite()
        assert found.dtype == torch.float32 and int(finite.sum()) > 60_000
        assert torch.equal(found[finite].view(torch.int32), expected[finite].view(torch.int32))


@pytest.mark.parametrize("verified", [False, True])
def test_a_batch_is_widened_and_what_counts_or_masks_is_not(verified: bool):
    kept = {"text": torch.ones(2, 3).bfloat16(), "latents": torch.ones(2, 1), "ids": torch.tensor([1, 2]),
            "text_mask": torch.tensor([[True], [False]])}  # fmt: skip
    put = SingleEngine.open("cpu", "fp32", Residence(verified=verified)).put(Batch(kept, ("a", "b")))
    assert put["text"].dtype == put["latents"].dtype == torch.float32
    assert put["ids"].dtype == torch.int64 and put["text_mask"].dtype == torch.bool
    assert all(torch.equal(put[name], tensor.to(put[name].dtype)) for name, tensor in kept.items())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("pinned", [True, False])
def test_batches_arrive_whole_and_in_order_though_their_slots_are_used_again(pinned: bool):
    engine = SingleEngine.open("cuda", "fp32", Residence(pinned=pinned))
    taken: list[int] = []

    def memory(size: int) -> torch.Tensor:
        taken.append(size)
        return engine.host_memory(size)

    kept = []
    for number, (batch, items) in enumerate(engine.feeding(numbered(40, Slots(memory)), count)):
        assert batch.keys == (str(number),) and items == 1
        torch.cuda._sleep(1_000_000)  # the device is behind: its next batch must not overwrite this one
        kept.append((number, (batch["latents"] == number).all()))
        held = batch if number == 3 else None
        del batch
        if held is not None:
            incident = held
    assert all(bool(whole) for _, whole in kept)
    assert bool((incident["latents"] == 3).all()), "a batch that an incident keeps is nobody else's"
    assert len(taken) <= 3


@pytest.mark.gpu
@needs_cuda
def test_locked_memory_is_locked_unless_the_config_says_no():
    engine = SingleEngine.open("cuda", "fp32")
    room = room_for(SHAPE, Slots(engine.host_memory))
    assert room["latents"].is_pinned()
    assert not SingleEngine.open("cuda", "fp32", Residence(pinned=False)).host_memory(64).is_pinned()


@pytest.mark.gpu
@needs_cuda
def test_what_fails_in_the_feed_is_raised_after_the_batches_before_it():
    def failing() -> Iterator[Batch]:
        yield from numbered(2, Slots())
        raise DataError("clip 2 is gone")

    feed = SingleEngine.open("cuda", "fp32").feeding(failing(), count)
    assert [next(feed)[0].keys for _ in range(2)] == [("0",), ("1",)]
    with pytest.raises(DataError, match="clip 2 is gone"):
        next(feed)
