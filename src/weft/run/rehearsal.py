"""One forward and backward pass of a run's network and adapters on fake tensors: shapes, autograd and the engine's
recomputation are real, storage is not."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.contracts import Adapters, Model, ModelFamily
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.questions import Shape, answered, question
from weft.run.stand_ins import OneOfSequence, attend_without_masks, by_flash, rehearsable

PLAIN = Residence()


@dataclass(frozen=True)
class Rehearsal:
    """A fake network under its first role. loss(): of one micro-batch, with its graph."""

    network: nn.Module
    blocks: tuple[nn.Module, ...]
    adapters: Adapters
    role: str
    engine: SingleEngine
    loss: Callable[[], Tensor]


@dataclass(frozen=True)
class Stage:
    """How a rehearsal computes. weights: the dtype in which frozen weights are kept, or to which they are decoded.

    depths: blocks that are left of each list of blocks; empty: all. sequence: ranks that part the tokens, of which this
    is one.
    """

    weights: torch.dtype
    precision: str = "fp32"
    residence: Residence = PLAIN
    depths: tuple[int, ...] = ()
    sequence: int = 1


@contextmanager
def rehearsed(config: RunConfig, shape: Shape, stage: Stage) -> Iterator[Rehearsal]:
    """Inside, tensors are fake; they stand for the largest questions that the family is asked."""
    family = rehearsable(config.family)
    role = config.objective.roles(family.experts[:1])[0]
    with default_dtype(stage.weights):
        network = family.skeleton("meta").requires_grad_(False)
    paths = target_report(config, network).paths
    for listed, depth in zip(block_lists(family, network), stage.depths, strict=False):
        del listed[depth:]
    there = {path for path, _ in network.named_modules()}
    adapters = config.adapter.attach(network, [path for path in paths if path in there], (role,), 0)
    if by_flash(config.family):
        attend_without_masks(network)
    if stage.sequence > 1:
        family.divide(network, OneOfSequence(stage.sequence, config.parallel.sequence_method))
    with FakeTensorMode():
        let_be_fake(network)
        engine = SingleEngine(torch.device("cpu"), stage.precision, stage.residence)
        blocks = tuple(family.blocks(network))
        engine.place(network, blocks).train()
        asked, model = question(config, shape), Model(network, family, adapters)

        def loss() -> Tensor:
            with engine.computing():
                return answered(model, asked)

        with adapters.use(role):
            yield Rehearsal(network, blocks, adapters, role, engine, loss)


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


SCRATCH = {torch.ops.aten.logsumexp.default}  # operators that copy their input inside: exp(x - max x)


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operators take, real or fake, from its making until nothing refers to it any more; of
    what they take only while they run, that of SCRATCH."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._ignoring = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SCRATCH and not self._ignoring:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if self._ignoring or key in self._known:
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
