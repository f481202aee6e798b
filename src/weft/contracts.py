"""The nouns of Weft: what a family, an adapter, an objective, an engine and a stream of data owe each other.

Letters in shapes: B batch, C channels, F frames, H height, W width, L text tokens, D width of a token,
N video tokens. Time t is in [0, 1]: 0 is data, 1 is noise.

A step is a list of phases; a phase is one backward pass under one role, and the optimizers that it moves, in order.
A role is a named adapter on one shared frozen base; the name None is the base itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.geometry import VideoGeometry

# ---- What travels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Tensors of B items under their names, and the key of each item (for incidents and data-order tests)."""

    tensors: Mapping[str, Tensor]
    keys: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Denoise:
    """One question to a denoiser. x: (B, C, F, H, W). t: (B,) in [0, 1], fp32. cond: what the family asks for.

    given: (B, F) bool, latent frames that are known: there x holds their data, and their own time is 0. expert: which
    network is asked, where a model has several.
    """

    x: Tensor
    t: Tensor
    cond: Mapping[str, Tensor]
    given: Tensor | None = None
    expert: str | None = None


@dataclass(frozen=True)
class Tokens:
    """One question to a text model. ids and mask: (B, L)."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Loss:
    """total: the loss SUMMED over items. metrics: further sums over items, by name; the loop divides by the count."""

    total: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Rng:
    """The chance of one micro-batch, seeded anew from (seed, step, micro-batch, rank): a resumed run draws the same.

    own: differs between ranks (noise, dropout). shared: equal on all ranks; anything that alters which network calls
    are made must come from it, or sharded engines wait for ever. draw: number of this micro-batch among its phase's,
    counted over all ranks since the run began, so that stratified draws go on across steps.
    """

    own: torch.Generator
    shared: torch.Generator
    seed: int
    draw: int


# ---- Model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """One network of a family, and the times [low, high] that it is asked at. Its adapter has its name."""

    name: str  # "default" where a model has one network; "high" and "low" in Wan 2.2 A14B
    times: tuple[float, float]


DEFAULT = Expert("default", (0.0, 1.0))  # PEFT's own name of a single adapter, so that files carry no name of ours

# (frozen tensor, number of its block or None, blocks of the network) -> the tensor where it lives while training.
Put = Callable[[Tensor, int | None, int], Tensor]


class Encoders(Protocol):
    """The frozen encoders around a video model; loaded for caching and sampling, never while training from a cache."""

    def latents(self, pixels: Tensor) -> Tensor:
        """Normalised posterior mean, fp32 (B, C, f, h, w), of pixels (B, 3, F, H, W) in [-1, 1]."""
        ...

    def given(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """What an image-to-video network is told of the first frame of pixels (B, 3, F, H, W) in [-1, 1], by name, each
        (B, ...); nothing for other models. Of the frames after the first only the number counts."""
        ...

    def pixels(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] of normalised latents."""
        ...

    def text(self, captions: Sequence[str]) -> list[Mapping[str, Tensor]]:
        """For each caption {"text": (L_i, D), ...}. Its text is cut to its real length, and padded when a batch is
        made; further tensors have one shape for all captions."""
        ...


