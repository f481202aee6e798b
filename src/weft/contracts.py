"""The nouns of Weft: what a family, an adapter, an objective, an engine and a stream of data owe each other.

Letters in shapes: B batch (of text: rows), C channels, F frames, H height, W width, L text tokens, D width of a token,
N video tokens. Time t is in [0, 1]: 0 is data, 1 is noise.

A step is a list of phases; a phase is one backward pass under one role, and the optimizers that it moves, in order.
A role is a named adapter on one shared frozen base; the name None is the base itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.few_steps import StepList
from weft.models import (  # noqa: F401  # all nouns are found here; a model's own stand in a file for themselves
    DEFAULT,
    Berth,
    EncoderFamily,
    Encoders,
    Expert,
    ModelFamily,
    Put,
    Read,
    SequenceGroup,
    TextFamily,
    VideoFamily,
    as_encoder,
    as_text,
    as_video,
    at_once,
    stay,
)
from weft.travels import UNLEARNED, Batch, Denoise, Documents, Loss, Rng, Tokens  # noqa: F401

# ---- Model --------------------------------------------------------------------------------------------------------


class Adapters(Protocol):
    """The named adapters that stand on one network. Keys are canonical: `PATH.lora_A.weight` is (rank, in)."""

    names: tuple[str, ...]
    paths: tuple[str, ...]  # of the modules that the first one adapts, in the network's own order

    def paths_of(self, name: str) -> tuple[str, ...]:
        """Of the modules that an adapter changes: each may have a recipe of its own."""
        ...

    def base_layer(self, name: str, path: str) -> nn.Module:
        """The frozen layer under one of them."""
        ...

    def whole(self, name: str) -> tuple[str, ...]:
        """Paths of the modules that are trained whole beside an adapter: a tensor of theirs is called PATH.KEY."""
        ...

    def initialize(self) -> None:
        """First values, once the network stands where it trains. They depend on the seed, the adapter's name and the
        layer's path alone; of a sharded tensor each rank keeps its part."""
        ...

    def parameters(self, name: str) -> dict[str, nn.Parameter]: ...
    def fixed(self, name: str) -> dict[str, Tensor]:
        """What belongs to an adapter and is not trained: PiSSA's first factors."""
        ...

    def use(self, name: str | None) -> AbstractContextManager[None]: ...
    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Whole tensors. Where parameters are sharded every rank must ask."""
        ...

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy whole tensors in. Raises ModelError when keys or shapes differ, naming the first of each kind."""
        ...

    def after_step(self, name: str, moved: Tensor | None = None) -> Mapping[str, Tensor]:
        """What must hold after each optimizer step (max-norm scaling); numbers () worth logging, on the device. moved:
        () bool, whether the step moved anything; when not, nothing is changed here either. None: it did."""
        ...


class AdapterMethod(Protocol):
    """A recipe for adapters. Backends meet here: each attaches, all return Adapters."""

    def attach(self, network: nn.Module, paths: Sequence[str], names: Sequence[str], seed: int) -> Adapters: ...


