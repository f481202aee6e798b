"""Sharded data parallelism: each process keeps a part of every weight, and blocks are gathered just in time (FSDP2)."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from weft.contracts import Berth
from weft.engines.gradients import norm_over_shards
from weft.engines.processes import Together, meshes
from weft.engines.residency import Residence, tensors_of
from weft.engines.single_device import SingleEngine, parameters_of


@dataclass(frozen=True)
class Kept:
    """The rows of a weight that this process keeps. stand_in: in the network until it is sharded; it has the weight's
    shape and dtype, and the memory of one number."""

    rows: Tensor
    stand_in: Tensor


class ShardedEngine(SingleEngine):
    """FSDP2, or HSDP where there is more than one copy. Weights are cut as soon as they are read, so that no process
    ever holds a whole network. Numbers are as on one device: frozen weights keep their dtypes, autocast stands around
    the forward pass, and gradients are summed in fp32.

    broadcast: rank 0 reads the weights and sends them to the others.
    """

    processes: Together

    def __init__(
        self, device: torch.device, precision: str, residence: Residence, processes: Together, broadcast: bool = False
    ) -> None:
        super().__init__(device, precision, residence, processes)
        self.can = frozenset({"roles"})
        self.broadcast = broadcast
        self.roots: list[FSDPModule] = []
        self._kept: dict[int, Kept] = {}  # by the address of the stand-in

    @property
    def mesh(self) -> DeviceMesh:
        """(data, shard), or (shard,) where there is one copy."""
        mesh = meshes(self.processes.layout, self.device.type).weights
        assert mesh is not None
        return mesh

    @property
    def shards(self) -> dist.ProcessGroup:
        """The processes that hold one copy together."""
        return self.mesh.get_group("shard")

    def berth(self, number: int) -> Berth:
        """Rows of its own in each process, and a stand-in for the whole in the network until it is placed."""
        return Berth(self._cut, self.processes.read_by_first) if self.broadcast else Berth(self._cut)

    def _cut(self, tensor: Tensor, block: int | None, blocks: int) -> Tensor:
        if not tensor.numel() or not tensor.ndim:
            return self._moved(tensor)
        rows = -(-len(tensor) // self.shards.size())  # as torch.chunk and FSDP2 cut: the last ones may get fewer
        begin = min(self.shards.rank() * rows, len(tensor))
        own = self._moved(tensor[begin : begin + rows].clone())
        stand_in = torch.empty(1, dtype=tensor.dtype, device=self.device).expand(tensor.shape)
        self._kept[stand_in.data_ptr()] = Kept(own, stand_in)
        return stand_in

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Shard each block, and what is outside of them. Adapters keep their values; every parameter is replaced."""
        kept = self._unfilled(network)
        for tensor in tensors_of(network):
            if not tensor.is_meta:
                tensor.data = self._moved(tensor.data)
        self.ready(blocks)  # FSDP2's hooks stand around a block, outside of its compiled forward
        whole = {p for p in network.parameters() if not p.ndim}  # FSDP2 cuts along the first dimension
        assert not any(p.requires_grad for p in whole), "a trained parameter of one number cannot be sharded"
        for module in (*blocks, network):
            # Always given back after a forward pass: what is looked at between steps is then the shards.
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=whole)
            self._add_up(module)
        self._fill(network, kept)
        # It warns of changing the answer in place, which no family does: many networks return a view.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        assert isinstance(network, FSDPModule)
        self.roots.append(network)
        return network

    def _unfilled(self, network: nn.Module) -> dict[str, Tensor]:
        """The rows of each weight by its name. In the network parameters on the meta device take the place of their
        stand-ins; a buffer, which FSDP2 does not shard, is put together from all processes."""
        kept: dict[str, Tensor] = {}
        metas: dict[int, nn.Parameter] = {}  # tied weights stay one
        for path, module, name, tensor in _places(network):
            found = self._kept.get(tensor.data_ptr()) if tensor.numel() and not tensor.is_meta else None
            if found is None:
                continue
            if name in module._buffers:
                module._buffers[name] = self._put_together(found)
                continue
            kept[path] = found.rows
            address = found.stand_in.data_ptr()
            if address not in metas:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                metas[address] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            module._parameters[name] = metas[address]
        self._kept.clear()
        return kept

    def _put_together(self, kept: Kept) -> Tensor:
        part = DTensor.from_local(
            kept.rows, self.mesh["shard"] if self.mesh.ndim > 1 else self.mesh, [Shard(0)], run_check=False,
            shape=kept.stand_in.shape, stride=torch.empty(kept.stand_in.shape, device="meta").stride(),
        )  # fmt: skip
        return part.full_tensor()

    def _fill(self, network: nn.Module, kept: Mapping[str, Tensor]) -> None:
        """Give the sharded parameters their rows."""
        filled: dict[int, nn.Parameter] = {}
        for path, module, name, tensor in _places(network):
            if path not in kept:
                continue
            assert isinstance(tensor, DTensor)
            if id(tensor) not in filled:
                part = DTensor.from_local(
                    kept[path], tensor.device_mesh, tensor.placements, run_check=False,
                    shape=tensor.shape, stride=tensor.stride(),
                )  # fmt: skip
                filled[id(tensor)] = nn.Parameter(part, requires_grad=tensor.requires_grad)
            module._parameters[name] = filled[id(tensor)]

    def _add_up(self, module: nn.Module) -> None:
        """FSDP2 takes the mean over processes; our contract is the sum."""
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        # With a factor torch asks for a kind of reduction that only NCCL has, unless it is told to add.
        module.set_force_sum_reduction_for_comms(True)

    def alternate(self, networks: Mapping[str, nn.Module]) -> Callable[[str], None]:
        """All networks stay on the devices, each in shards."""
        return lambda name: None

    def backward(self, loss: Tensor, *, last: bool, optimizers: Sequence[str] = ()) -> None:
        for root in self.roots:
            root.set_requires_gradient_sync(last)
        super().backward(loss, last=last, optimizers=optimizers)

    def gradient(self, optimizer: Optimizer) -> tuple[list[Tensor], Tensor]:
        parts = parts_of_gradients(optimizer)
        return parts, norm_over_shards(parts, self.shards, self.device)


def parts_of_gradients(optimizer: Optimizer) -> list[Tensor]:
    """This process's part of each gradient; of a short one it may have none."""
    found = []
    for parameter in parameters_of(optimizer):
        gradient = parameter.grad
        if gradient is not None:
            assert isinstance(gradient, DTensor), "what is trained stands outside of the network that was placed"
            found.append(gradient.to_local())
    return [part for part in found if part.numel()]


def _places(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(dotted name, module, its own name there, tensor) of all parameters and buffers, tied ones under each name."""
    for path, module in network.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, name, tensor
