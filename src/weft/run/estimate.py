"""How much device memory a run will take, counted on fake tensors: the real network, adapters, autograd and engine run
with shapes but without storage, and the memory that they would hold at a time is followed through one step."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from weft.contracts import ModelFamily, Phase
from weft.engines.parallel import Layout
from weft.engines.residency import memory_of
from weft.engines.single_device import DTYPES, best_device, best_precision
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.questions import Shape
from weft.run.rehearsal import LiveBytes, Rehearsal, Stage, block_lists, rehearsed
from weft.run.shares import ALONE, adapter_bytes, weights_of

FIXED = 0.6 * 2**30  # bytes: context of the device and the workspaces of its libraries, on CUDA
FULL = {**DTYPES, "fp32": torch.float32}
DEPTH = 2  # blocks of a network of equal blocks that are rehearsed, and one more, to know what each further one takes


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device of one process in one training step of one shape, and what waits in host memory."""

    weights: int
    adapter: int  # fp32 weights, gradients, optimizer state, moving average
    activations: int
    fixed: int
    host: int = 0  # frozen weights that wait for their turn, moments that are kept there

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
    config: RunConfig,
    shapes: Sequence[Shape],
    trained: Mapping[str, int],
    card: Card | None = None,
    layout: Layout = ALONE,
) -> dict[Shape, Estimate]:
    """An estimate for each shape at the config's batch size, of one process of a layout. trained: parameters of each
    role. card: that the run is planned for, if not this machine's.

    Raises ConfigError when more blocks are to be streamed than there are.
    """
    card = card or card_of(config)
    found = all_activations(config, shapes, layout.sequence)
    return {shape: composed(config, found[shape], trained, card, layout) for shape in shapes}


def composed(
    config: RunConfig, activations: int, trained: Mapping[str, int], card: Card, layout: Layout = ALONE
) -> Estimate:
    """The whole from what is already known of a step's activations."""
    by_block = config.family.weight_bytes(precision_of(config))
    weights, waiting = weights_of(config, by_block, card.memory, layout)
    adapter, moments = adapter_bytes(config, trained, layout)
    return Estimate(weights, adapter, activations, int(FIXED) if card.gpu else 0, waiting + moments)


# ---- Activations ----------------------------------------------------------------------------------------------------


def all_activations(config: RunConfig, shapes: Sequence[Shape], sequence: int = 1) -> dict[Shape, int]:
    """`activations` of each shape. Of many only the largest and the smallest are rehearsed: it is linear in tokens."""
    ordered = sorted(shapes, key=lambda shape: shape.tokens)
    rehearse = ordered if len(ordered) <= 2 else [ordered[0], ordered[-1]]
    found = {shape: activations(config, shape, sequence) for shape in rehearse}
    if len(found) == len(set(ordered)):
        return found
    low, high = rehearse
    slope = (found[high] - found[low]) / max(1, high.tokens - low.tokens)
    return {b: found[b] if b in found else round(found[low] + slope * (b.tokens - low.tokens)) for b in ordered}


def activations(config: RunConfig, shape: Shape, sequence: int = 1) -> int:
    """The most bytes at a time, beside weights and adapters, of one micro-batch forward and backward, on one of the
    ranks that part its tokens."""
    return held(config, shape, sequence).peak


def held(config: RunConfig, shape: Shape, sequence: int = 1) -> Held:
    """What one micro-batch holds, in the phase that holds most."""
    return max(held_by_phase(config, shape, sequence).values(), key=lambda each: each.peak)


def held_by_phase(config: RunConfig, shape: Shape, sequence: int = 1) -> dict[str, Held]:
    """What one micro-batch of each phase holds. A long row of equal blocks is rehearsed in short, since each takes the
    same."""
    residence = replace(config.engine.residence(), stream_blocks=0, experts="together", pinned=False, verified=False)
    depth = equal_blocks(config)
    precision = precision_of(config)
    stage = Stage(FULL[config.family.weight_dtype(precision)], precision, residence, (), sequence)
    if depth <= 2 * DEPTH:  # as many as in short, or fewer
        return rehearsed_bytes(config, shape, stage)
    short, longer = (rehearsed_bytes(config, shape, replace(stage, depths=(n,))) for n in (DEPTH, DEPTH + 1))
    return {phase: short[phase].further(longer[phase], depth - DEPTH) for phase in short}


def rehearsed_bytes(config: RunConfig, shape: Shape, stage: Stage) -> dict[str, Held]:
    """Follow the memory of one rehearsal, phase by phase."""
    with rehearsed(config, shape, stage) as rehearsal:
        return {phase.name: followed(rehearsal, phase) for phase in rehearsal.phases}


def followed(rehearsal: Rehearsal, phase: Phase) -> Held:
    """Follow the memory of one phase."""
    live, inputs = LiveBytes(), rehearsal.engine.inputs
    trained = rehearsal.adapters.parameters(phase.role).values()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # gradients are the adapter's own account
    if inputs is not None:
        inputs.host_memory = live.ignoring
    with rehearsal.known.during(live), rehearsal.adapters.use(phase.role), live:
        loss = rehearsal.loss(phase, 0)
        kept = live.now
        loss.backward()
    for parameter in trained:
        parameter.grad = None
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
    roles = config.objective.roles(family.experts[:1])
    adapted = [_adapted(target_report(config, network, role).paths, prefix) for role in roles]
    alike = {tuple(frozenset(own[str(number)]) for own in adapted) for number in range(len(blocks))}
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