class Adapters(Protocol):
    """The named adapters that stand on one network. Keys are canonical: `PATH.lora_A.weight` is (rank, in)."""

    names: tuple[str, ...]
    paths: tuple[str, ...]  # of the adapted modules, in the network's own order

    def parameters(self, name: str) -> dict[str, nn.Parameter]: ...
    def use(self, name: str | None) -> AbstractContextManager[None]: ...
    def state_dict(self, name: str) -> dict[str, Tensor]: ...
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in. Raises ModelError when keys or shapes differ, naming the first of each kind."""
        ...

    def after_step(self, name: str) -> Mapping[str, float]:
        """What must hold after each optimizer step (max-norm scaling); numbers worth logging."""
        ...


class ModelFamily(Protocol):
    """How one family of checkpoints is loaded, divided into blocks, and called.

    forward(Denoise) is always the velocity dx/dt = noise - data: a family converts what its network predicts.
    """

    @property
    def targets(self) -> Mapping[str, str]:
        """Named sets of linear layers, each a regex that is matched against whole module paths."""
        ...

    @property
    def aliases(self) -> Mapping[str, str | tuple[str, ...]]:
        """Other programs' names of layer suffixes -> this network's: {'self_attn.q': 'attn1.to_q', ...}."""
        ...

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that are trained."""
        ...

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The networks that a sample needs, noisiest first."""
        ...

    @property
    def image(self) -> Literal["none", "channels", "frames"]:
        """How the network is given a first frame: not at all, in further channels (always), as a clean latent frame."""
        ...

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network, cond["guidance"] (B,), in place of a second question."""
        ...

    def geometry(self) -> VideoGeometry: ...
    def skeleton(self, device: str = "meta") -> nn.Module:
        """The network without weights: names and shapes on the meta device, or on a device of fake tensors."""
        ...

    def conditions(self, items: int, frames: int, height: int, width: int) -> Mapping[str, Tensor]:
        """Conditions of the right shapes for latents (items, C, frames, height, width), without meaning: for estimates
        and benches."""
        ...

    def weight_dtype(self, precision: str) -> str:
        """fp32, bf16 or fp16: in which frozen weights lie in memory, or are decoded to, when the engine multiplies in
        precision."""
        ...

    def weight_bytes(self, precision: str) -> Mapping[int | None, int]:
        """Bytes of one network's frozen weights in memory by the number of their block; None: outside of blocks."""
        ...

    def load(self, precision: str, expert: str, put: Put) -> nn.Module:
        """The frozen network of an expert. Each tensor is read, cast or quantized, and put where it lives."""
        ...

    def encoders(self, device: torch.device, carry: Callable[[nn.Module], nn.Module]) -> Encoders:
        """The encoders, carried to the device by the engine's own way."""
        ...

    def sampler(self, steps: int, device: torch.device) -> Any:
        """A fresh diffusers scheduler as the source's own config asks for, its timesteps set as the model's own
        pipeline sets them."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Fingerprints of the weights: {'network': ..., 'latents': ..., 'text': ...}, without reading them whole."""
        ...

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]: ...
    def forward(self, call: Callable[..., Any], inputs: Denoise) -> Tensor: ...


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
        network = self.network
        if isinstance(network, nn.ModuleDict):
            assert inputs.expert is not None, f"which of {list(network)} is asked?"
            if self.ready is not None:
                self.ready(inputs.expert)
            network = network[inputs.expert]
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

    def measured(self, experts: Sequence[Expert]) -> tuple[tuple[str, float], ...]:
        """Each (name of an expert, time) that it is measured at."""
        ...

    def measure(self, model: Model, batch: Batch, expert: str, time: float, seed: int) -> Tensor:
        """Loss of each item, (B,) fp32, on noise fixed by (seed, item key) at one time; no gradient."""
        ...


class Engine(Protocol):
    """Where tensors live and how gradients meet. Contract: the gradient is SUMMED over ranks."""

    rank: int
    world: int
    device: torch.device
    precision: str  # fp32, bf16 or fp16, of the multiplications
    can: frozenset[str]

    def carry(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, checked on arrival where that was asked for."""
        ...

    def berth(self, number: int) -> Put:
        """Where the weights of a run's first, second, ... network go as they are read."""
        ...

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Make a network that was read into its berth ready to run: what else it holds, recomputation, streaming."""
        ...

    def alternate(self, networks: Mapping[str, nn.Module]) -> Callable[[str], None]:
        """Of several placed networks one is asked at a time; the call that is returned makes the named one ready."""
        ...

    def put(self, batch: Batch) -> Batch: ...
    def computing(self) -> AbstractContextManager[None]:
        """Mixed precision around a forward pass."""
        ...

    def total(self, value: Tensor) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, optimizer: Optimizer, max_norm: float) -> "Stepped": ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Stepped:
    """What became of an optimizer step. norm: of the gradient before clipping. moved: False when it was skipped.

    overflow: the skip was fp16 loss scaling at work (the scale is lowered and the run goes on), not a fault.
    """

    norm: float
    moved: bool
    overflow: bool = False


class Experience(Protocol):
    """One stretch of the data stream (a "task" in the continual-learning papers). Plain training has one."""

    @property
    def name(self) -> str: ...
    @property
    def last_step(self) -> int: ...
    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless micro-batches of one rank, from the start-th on. The order depends on the seed and start alone."""
        ...
