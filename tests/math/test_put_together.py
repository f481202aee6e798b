"""Tensors that are cut over processes, put together by one collective, as torch puts them together."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.multi import spawn
from weft.math.sharded import whole

SHAPES = [(7,), (1,), (0, 4), (6, 5), (7, 5, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


def different(world: int, copies: int) -> list[str]:
    """Where what is put together is not the tensor that was cut: along each dimension, in each dtype."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (copies, world // copies))
    wrong = []
    for shape in SHAPES:
        for dtype in DTYPES:
            tensor = (torch.arange(torch.Size(shape).numel()).reshape(shape) % 5).to(dtype)
            for dim in range(len(shape)):
                cut = distribute_tensor(tensor, mesh, [Replicate(), Shard(dim)], src_data_rank=None)
                found = whole(cut)
                same = torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8))
                if not (same and found.is_contiguous() and found.shape == tensor.shape):
                    wrong.append(f"{shape} {dtype} {dim}")
    dist.destroy_process_group()
    return wrong


@pytest.mark.parametrize(("world", "copies"), [(3, 1), (4, 2)])
def test_what_is_put_together_is_what_was_cut(world: int, copies: int) -> None:
    """On three no width divides, and some have nothing."""
    assert spawn(world, different, world, copies) == [[]] * world
