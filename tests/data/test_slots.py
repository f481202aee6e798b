"""Slots: memory that is used again as soon as nobody holds a tensor in it, and never earlier; and sums of bytes."""

import gc
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.data.slots import ALIGNED, Slots, pageable, room_for
from weft.data.sums import BLOCK, sum_of_tensor

SHAPES = {"latents": (torch.float32, (2, 3, 5)), "mask": (torch.bool, (2, 7)), "text": (torch.bfloat16, (2, 7, 3))}


class Counted:
    """Memory that says how often it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Tensor:
        self.sizes.append(size)
        return pageable(size)


def test_a_piece_is_used_again_when_its_last_tensor_has_gone():
    memory = Counted()
    slots = Slots(memory)
    for _ in range(20):
        room_for(SHAPES, slots)["latents"].fill_(1)
    assert len(memory.sizes) == 1


def test_a_piece_is_not_used_again_while_any_view_of_it_lives():
    slots = Slots()
    held = room_for(SHAPES, slots)["latents"].fill_(1)[0, :, 2:]
    for _ in range(20):
        room_for(SHAPES, slots)["latents"].fill_(2)
    gc.collect()
    assert (held == 1).all()


def test_whoever_keeps_many_batches_has_memory_for_each():
    slots = Slots()
    kept = [room_for(SHAPES, slots)["latents"].fill_(i) for i in range(20)]
    assert all((tensor == i).all() for i, tensor in enumerate(kept))


def test_pieces_grow_to_the_largest_batch_and_serve_the_smaller_ones():
    memory = Counted()
    slots = Slots(memory)
    for size in (100, 1000, 10, 500, 1000, 1):
        assert slots.take(size).shape == (size,)
    assert memory.sizes == [100, 1000]


def test_tensors_of_one_piece_are_aligned_and_do_not_overlap():
    room = room_for(SHAPES, Slots())
    for number, (name, (dtype, shape)) in enumerate(SHAPES.items()):
        assert room[name].dtype == dtype and room[name].shape == shape and room[name].data_ptr() % ALIGNED == 0
        room[name].fill_(number)
    assert all((room[name] == number).all() for number, name in enumerate(SHAPES))


def test_an_incident_can_write_a_batch_whose_tensors_lie_in_one_piece(tmp_path: Path):
    room = {name: tensor.fill_(1) for name, tensor in room_for(SHAPES, Slots()).items()}
    save_file(room, tmp_path / "batch.safetensors")
    assert all(torch.equal(tensor, room[name]) for name, tensor in load_file(tmp_path / "batch.safetensors").items())


# ---- Sums ---------------------------------------------------------------------------------------------------------

LONG = torch.from_numpy(numpy.random.default_rng(0).integers(0, 256, 2 * BLOCK + 13, numpy.uint8))


@given(some.integers(0, len(LONG) - 1), some.integers(0, 7))
def test_any_flipped_bit_changes_the_sum(place: int, bit: int):
    other = LONG.clone()
    other[place] ^= 1 << bit
    assert sum_of_tensor(other) != sum_of_tensor(LONG)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, BLOCK])
def test_zeros_of_another_length_have_another_sum(size: int):
    assert sum_of_tensor(torch.zeros(size + 1, dtype=torch.uint8)) != sum_of_tensor(
        torch.zeros(size, dtype=torch.uint8)
    )


def test_blocks_in_another_order_have_another_sum():
    one, other, rest = LONG[:BLOCK], LONG[BLOCK : 2 * BLOCK], LONG[2 * BLOCK :]
    assert sum_of_tensor(torch.cat([other, one, rest])) != sum_of_tensor(LONG)


def test_the_sum_of_a_block_is_that_of_its_64_bit_words():
    words = torch.tensor([3, 5], dtype=torch.int64)
    assert sum_of_tensor(words) == f"{8:016x}-10"  # 16 bytes, written in hexadecimal