@dataclass(frozen=True)
class Model:
    """A network, how to call it, and the adapters on it. weights stand in for parameters (La-MAML's fast weights)."""

    network: nn.Module  # of one expert; of several an nn.ModuleDict that holds them under their names
    family: ModelFamily
    adapters: Adapters
    weights: Mapping[str, Tensor] | None = None
    ready: Callable[[str], None] | None = None  # brings the named expert to the device, where it may be elsewhere

    def velocity(self, inputs: Denoise) -> Tensor:
        """dx/dt (B, C, F, H, W) under the adapter in use."""
        return self._ask(inputs, inputs.expert)

    def losses(self, inputs: Tokens) -> Tensor:
        """Negative log-likelihood (B, L) fp32 of each label under the adapter in use, 0 where nothing is learned."""
        return self._ask(inputs, None)

    def logits(self, inputs: Documents) -> Tensor:
        """What is answered of each class (B, classes) under the adapter in use, fp32 or wider."""
        return self._ask(inputs, None)

    def _ask(self, inputs: Denoise | Tokens | Documents, expert: str | None) -> Tensor:
        network = self.network
        if isinstance(network, nn.ModuleDict):
            assert expert is not None, f"which of {list(network)} is asked?"
            if self.ready is not None:
                self.ready(expert)
            network = network[expert]
        if self.weights is None:
            return self.family.forward(network, inputs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(network, dict(self.weights or {}), args, kwargs)

        return self.family.forward(call, inputs)


# ---- Learning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One backward pass of a training step, and the optimizers that it moves, in order."""

    name: str
    role: str  # the adapter in use, forward and backward
    optimizers: tuple[str, ...]


class State(Protocol):
    """What an objective carries from step to step; the checkpoint saves it unseen."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NoState:
    """For objectives that carry nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"this objective keeps no state, but the checkpoint has {sorted(state)}"


BuildOptimizer = Callable[[str, Mapping[str, nn.Parameter]], Optimizer]


class Objective(Protocol):
    """What is learned from a batch. Frozen, and it knows no device, no rank, no file and no clock."""

    def roles(self, experts: Sequence[Expert]) -> tuple[str, ...]:
        """The adapters that it trains."""
        ...

    def shown(self, experts: Sequence[Expert]) -> tuple[str, ...]:
        """Of these the ones that are exported, measured and sampled: one for each expert, in their order."""
        ...

    def check(self, family: ModelFamily) -> None:
        """Raises ConfigError for what does not go with the family."""
        ...

    @property
    def texts(self) -> Mapping[str, str]:
        """Name -> text that every batch tells beside its captions: its encodings are NAME/text, ..., each (1, ...)."""
        ...

    @property
    def needs(self) -> frozenset[str]: ...
    def init(self, model: Model) -> State: ...
    def optimizers(self, model: Model, state: State, build: BuildOptimizer) -> dict[str, Optimizer]: ...
    def phases(self, step: int, experts: Sequence[Expert]) -> tuple[Phase, ...]: ...
    def count(self, batch: Batch) -> int:
        """Items (samples, tokens) that the loss is summed over."""
        ...

    def loss(self, phase: str, model: Model, batch: Batch, state: State, rng: Rng) -> Loss: ...


@runtime_checkable
class Validated(Protocol):
    """An objective that can be measured without chance: same noise, same times, whenever it is asked."""

    def measured(self, experts: Sequence[Expert]) -> tuple[tuple[str, float | None], ...]:
        """Each (name of an expert, time) that it is measured at; one without a time where times mean nothing."""
        ...

    def measure(self, model: Model, batch: Batch, expert: str, time: float | None, seed: int) -> Tensor:
        """Mean loss of each item, (B,) fp32, on noise fixed by (seed, item key) at one time; no gradient."""
        ...

    def weights(self, batch: Batch) -> Tensor:
        """How much each item counts in a mean, (B,): 1 for clips, of text the number of learned tokens."""
        ...


@runtime_checkable
class Drawn(Protocol):
    """An objective whose chance can be drawn beforehand. What follows is the same operators for tensors of the same
    names and shapes, so that it may be recorded once and replayed; `loss` is the one after the other."""

    def draws(self, phase: str, model: Model, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """All that is drawn for a micro-batch, on its device."""
        ...

    def loss_of(self, phase: str, model: Model, batch: Batch, drawn: Mapping[str, Tensor]) -> Loss:
        """The loss, given what was drawn. Reads no tensor's numbers on the host."""
        ...


@runtime_checkable
class Distilled(Protocol):
    """An objective whose student is sampled in a few steps of its own."""

    def step_list(self, family: ModelFamily) -> StepList:
        """The times at which the student is asked."""
        ...

    @property
    def teaching(self) -> str:
        """What its teacher is asked with, for a plan."""
        ...

    def needs_clips(self, family: ModelFamily) -> str | None:
        """Why captions alone are not enough to train on; None when they are."""
        ...


T = TypeVar("T")


class Engine(Protocol):
    """Where tensors live and how gradients meet. Contract: the gradient is SUMMED over ranks."""

    rank: int
    world: int  # of all processes
    data_rank: int
    data_world: int  # of those that read different data; the ranks of a sequence group have one data_rank
    sequence: SequenceGroup | None
    device: torch.device
    precision: str  # fp32, bf16 or fp16, of the multiplications
    can: frozenset[str]

    def carry(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, checked on arrival where that was asked for."""
        ...

    def berth(self, number: int) -> Berth:
        """Where the weights of a run's first, second, ... network go as they are read."""
        ...

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Make a network that was read into its berth ready to run: what else it holds, recomputation, streaming,
        sharding. Its adapters are attached and have no values yet."""
        ...

    def alternate(self, networks: Mapping[str, nn.Module]) -> Callable[[str], None]:
        """Of several placed networks one is asked at a time; the call that is returned makes the named one ready."""
        ...

    def own(self, network: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Optimizer]:
        """The optimizers that the loop moves, once they are built: the same ones unless the engine has its own."""
        ...

    def put(self, batch: Batch) -> Batch:
        """The batch on the device, with half precision widened to fp32: what a cache keeps so keeps its value."""
        ...

    def feeding(self, feed: Iterator[Batch], count: Callable[[Batch], int]) -> Iterator[tuple[Batch, int]]:
        """A feed's batches on the device, the next one on its way meanwhile, each with its count made on the host."""
        ...

    def host_memory(self, size: int) -> Tensor:
        """So many bytes of the kind that the device copies from fastest, (n,) uint8."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Mixed precision around a forward pass."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """The sum over the data ranks. Every rank must ask."""
        ...

    def agreed(self, value: T) -> T:
        """What rank 0 says, plain data. Every rank must ask."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def backward(self, loss: Tensor, *, last: bool, optimizers: Sequence[str] = ()) -> None:
        """Gradients of a micro-batch; last: of a step. optimizers: names of those that the phase moves; (): all."""
        ...

    def step(self, optimizer: Optimizer, max_norm: float) -> "Stepped": ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None:
        """Leave the group of processes."""
        ...


@dataclass(frozen=True)
class Stepped:
    """What became of an optimizer step, on the device: whoever reads it waits for the step.

    norm: () fp32, of the gradient before clipping. moved: () bool, False when the step was skipped. scaled: a skip is
    fp16 loss scaling at work (the scale is lowered and the run goes on), not a fault.
    """

    norm: Tensor
    moved: Tensor
    scaled: bool = False


class Experience(Protocol):
    """One stretch of the data stream (a "task" in the continual-learning papers). Plain training has one."""

    @property
    def name(self) -> str: ...
    @property
    def last_step(self) -> int: ...
    @property
    def epoch_draws(self) -> int | None:
        """Micro-batches of all ranks in one epoch; None where that is not known beforehand."""
        ...

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless micro-batches of one of `world` ranks: of all draws of the run those of numbers start + rank,
        start + rank + world, ... What a draw holds depends on the seed and its number alone."""
        ...

    def position(self, drawn: int) -> dict[str, Any]:
        """Plain data with which another process begins at draw `drawn` without reading what came before."""
        ...

    def resume_at(self, position: Mapping[str, Any]) -> None:
        """Take a position that was saved."""
        ...
