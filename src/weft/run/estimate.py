"""How much device memory a run will take, counted on fake tensors: the real network, adapters and autograd run with
shapes but without storage, and what autograd keeps for the backward pass is added up."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from weft.data.buckets import Bucket
from weft.engines.single_device import DTYPES, best_device, best_precision
from weft.run.config import RunConfig
from weft.run.rehearsal import rehearsed

FIXED = 0.6 * 2**30  # bytes: context of the device and the workspaces of its libraries, on CUDA
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "custom": 8}  # of optimizer state for each trainable parameter
FULL = {**DTYPES, "fp32": torch.float32}


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device in one training step of one bucket."""

    weights: int
    adapter: int  # fp32 weights, gradients, optimizer state, moving average
    activations: int
    fixed: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.fixed


@dataclass
class Kept:
    """Bytes that autograd keeps, by storage; `inside` holds the number of the block that runs, or None."""

    base: set[int]
    seen: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    inside: int | None = None
    inputs: int = 0  # bytes of the blocks' inputs, which recomputation keeps instead

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.base:
            self.seen.setdefault(storage._cdata, (storage.nbytes(), self.inside))
        return tensor

    def bytes_of(self, block: int | None) -> int:
        return sum(size for size, inside in self.seen.values() if inside == block)

    def peak(self, blocks: int, recompute: bool) -> int:
        """Without recomputation everything kept; with it the blocks' inputs and the largest block."""
        if not recompute:
            return sum(size for size, _ in self.seen.values())
        return self.bytes_of(None) + self.inputs + max(self.bytes_of(i) for i in range(blocks))


def precision_of(config: RunConfig) -> str:
    """The engine's precision, decided as the engine will decide it."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return best_precision(device_of(config))


def device_of(config: RunConfig) -> torch.device:
    """The device that the engine will take."""
    return torch.device(best_device() if config.engine.device == "auto" else config.engine.device)


def estimate(config: RunConfig, buckets: list[Bucket], trainable: int) -> dict[Bucket, Estimate]:
    """An estimate for each bucket at the config's batch size."""
    dtype = FULL[config.family.weight_dtype(precision_of(config))]
    weights = sum(p.numel() for p in config.family.skeleton().parameters()) * dtype.itemsize
    state = 8 + STATE_BYTES[config.optimizer.kind] + (4 if config.ema else 0)
    fixed = int(FIXED) if device_of(config).type == "cuda" else 0
    return {
        bucket: Estimate(weights, trainable * state, activations(config, bucket), fixed) for bucket in buckets
    }


def activations(config: RunConfig, bucket: Bucket) -> int:
    """Bytes that autograd keeps for one micro-batch."""
    precision = precision_of(config)
    with rehearsed(config, bucket, FULL[config.family.weight_dtype(precision)]) as rehearsal:
        network = rehearsal.network
        kept = Kept({p.untyped_storage()._cdata for p in [*network.parameters(), *network.buffers()]})
        watch_blocks(rehearsal.blocks, kept)
        with mixed(precision), saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            rehearsal.loss()
        return kept.peak(len(rehearsal.blocks), config.engine.recompute)


def watch_blocks(blocks: Sequence[nn.Module], kept: Kept) -> None:
    """Tell the account which block runs, and how large its input is."""

    def enter(number: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.inside = number
            kept.inputs += args[0].untyped_storage().nbytes()

        return hook

    def leave(module: nn.Module, args: object, output: object) -> None:
        kept.inside = None

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(enter(number))
        block.register_forward_hook(leave)


def mixed(precision: str):
    """Autocast of fake cpu tensors, which casts as the device's would."""
    return nullcontext() if precision == "fp32" else torch.autocast("cpu", dtype=DTYPES[precision])
