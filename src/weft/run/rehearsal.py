"""One forward and backward pass of a run's network and adapters on fake tensors: shapes, autograd and the engine's
recomputation are real, storage is not."""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from weft.adapters.attach import attach
from weft.adapters.named import NamedAdapters
from weft.contracts import Adapters, Denoise, Model, ModelFamily, Phase
from weft.engines.compiling import Compiler, Region
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.run.assemble import standings as standing_on
from weft.run.config import RunConfig
from weft.run.partitions import Accounts
from weft.run.questions import Shape, asked, phases_of
from weft.run.stand_ins import OneOfSequence, attend_without_masks, by_flash, multiply_on_hardware, rehearsable

PLAIN = Residence()


class Traced:
    """Blocks that are compiled in rehearsals, and the accounts of what they keep."""

    def __init__(self) -> None:
        self.accounts = Accounts()
        self.region = Region(Compiler(budget=1.0, backend=self.accounts), any_size=False)


@dataclass(frozen=True)
class Rehearsal:
    """A fake network under the roles of its first expert. loss(phase, n): of one micro-batch of the phase's n-th step,
    with its graph. It and its backward pass belong inside the phase's role."""

    adapters: Adapters
    engine: SingleEngine
    phases: tuple[Phase, ...]
    loss: Callable[[Phase, int], Tensor]
    known: "Known"


@dataclass(frozen=True)
class Stage:
    """How a rehearsal computes. kept: frozen weights as they are kept at that precision, some packed; else all in fp32.

    depths: blocks that are left of each list of blocks; empty: all. sequence: ranks that part the tokens, of which this
    is one. compiled: where blocks are; one region for all rehearsals of a shape, so that each block is traced once.
    """

    kept: bool = False
    precision: str = "fp32"
    residence: Residence = PLAIN
    depths: tuple[int, ...] = ()
    sequence: int = 1
    compiled: "Traced | None" = None


@contextmanager
def rehearsed(config: RunConfig, shape: Shape, stage: Stage) -> Iterator[Rehearsal]:
    """Inside, tensors are fake; they stand for the largest questions that the family is asked."""
    family = rehearsable(config.family)
    roles = config.objective.roles(family.experts[:1])
    network = family.skeleton("meta").requires_grad_(False)
    if stage.kept:
        family.dress(network, stage.precision)
        multiply_on_hardware(network)
    standings = standing_on(config, network, roles)
    for listed, depth in zip(block_lists(family, network), stage.depths, strict=False):
        del listed[depth:]
    there = {path for path, _ in network.named_modules()}
    shortened = {
        role: replace(standing, paths=[path for path in standing.paths if path in there])
        for role, standing in standings.items()
    }
    adapters = attach(network, shortened, 0)
    if by_flash(config.family):
        attend_without_masks(network)
    if stage.sequence > 1:
        family.divide(network, OneOfSequence(stage.sequence, config.parallel.sequence_method))
    own = torch.Generator()
    host = HostChance(own) if config.objective.parts else nullcontext()  # one question decides nothing on the host
    with FakeTensorMode(allow_non_fake_inputs=True), host:
        let_be_fake(network)
        engine = SingleEngine(torch.device("cpu"), stage.precision, stage.residence)
        if stage.compiled is not None:  # before what recomputes, as in `place`
            for block in family.blocks(network):
                stage.compiled.region.compile(block)
        engine.place(network, tuple(family.blocks(network))).train()
        known = Known()
        ask = asked(config, shape, AskedOnce(network, family, adapters=adapters, known=known), own)

        def loss(phase: Phase, done: int = 0) -> Tensor:
            with engine.computing():
                return ask(phase, done)

        yield Rehearsal(adapters, engine, phases_of(config), loss, known)


def block_lists(family: ModelFamily, network: nn.Module) -> list[nn.ModuleList]:
    """The lists of a network that hold its blocks, in order."""
    blocks = set(family.blocks(network))
    return [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) and blocks.issuperset(m)]


