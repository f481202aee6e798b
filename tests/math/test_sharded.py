"""Wholes and parts of tensors on real processes, whatever the mesh and however unevenly it cuts."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.multi import spawn
from weft.math.sharded import fill, held, like, whole

SHAPES = [(5, 3), (2, 4), (1,), (6, 2, 2), (7,)]
MESHES = {2: (2,), 3: (3,), 4: (2, 2)}  # processes; of four two copies of two shards


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shards(sides: tuple[int, ...]) -> dict[str, list]:
    """By the name of what is shown, one entry for each shape, from this process."""
    dist.init_process_group("gloo")
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(sides))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    shown: dict[str, list] = {"put together": [], "filled": [], "like": [], "here": [], "said": [], "form": []}
    for shape in SHAPES:
        tensor = distribute_tensor(numbers(shape), mesh, placements)
        shown["put together"].append(whole(tensor))
        with CommDebugMode() as talk:
            fill(tensor, numbers(shape, seed=1).double())
            made = like(tensor, numbers(shape, seed=2).double())
        shown["said"].append(talk.get_total_counts())
        shown["filled"].append(whole(tensor))
        shown["like"].append(whole(made))
        shown["here"].append(held(tensor).clone())
        assert isinstance(made, DTensor)
        shown["form"].append((made.placements == tensor.placements, made.stride() == tensor.stride()))
    dist.destroy_process_group()
    return shown


@pytest.mark.parametrize("world", MESHES)
def test_a_whole_is_put_together_and_dealt_out_without_a_word(world: int):
    ranks = spawn(world, shards, MESHES[world])
    for shown in ranks:
        for number, shape in enumerate(SHAPES):
            assert torch.equal(shown["put together"][number], numbers(shape))
            assert torch.equal(shown["filled"][number], numbers(shape, seed=1))
            assert torch.equal(shown["like"][number], numbers(shape, seed=2).double())
        assert shown["said"] == [0] * len(SHAPES) and set(shown["form"]) == {(True, True)}
    parts = MESHES[world][-1]
    for number, shape in enumerate(SHAPES):  # as torch.chunk cuts; the last processes may have nothing
        expected = list(numbers(shape, seed=1).chunk(parts))
        expected += [torch.empty(0, *shape[1:])] * (parts - len(expected))
        for rank, shown in enumerate(ranks):
            assert torch.equal(shown["here"][number], expected[rank % parts])


def test_an_ordinary_tensor_is_its_own_whole():
    tensor = numbers((5, 3))
    assert whole(tensor) is tensor and held(tensor) is tensor
    fill(tensor, numbers((5, 3), seed=1))
    assert torch.equal(tensor, numbers((5, 3), seed=1))
    made = like(torch.nn.Parameter(tensor), numbers((5, 3), seed=2).half())
    assert made.dtype == torch.float16 and torch.equal(made, numbers((5, 3), seed=2).half()) and not made.requires_grad


def test_a_value_of_another_shape_is_not_spread_over_a_tensor():
    with pytest.raises(AssertionError, match=r"\(3,\) into \(5, 3\)"):
        fill(numbers((5, 3)), numbers((3,)))
