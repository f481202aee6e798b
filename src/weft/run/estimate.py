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
from weft.engines.single_device import best_device, best_precision
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.partitions import Accounts, Parted
from weft.run.questions import Shape
from weft.run.rehearsal import LiveBytes, Rehearsal, Stage, Traced, block_lists, rehearsed
from weft.run.shares import ALONE, adapter_bytes, weights_of

FIXED = 0.6 * 2**30  # bytes: context of the device and the workspaces of its libraries, on CUDA
TWO = 2  # blocks of which something is on the device where what they keep is sent away: see engines/activations.py
DEPTH = 2  # blocks of a network of equal blocks that are rehearsed, and one more, to know what each further one takes


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device of one process in one training step of one shape, and what waits in host memory."""

    weights: int
    adapter: int  # fp32 weights, gradients, optimizer state, moving average
    activations: int
    fixed: int
    host: int = 0  # weights that wait for their turn, moments that are kept there, what the backward pass is to read

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
    """Bytes beside the weights: kept for the backward pass, and the most at a time in both passes. host: waiting there
    between the passes."""

    kept: int
    peak: int
    host: int = 0

    def further(self, other: "Held", times: float) -> "Held":
        """This, and so many times what the other has more."""
        pairs = ((self.kept, other.kept), (self.peak, other.peak), (self.host, other.host))
        return Held(*(round(a + times * (b - a)) for a, b in pairs))


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal of one phase held. blocks: of compiled ones each graph, and how often it ran forward. away: what
    they keep waits in host memory."""

    held: Held
    blocks: tuple[tuple[Parted, int], ...] = ()
    away: bool = False

    def at(self, budget: float) -> Held:
        """What it would have held under a memory budget; it was rehearsed under that of 1."""
        less = [(parted.saved(1.0) - parted.saved(budget), runs) for parted, runs in self.blocks]
        spared = sum(each * runs for each, runs in less)
        # In the backward pass one block at a time has again all that it would have kept.
        again = max((each for each, runs in less if runs), default=0)
        sent = min(spared, self.held.host) if self.away else 0
        here = spared - sent + min(sent, TWO * again)
        return Held(self.held.kept - here, self.held.peak - here + again, self.held.host - sent)


@dataclass(frozen=True)
class Rehearsals:
    """A phase rehearsed in short, and where blocks are equal, with one of them more, and how many further there are."""

    short: Rehearsed
    longer: Rehearsed | None = None
    further: int = 0

    def at(self, budget: float) -> Held:
        """What the whole network holds under a memory budget of its compiled blocks."""
        short = self.short.at(budget)
        return short if self.longer is None else short.further(self.longer.at(budget), self.further)


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
    found = all_held(config, shapes, layout.sequence)
    return {shape: composed(config, found[shape], trained, card, layout) for shape in shapes}


def composed(config: RunConfig, step: Held, trained: Mapping[str, int], card: Card, layout: Layout = ALONE) -> Estimate:
    """The whole from what is already known of a step."""
    by_block = config.family.weight_bytes(precision_of(config))
    weights, waiting = weights_of(config, by_block, card.memory, layout)
    adapter, moments = adapter_bytes(config, trained, layout)
    host = waiting + moments + step.host
    return Estimate(weights, adapter, step.peak, int(FIXED) if card.gpu else 0, host)


# ---- Activations ----------------------------------------------------------------------------------------------------


def all_held(config: RunConfig, shapes: Sequence[Shape], sequence: int = 1) -> dict[Shape, Held]:
    """What a micro-batch of each shape holds. Of many only the largest and the smallest are rehearsed: all is linear in
    tokens."""
    ordered = sorted(shapes, key=lambda shape: shape.tokens)
    rehearse = ordered if len(ordered) <= 2 else [ordered[0], ordered[-1]]
    found = {shape: held(config, shape, sequence) for shape in rehearse}
    if len(found) == len(set(ordered)):
        return found
    low, high = rehearse
    span = max(1, high.tokens - low.tokens)
    return {b: found.get(b) or found[low].further(found[high], (b.tokens - low.tokens) / span) for b in ordered}


def activations(config: RunConfig, shape: Shape, sequence: int = 1) -> int:
    """The most bytes at a time, beside weights and adapters, of one micro-batch forward and backward, on one of the
    ranks that part its tokens."""
    return held(config, shape, sequence).peak