def let_be_fake(network: nn.Module) -> None:
    """Replace the parameters and buffers of a network on the meta device by fake ones on the cpu."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors in this dtype, for the time of the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEVICE = torch.ops.prim.device.default  # asked more often than all else, by every operator of fake tensors


def device_of(tensor: Tensor) -> torch.device:
    """What a fake tensor answers, without the way through all modes."""
    if isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation:
        return tensor.fake_device
    return DEVICE(tensor)


class HostChance(TorchDispatchMode):
    """Lets what an objective decides on the host be decided, where tensors are fake: what is drawn by any generator but
    the micro-batch's own, and what is computed of such draws alone, is real."""

    def __init__(self, own: torch.Generator) -> None:
        super().__init__()
        self._own = own

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return device_of(args[0])
        options = kwargs or {}
        if options.get("generator") is None and any(isinstance(each, FakeTensor) for each in args):
            return func(*args, **options)  # nearly all that a network does
        found = leaves((args, options))
        tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
        drawn = any(isinstance(leaf, torch.Generator) and leaf is not self._own for leaf in found)
        if not drawn and (not tensors or any(isinstance(tensor, FakeTensor) for tensor in tensors)):
            return func(*args, **options)
        with unset_fake_temporarily():
            return func(*args, **options)


def leaves(values: Any) -> list[Any]:
    """What stands in an operator's nested arguments or answers, in no order; quicker than a tree of any kind."""
    found, waiting = [], [values]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (list, tuple)):
            waiting.extend(each)
        elif isinstance(each, dict):
            waiting.extend(each.values())
        else:
            found.append(each)
    return found


SCRATCH = {torch.ops.aten.logsumexp.default}  # operators that copy their input inside: exp(x - max x)


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operators take, real or fake, from its making until nothing refers to it any more; of
    what they take only while they run, that of SCRATCH."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._ignoring = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Blocks may be compiled meanwhile: what they do is counted, and not what the compiler does."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return device_of(args[0])
        if func in SCRATCH and not self._ignoring:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        out = func(*args, **(kwargs or {}))
        if not self._ignoring:
            storages = [leaf.untyped_storage() for leaf in leaves(out) if isinstance(leaf, Tensor)]
            if fresh := [each for each in storages if each._cdata not in self._known]:
                given = {leaf.untyped_storage()._cdata for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)}
                for storage in fresh:
                    if storage._cdata not in given:
                        self._see(storage)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        before, self._ignoring = self._ignoring, True
        try:
            yield
        finally:
            self._ignoring = before


@dataclass(frozen=True)
class Taken:
    """What a question without a graph takes: bytes at its peak, and the place of its answer in the answer's storage."""

    peak: int
    numbers: int
    dtype: torch.dtype
    place: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset

    def again(self, live: LiveBytes) -> Tensor:
        """An answer, and the account of what it took."""
        live.peak = max(live.peak, live.now + self.peak)
        return torch.empty(self.numbers, dtype=self.dtype).as_strided(*self.place)


@dataclass
class Known:
    """The questions of a phase that were asked without a graph. live: counts the phase's memory; None: nothing does."""

    live: LiveBytes | None = None
    questions: dict[Hashable, Taken] = field(default_factory=dict)

    @contextmanager
    def during(self, live: LiveBytes) -> Iterator[None]:
        """The questions of one phase alone: what it keeps on the way, such as weights that autocast has cast, is its
        own."""
        self.live, self.questions = live, {}
        try:
            yield
        finally:
            self.live, self.questions = None, {}


@dataclass(frozen=True, kw_only=True)
class AskedOnce(Model):
    """A model that is asked each question without a graph once, while memory is counted: a rollout and a guided teacher
    repeat theirs, and a question of the same shapes takes the same each time."""

    adapters: NamedAdapters
    known: Known

    def velocity(self, inputs: Denoise) -> Tensor:
        live = self.known.live
        if live is None or torch.is_grad_enabled():
            return super().velocity(inputs)
        question = (self.adapters.in_use, inputs.expert, *map(shape_of, (inputs.x, inputs.t, inputs.given)),
                    *((name, shape_of(tensor)) for name, tensor in sorted(inputs.cond.items())))  # fmt: skip
        if question in self.known.questions:
            return self.known.questions[question].again(live)
        before, peak, live.peak = live.now, live.peak, live.now
        answer = super().velocity(inputs)
        storage = answer.untyped_storage().nbytes()
        stays = live.now - before - storage  # made once, and there the next time
        place = (tuple(answer.shape), answer.stride(), int(answer.storage_offset()))
        taken = Taken(live.peak - before - stays, storage // answer.element_size(), answer.dtype, place)
        self.known.questions[question] = taken
        live.peak = max(peak, live.peak)
        return answer


def shape_of(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)
