"""Tensors of all ranks in safetensors files: each rank writes and reads its own slices, whatever wrote them or reads
them next. By torch's distributed checkpoints (DCP) in the form that has no pickle in it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from weft.errors import RunError
from weft.math.end_to_end import home_of, stretch_of

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """What one rank has of a tensor. local: its numbers, which begin at offset in a tensor of the whole's shape."""

    local: Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.local.shape)

    def staged(self) -> "Part":
        """A copy in host memory that later steps do not move."""
        return replace(self, local=self.local.detach().to("cpu", copy=True))

    def take(self, whole: Tensor) -> None:
        """Copy this part out of a whole tensor."""
        ends = zip(self.offset, self.local.shape, strict=True)
        self.local.detach().copy_(whole[tuple(slice(start, start + size) for start, size in ends)])


def part_of(tensor: Tensor) -> Part:
    """This rank's part of a tensor; of one that is not sharded all of it. Shares the tensor's memory."""
    if not isinstance(tensor, DTensor):
        local = tensor.detach() if tensor.requires_grad else tensor
        return Part(local, (0,) * tensor.ndim, tuple(tensor.shape))
    assert all(isinstance(placement, Shard | Replicate) for placement in tensor.placements), tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local().detach()
    return Part(local, tuple(offset), tuple(tensor.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks may have different parts of it."""
    return isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements)


def empty_beside(neighbour: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a tensor that an optimizer or an average keeps of a parameter: sharded like it when it has its shape,
    whole on every rank of its mesh when it has another; in host memory when the parameter is not sharded."""
    if not isinstance(neighbour, DTensor) or not shape:
        return torch.empty(shape, dtype=dtype)
    if tuple(neighbour.shape) == shape:
        return torch.empty_like(neighbour, dtype=dtype, requires_grad=False)
    local = torch.empty(shape, dtype=dtype, device=neighbour.device)
    everywhere = [Replicate()] * neighbour.device_mesh.ndim
    return DTensor.from_local(local, neighbour.device_mesh, everywhere, run_check=False)


class Copies:
    """Copies of parts in host memory, made in another thread while training goes on: whoever is about to change the
    originals calls `hold` before. Parts that share memory travel as one, and none twice.

    From a GPU they leave on a stream of their own for pinned memory, as they are after all that was launched before
    this was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: torch.cuda.Event | None = None
        self._read = Event()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def make(self, parts: Callable[[], Mapping[str, Part]]) -> dict[str, Part]:
        """Copies of parts, all of them there. Called once, in any thread."""
        try:
            originals = dict(parts())
            found = {}
            for own in together(originals).values():
                found |= copied(own, self._stream)
            if self._stream is not None:
                self._sent = torch.cuda.Event()
                self._sent.record(self._stream)
        finally:
            self._read.set()  # a failure is told to who called; nobody waits for it
        if self._sent is not None:
            self._sent.synchronize()  # the originals are kept until here: no memory that is read is given to others
        return {name: replace(part, local=found[place_of(part.local)]) for name, part in originals.items()}

    def hold(self) -> None:
        """Before the originals change. For what lies in host memory the host waits until it is read; of a GPU the
        current stream waits for what leaves it."""
        self._read.wait()
        if self._stream is not None and self._sent is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._sent)


Place = tuple[int, torch.dtype, int, tuple[int, ...], tuple[int, ...]]  # memory, dtype, offset, shape, stride


def place_of(tensor: Tensor) -> Place:
    """What a tensor shows of which memory: alike for those that are the same."""
    return home_of(tensor), tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def together(parts: Mapping[str, Part]) -> dict[tuple[int, torch.dtype], dict[Place, Tensor]]:
    """The different tensors of parts, by the memory that they lie in."""
    found: dict[tuple[int, torch.dtype], dict[Place, Tensor]] = {}
    for part in parts.values():
        place = place_of(part.local)
        found.setdefault(place[:2], {})[place] = part.local
    return found


def copied(own: Mapping[Place, Tensor], stream: torch.cuda.Stream | None) -> dict[Place, Tensor]:
    """Copies in host memory of tensors that share memory: of all of it at once where they fill it, else of each. Those
    of a GPU are on their way on the stream."""
    stretch = stretch_of(list(own.values())) if len(own) > 1 else None
    if stretch is None:
        return {place: in_host_memory(tensor, stream) for place, tensor in own.items()}
    host, first = in_host_memory(stretch, stream), stretch.storage_offset()
    return {place: host.as_strided(t.shape, t.stride(), t.storage_offset() - first) for place, t in own.items()}


def in_host_memory(tensor: Tensor, stream: torch.cuda.Stream | None) -> Tensor:
    """A copy; one of a GPU's on its way there."""
    if not tensor.is_cuda or stream is None:
        return tensor.to("cpu", copy=True)
    with torch.cuda.stream(stream):  # which makes its device this thread's too
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class Writing(DefaultSavePlanner):
    """Plans the writing of parts; of those that several ranks have alike, one rank writes each."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([written(name, part) for name, part in self.parts.items() if part.local.numel()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn].local


def written(name: str, part: Part) -> WriteItem:
    """A part as DCP plans it."""
    properties = TensorProperties.create_from_tensor(part.local)
    data = TensorWriteData(part.chunk, properties, torch.Size(part.whole))
    return WriteItem(index=MetadataIndex(name, part.chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


class Reading(DefaultLoadPlanner):
    """Plans the reading of parts from the slices that were written, however the tensors were cut then."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, part in self.parts.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != part.whole:
                there = "is not in it" if saved is None else f"is {tuple(getattr(saved, 'size', ()))} there"
                raise RunError(f"the checkpoint's files do not fit its state.json: {name} {part.whole} {there}.")
            if part.local.numel():
                items += create_read_items_for_chunk_list(name, saved, [part.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn].local


class Shards:
    """The ranks of a run as they write and read together. All of them must call each method, in one order.

    They talk in a group of their own, so that a thread may write while training goes on.
    """

    def __init__(self) -> None:
        self.world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.group: Any = dist.new_group(backend="gloo") if self.world > 1 else None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is no news to one process

    def write(self, folder: Path, parts: Mapping[str, Part]) -> list[Path]:
        """Write parts in host memory; the files that this rank wrote, which are on the disk then. Raises RunError on
        all ranks when one failed."""
        storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        self._together(
            lambda: dcp.save(
                {}, storage_writer=storage, planner=Writing(parts), process_group=self.group, no_dist=self.world == 1
            )
        )
        return sorted(folder.glob(f"shard-{self.rank + 1:05d}-*"))

    def read(self, folder: Path, parts: Mapping[str, Part]) -> None:
        """Fill parts from the files of any number of ranks. Raises RunError on all ranks when one failed."""
        storage = HuggingFaceStorageReader(str(folder))
        self._together(
            lambda: dcp.load(
                {}, storage_reader=storage, planner=Reading(parts), process_group=self.group, no_dist=self.world == 1
            )
        )

    def _together(self, work: Callable[[], Any]) -> None:
        """Of a failure DCP tells all ranks, by something that is no Exception."""
        try:
            work()
        except dcp.api.CheckpointException as failed:
            rank, (reason, _) = min(failed.failures.items())
            where = f"rank {rank}: " if self.world > 1 else ""
            raise RunError(f"{where}{type(reason).__name__}: {reason}") from failed

    def each(self, work: Callable[[], T]) -> list[T]:
        """What work, plain data, comes to on every rank. When it fails on one, all raise RunError."""
        if self.group is None:
            return [work()]
        own: tuple[bool, Any]
        try:
            own = (True, work())
        except Exception as failed:  # the others wait for word of it
            own = (False, f"{type(failed).__name__}: {failed}")
        said: list[Any] = [None] * self.world
        dist.all_gather_object(said, own, group=self.group)
        for rank, (done, value) in enumerate(said):
            if not done:
                raise RunError(f"rank {rank}: {value}")
        return [value for _, value in said]

    def first(self, work: Callable[[], T]) -> T:
        """What work, plain data, comes to on rank 0, which alone does it. When it fails, all raise RunError."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the group."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None
