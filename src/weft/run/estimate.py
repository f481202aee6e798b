"""How much device memory a run will take, counted on fake tensors: the real network, adapters, autograd and engine run
with shapes but without storage, and the memory that they would hold at a time is followed through one step."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from weft.contracts import ModelFamily
from weft.data.buckets import Bucket
from weft.engines.residency import RING, Residence, memory_of, streamed_blocks, together
from weft.engines.single_device import DTYPES, best_device, best_precision
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.rehearsal import LiveBytes, Stage, block_lists, rehearsed

FIXED = 0.6 * 2**30  # bytes: context of the device and the workspaces of its libraries, on CUDA
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "custom": 8}  # of optimizer state for each trainable parameter
FULL = {**DTYPES, "fp32": torch.float32}
DEPTH = 2  # blocks of a network of equal blocks that are rehearsed, and one more, to know what each further one takes


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device in one training step of one bucket, and what waits in host memory."""

    weights: int
    adapter: int  # fp32 weights, gradients, optimizer state, moving average
    activations: int
    fixed: int
    host: int = 0  # frozen weights that wait for their turn

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.adapter + self.activations + self.fixed


@dataclass(frozen=True)
class Card:
    """The device that an estimate is made for. memory: bytes of its own, where that is known."""

    gpu: bool
    memory: int | None


@dataclass(frozen=True)
class Held:
    """Bytes beside the weights: kept for the backward pass, and the most at a time in both passes."""

    kept: int
    peak: int

    def further(self, other: "Held", times: int) -> "Held":
        """This, and so many times what the other has more."""
        return Held(*(a + times * (b - a) for a, b in ((self.kept, other.kept), (self.peak, other.peak))))


def precision_of(config: RunConfig) -> str:
    """The engine's precision, decided as the engine will decide it."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return best_precision(device_of(config))


def device_of(config: RunConfig) -> torch.device:
    """The device that the engine will take."""
    return torch.device(best_device() if config.engine.device == "auto" else config.engine.device)


def card_of(config: RunConfig) -> Card:
    """The device that the engine will take, as this machine has it."""
    device = device_of(config)
    return Card(device.type != "cpu", memory_of(device))


def estimate(
    config: RunConfig, buckets: Sequence[Bucket], trainable: int, card: Card | None = None
) -> dict[Bucket, Estimate]:
    """An estimate for each bucket at the config's batch size. trainable: parameters of all adapters. card: that the run
    is planned for, if not this machine's.

    Raises ConfigError when more blocks are to be streamed than there are.
    """
    card = card or card_of(config)
    found = all_activations(config, buckets)
    return {bucket: composed(config, found[bucket], trainable, card) for bucket in buckets}


def composed(config: RunConfig, activations: int, trainable: int, card: Card) -> Estimate:
    """The whole from what is already known of a step's activations."""
    by_block = config.family.weight_bytes(precision_of(config))
    weights, host = divided(by_block, config.engine.residence(), len(config.family.experts), card.memory)
    fixed = int(FIXED) if card.gpu else 0
    return Estimate(weights, adapter_bytes(config, trainable), activations, fixed, host)


def adapter_bytes(config: RunConfig, trainable: int) -> int:
    """Weights, gradients, optimizer state and moving average of what is trained."""
    return trainable * (8 + STATE_BYTES[config.optimizer.kind] + (4 if config.ema else 0))


def divided(
    by_block: Mapping[int | None, int], residence: Residence, experts: int, memory: int | None
) -> tuple[int, int]:
    """Of so many networks with so many bytes in each block: what is on a device with so much memory, and what waits."""
    numbers = streamed_blocks(sum(block is not None for block in by_block), residence.stream_blocks)
    streaming = [by_block[number] for number in numbers]
    staying = sum(by_block.values()) - sum(streaming)
    ring = min(RING, len(numbers)) * max(streaming, default=0)
    if experts == 1 or together(residence.experts, experts * staying, memory):
        return experts * staying + ring, experts * sum(streaming)
    return staying + ring, experts * (sum(streaming) + staying)


# ---- Activations ----------------------------------------------------------------------------------------------------


def all_activations(config: RunConfig, buckets: Sequence[Bucket]) -> dict[Bucket, int]:
    """`activations` of each bucket. Of many only the largest and the smallest are rehearsed: it is linear in tokens."""
    ordered = sorted(buckets, key=lambda bucket: bucket.tokens)
    rehearse = ordered if len(ordered) <= 2 else [ordered[0], ordered[-1]]
    found = {bucket: activations(config, bucket) for bucket in rehearse}
    if len(found) == len(set(ordered)):
        return found
    low, high = rehearse
    slope = (found[high] - found[low]) / max(1, high.tokens - low.tokens)
    return {b: found[b] if b in found else round(found[low] + slope * (b.tokens - low.tokens)) for b in ordered}


def activations(config: RunConfig, bucket: Bucket) -> int:
    """The most bytes at a time, beside weights and adapters, of one micro-batch forward and backward."""
    return held(config, bucket).peak


def held(config: RunConfig, bucket: Bucket) -> Held:
    """What one micro-batch holds. A long row of equal blocks is rehearsed in short, since each takes the same."""
    residence = replace(config.engine.residence(), stream_blocks=0, experts="together", pinned=False, verified=False)
    depth = equal_blocks(config)
    if depth <= DEPTH + 1:
        return rehearsed_bytes(config, bucket, residence, ())
    short, longer = (rehearsed_bytes(config, bucket, residence, (count,)) for count in (DEPTH, DEPTH + 1))
    return short.further(longer, depth - DEPTH)


def rehearsed_bytes(config: RunConfig, bucket: Bucket, residence: Residence, depths: tuple[int, ...]) -> Held:
    """Follow the memory of one rehearsal."""
    precision = precision_of(config)
    stage = Stage(FULL[config.family.weight_dtype(precision)], precision, residence, depths)
    with rehearsed(config, bucket, stage) as rehearsal:
        live, inputs = LiveBytes(), rehearsal.engine.inputs
        for parameter in rehearsal.adapters.parameters(rehearsal.role).values():
            parameter.grad = torch.zeros_like(parameter)  # gradients are the adapter's own account
        if inputs is not None:
            inputs.host_memory = live.ignoring
        with live:
            loss = rehearsal.loss()
            kept = live.now
            loss.backward()
        return Held(kept, live.peak + (inputs.largest if inputs is not None else 0))


def equal_blocks(config: RunConfig) -> int:
    """How many blocks a network of one row of blocks has, all adapted alike; 0 for other networks."""
    family: ModelFamily = config.family
    network = family.skeleton()
    lists = block_lists(family, network)
    if len(lists) != 1:
        return 0
    (blocks,) = lists
    prefix = next(path for path, module in network.named_modules() if module is blocks)
    adapted = _adapted(target_report(config, network).paths, prefix)
    alike = {frozenset(adapted[str(number)]) for number in range(len(blocks))}
    return len(blocks) if len(alike) == 1 and _same_shapes(blocks) else 0


def _adapted(paths: Sequence[str], prefix: str) -> dict[str, set[str]]:
    """Adapted layers of each block, by its number."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if path.startswith(f"{prefix}."):
            number, _, rest = path.removeprefix(f"{prefix}.").partition(".")
            found[number].add(rest)
    return found


def _same_shapes(blocks: nn.ModuleList) -> bool:
    return len({tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks}) == 1