def held(config: RunConfig, shape: Shape, sequence: int = 1) -> Held:
    """What one micro-batch holds, in the phase that holds most."""
    return max(held_by_phase(config, shape, sequence).values(), key=lambda each: each.peak)


def held_by_phase(config: RunConfig, shape: Shape, sequence: int = 1) -> dict[str, Held]:
    """What one micro-batch of each phase holds, under the config's own memory budget."""
    found, budget = rehearsals(config, shape, sequence), budget_of(config)
    return {phase: each.at(budget) for phase, each in found.items()}


def budget_of(config: RunConfig) -> float:
    """The memory budget of compiled blocks, where it is a number already."""
    budget = config.engine.activation_budget
    return budget if isinstance(budget, float) else 1.0


def most_at(found: Mapping[str, Rehearsals], budget: float) -> Held:
    """What the phase holds that holds most."""
    return max((each.at(budget) for each in found.values()), key=lambda each: each.peak)


def more_at(found: Mapping[str, Rehearsals], budget: float) -> float:
    """The share of matrix products and attention that a block computes again, where it computes most again."""
    graphs = (parted for each in found.values() for parted, runs in each.short.blocks if runs)
    return max((parted.more(budget) for parted in graphs), default=0.0)


def again_of(found: Mapping[str, Rehearsals]) -> float:
    """The same share of what selective recomputation computes again."""
    graphs = (parted for each in found.values() for parted, runs in each.short.blocks if runs)
    return max((parted.again() for parted in graphs), default=0.0)


def rehearsals(config: RunConfig, shape: Shape, sequence: int = 1) -> dict[str, Rehearsals]:
    """One micro-batch of each phase. A long row of equal blocks is rehearsed in short, since each takes the same."""
    residence = replace(config.engine.residence(), stream_blocks=0, experts="together", pinned=False, verified=False)
    depth = equal_blocks(config)
    precision = precision_of(config)
    traced = Traced() if config.engine.compile is True else None
    stage = Stage(True, precision, residence, (), sequence, traced)
    if depth <= 2 * DEPTH:  # as many as in short, or fewer
        return {phase: Rehearsals(each) for phase, each in rehearsed_bytes(config, shape, stage).items()}
    short, longer = (rehearsed_bytes(config, shape, replace(stage, depths=(n,))) for n in (DEPTH, DEPTH + 1))
    return {phase: Rehearsals(short[phase], longer[phase], depth - DEPTH) for phase in short}


def rehearsed_bytes(config: RunConfig, shape: Shape, stage: Stage) -> dict[str, Rehearsed]:
    """Follow the memory of one rehearsal, phase by phase."""
    accounts = None if stage.compiled is None else stage.compiled.accounts
    with rehearsed(config, shape, stage) as rehearsal:
        return {phase.name: followed(rehearsal, phase, accounts) for phase in rehearsal.phases}


def followed(rehearsal: Rehearsal, phase: Phase, accounts: Accounts | None = None) -> Rehearsed:
    """Follow the memory of one phase."""
    live, inputs = LiveBytes(), rehearsal.engine.inputs
    sent = 0 if inputs is None else inputs.moved
    if accounts is not None:
        accounts.begin()
        accounts.ignoring = live.ignoring
    trained = rehearsal.adapters.parameters(phase.role).values()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # gradients are the adapter's own account
    away = rehearsal.engine.activations
    for sender in (inputs, away):
        if sender is not None:
            sender.host_memory = live.ignoring
    with rehearsal.known.during(live), rehearsal.adapters.use(phase.role), live:
        loss = rehearsal.loss(phase, 0)
        kept = live.now
        host = (0 if inputs is None else inputs.moved - sent) + (0 if away is None else away.pool.used)
        # Recomputed, what a block keeps is gone before the next but one runs, whatever it is.
        gone = accounts is None or rehearsal.engine.residence.recompute
        blocks = () if accounts is None or gone else tuple((each, each.runs) for each in accounts.parted)
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    ahead = 0 if inputs is None else inputs.largest  # on a GPU one input comes back before its time
    return Rehearsed(Held(kept, live.peak + ahead, host), blocks, away is not None)


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
