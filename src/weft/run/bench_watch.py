"""What a step does beside taking time: memory, compiled graphs, kernels of attention, waits of the host."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent, counters
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from weft.run.counting import counted
from weft.run.learner import Learner
from weft.run.rehearsal import LiveBytes
from weft.run.shortage import peak_of

KERNELS = ("_scaled_dot_product_", "flash_attn", "flex_attention")  # parts of names of operators of attention
READ = "_local_scalar_dense"
SYNC = "called a synchronizing"  # of torch's warning


@dataclass(frozen=True)
class Compiled:
    """Graphs that torch.compile has made, breaks in them, and the seconds that it took."""

    graphs: int
    breaks: int
    seconds: float

    def since(self, earlier: "Compiled") -> "Compiled":
        return Compiled(self.graphs - earlier.graphs, self.breaks - earlier.breaks, self.seconds - earlier.seconds)

    def plain(self) -> dict[str, float]:
        return {"graphs": self.graphs, "breaks": self.breaks, "seconds": round(self.seconds, 3)}


def compiled_so_far() -> Compiled:
    """In this process."""
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return Compiled(graphs, breaks, calculate_time_spent().get("total_wall_time", 0.0))


@dataclass(frozen=True)
class Saved:
    """Bytes that a step keeps for its backward pass, each storage once, without weights: all, and of the block in the
    middle, where a tensor belongs to the first that keeps it."""

    total: int
    block: int

    def plain(self) -> dict[str, int]:
        return {"total": self.total, "per_block": self.block}


@dataclass(frozen=True)
class Seen:
    """What further steps showed. peak: bytes, as `by` counts them. attention: names of torch's operators. reads:
    numbers that the host asked of tensors in a step; syncs: times that it waited for a GPU. operations: kernels started
    in a step. These and saved: None where compiled code hides them."""

    peak: int | None
    by: str
    attention: list[str]
    reads: int
    syncs: int | None
    operations: int | None
    saved: Saved | None


def watched(learner: Learner, go: Callable[[int], float], compiled: bool, alone: bool = True) -> Seen:
    """Go some further steps and look. alone: nothing else of the bench lies on the device."""
    device = learner.engine.device
    if device.type == "cuda":
        peak, by = allocated_peak(device, None if alone else standing(learner), go), "allocator"
    elif compiled:
        peak, by = peak_of(device), "process"
    else:
        peak, by = counted_peak(standing(learner), go), "counted"
    calls, operations = called(go, compiled)
    attention = sorted(name for name in calls if any(part in name for part in KERNELS) and "backward" not in name)
    saved = None if compiled else saved_by(learner, go)
    return Seen(peak, by, attention, calls[READ], syncs_of(go, device), operations, saved)


def called(go: Callable[[int], float], compiled: bool) -> tuple[Counter[str], int | None]:
    """How often each operator is called in a step, and kernels that are started, where no compiled code hides them."""
    if not compiled:
        traffic = counted(lambda: go(1))
        return traffic.names, traffic.operations
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        go(1)
    return Counter({event.key.removeprefix("aten::"): event.count for event in seen.key_averages()}), None


def counted_peak(stands: int, go: Callable[[int], float]) -> int:
    """Bytes that stand, and the most at a time beside them in a step, operator by operator."""
    live = LiveBytes()
    with live:
        go(1)
    return stands + live.peak


def allocated_peak(device: torch.device, stands: int | None, go: Callable[[int], float]) -> int:
    """The allocator's peak in a step on a GPU; of what stands and what the step adds, where others lie there too."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    go(1)
    peak = torch.cuda.max_memory_allocated(device)
    return peak if stands is None else stands + peak - before


def standing(learner: Learner) -> int:
    """Bytes of all that stays on the device from step to step."""
    network, optimizers = learner.model.network, learner.optimizers.values()
    here = learner.engine.device.type
    tensors = [*network.parameters(), *network.buffers(), *states_of(optimizers)]
    return bytes_of(tensor for tensor in tensors if tensor.device.type == here)


def states_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """What optimizers keep of their parameters."""
    return [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def syncs_of(go: Callable[[int], float], device: torch.device) -> int | None:
    """How often the host waits for a GPU within a step, as torch itself warns of it."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            go(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(each.message) for each in heard)


def saved_by(learner: Learner, go: Callable[[int], float]) -> Saved:
    """What autograd keeps in a step."""
    own = {tensor.untyped_storage().data_ptr() for tensor in learner.model.network.parameters()}
    found: dict[int, tuple[int, int | None]] = {}  # address -> (bytes, block)
    inside: list[int | None] = [None]

    kept: list[Tensor] = []  # alive until the end, so that no address is counted twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in found:
            found[storage.data_ptr()] = (storage.nbytes(), inside[0])
            kept.append(tensor.detach())
        return tensor

    def enter(number: int | None) -> Callable[..., None]:
        return lambda *_: inside.__setitem__(0, number)

    family, network = learner.model.family, learner.model.network
    networks = list(network.values()) if isinstance(network, nn.ModuleDict) else [network]
    blocks = [block for each in networks for block in family.blocks(each)]
    hooks = []
    for number, block in enumerate(blocks):
        hooks += [block.register_forward_pre_hook(enter(number)), block.register_forward_hook(enter(None))]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            go(1)
    finally:
        for hook in hooks:
            hook.remove()
    of = Counter[int]()
    for size, number in found.values():
        if number is not None:
            of[number] += size
    return Saved(sum(size for size, _ in found.values()), round(median(of.values())) if of else 0)
