"""The processes of a run: who this one is, how they meet, and what they tell each other."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.contracts import SequenceGroup
from weft.engines.parallel import Layout
from weft.errors import ConfigError

T = TypeVar("T")
BACKENDS = {"cuda": "cuda:nccl,cpu:gloo", "cpu": "gloo"}
START = "Start the processes with weft train --gpus N, torchrun or another launcher, which set it"


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is. local: its number on its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def place_in(environment: Mapping[str, str]) -> Place:
    """What a launcher has told this process; the only one where it was told nothing. Raises ConfigError for half."""
    world = _number(environment, "WORLD_SIZE", "1")
    if world < 1:
        raise ConfigError(f"environment: WORLD_SIZE is {world}; at least 1 was expected. {START}.")
    if world == 1:
        return Place()
    place = Place(_number(environment, "RANK"), world, _number(environment, "LOCAL_RANK"))
    if not 0 <= place.rank < world:
        raise ConfigError(f"environment: RANK is {place.rank}, which is none of 0 to {world - 1} (WORLD_SIZE {world}).")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(f"environment: WORLD_SIZE is {world}, but {name} is not set. {START}.")
    _number(environment, "MASTER_PORT")
    return place


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text:
        raise ConfigError(
            f"environment: WORLD_SIZE is {environment.get('WORLD_SIZE')}, but {name} is not set. {START}."
        )
    if not text.strip().lstrip("-").isdecimal():
        raise ConfigError(f"environment: {name} is '{text}'; a whole number was expected. {START}.")
    return int(text)


def place_here() -> Place:
    return place_in(os.environ)


def device_of(device: torch.device, place: Place, installed: int) -> torch.device:
    """The device of one of several processes: of GPUs the one with its number on its machine. Raises ConfigError."""
    if place.world == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(
            f"engine.device: several processes cannot share '{device}'. Write engine.device=cpu, or start one process."
        )
    if device.index is not None:
        raise ConfigError(
            f"engine.device: '{device}' is one GPU, but {place.world} processes were started, which take one each. "
            "Write engine.device=cuda, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if place.local >= installed:
        raise ConfigError(
            f"engine.device: process {place.local} of this machine (LOCAL_RANK) has no GPU of its own: {installed} "
            f"{'is' if installed == 1 else 'are'} visible to it. Start no more processes than GPUs on each machine, "
            "and let each see all of them."
        )
    return torch.device("cuda", place.local)


class Alone:
    """The only process of a run."""

    layout = Layout()
    rank = 0
    data_rank = 0
    sequence: SequenceGroup | None = None

    def total(self, value: Tensor) -> Tensor:
        return value

    def agreed(self, value: T) -> T:
        return json.loads(json.dumps(value))

    def barrier(self) -> None:
        """Nobody is waited for."""

    def close(self) -> None:
        """Nobody is left."""


class Together:
    """One of several processes. Every method is called by all of them."""

    sequence: SequenceGroup | None = None

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.rank = dist.get_rank()
        self.data_rank = layout.data_rank(self.rank)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes that read different data; within a sequence group values are equal."""
        value = value.clone()
        group = meshes(self.layout, self.device.type).data if self.layout.sequence > 1 else None
        dist.all_reduce(value, group=group)
        return value

    def agreed(self, value: T) -> T:
        """What rank 0 says, as JSON has it."""
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor(len(said))
        dist.broadcast(length, 0)
        if self.rank:
            said = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(said, 0)
        return json.loads(bytes(said.tolist()))

    def barrier(self) -> None:
        # Not dist.barrier, which goes by way of the GPU and may guess the wrong one.
        dist.all_reduce(torch.zeros(()))

    def read_by_first(self, read: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What rank 0 reads, in host memory. As bytes, because gloo knows few dtypes, and by way of the device, whose
        own links are faster."""
        tensor = read().contiguous() if self.rank == 0 else torch.empty(shape, dtype=dtype)
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype), "a reader promised another tensor"
        if tensor.numel():
            there = tensor.view(-1).view(torch.uint8).to(self.device)
            dist.broadcast(there, 0)
            tensor = there.cpu().view(dtype).view(shape)
        return tensor

    def close(self) -> None:
        """Leave the group of processes."""
        meshes.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def join(place: Place, device: torch.device, timeout: float) -> None:
    """Meet the other processes, once; timeout: minutes that a collective may wait for them. Raises ConfigError when
    they were not found."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(BACKENDS[device.type], timeout=timedelta(minutes=timeout))
    except dist.DistError as missed:  # the rendezvous: an address where nobody listens, or processes that never came
        reason = str(missed).splitlines()[0]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"environment: the {place.world} processes did not meet at MASTER_ADDR:MASTER_PORT {address}: {reason} "
            "Check that the address is the first machine's, the port free there, and that all were started."
        ) from missed


@dataclass(frozen=True)
class Meshes:
    """The groups that processes form. weights: (data, shard x sequence), or the latter alone where data is 1; None
    where weights are not sharded. data and sequence: process groups along the batch and along its tokens; None without
    sequence parallelism."""

    weights: DeviceMesh | None = None
    data: Any = None
    sequence: Any = None


@cache
def meshes(layout: Layout, device: str) -> Meshes:
    """The groups of a layout, made once, for a group costs sockets and memory and an engine is opened several times."""
    everyone, spread = torch.arange(layout.world), layout.shard * layout.sequence
    weights = None
    if layout.shard > 1 and layout.data == 1:
        weights = DeviceMesh(device, everyone, mesh_dim_names=("shard",))
    elif layout.shard > 1:
        weights = DeviceMesh(device, everyone.view(layout.data, spread), mesh_dim_names=("data", "shard"))
    if layout.sequence == 1:
        return Meshes(weights)
    ranks = everyone.view(layout.data_world, layout.sequence)
    tokens = DeviceMesh(device, ranks, mesh_dim_names=("data", "sequence"))
    return Meshes(weights, tokens.get_group("data"), tokens.get_group("sequence"))
