"""The work of a training step recorded once for each shape, and replayed: one launch in place of thousands.

The functions here know nothing of a step; they are given tensors by name and the work that is done on them. What was
recorded reads its inputs from places of its own, so a replay copies them there first; what it answers lies in places
that the next replay writes over. Nothing is read on the host.

`OnCuda` has never run: no GPU was at hand. Its seam, and all around it, runs on a CPU by `OnHost`.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_float
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

WARM_UP = 2  # true steps of each shape before it is recorded: they build optimizer states, plans and compiled code
MOST = 16  # recordings of a run: each keeps its own inputs and answers, and all of them one shared pool
Outputs = TypeVar("Outputs", bound=Mapping[Any, Tensor])
Key = TypeVar("Key", bound=Hashable)


class Recorder(Protocol):
    """How work is recorded on a kind of device."""

    def capture(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """What does the same again, on the same tensors. Nothing is computed by the recording itself. Raises
        RuntimeError for what cannot be recorded."""
        ...

    def chance(self) -> object:
        """Where the device's global generators stand: equal before and after work that draws from none of them."""
        ...


class OnHost:
    """Runs the work again, operator by operator: what a recording is, where the device knows none."""

    def capture(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return run

    def chance(self) -> object:
        return torch.get_rng_state().numpy().tobytes()


class OnCuda:
    """CUDA graphs in one memory pool: a replay needs its memory only while it lasts, and they never overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Reader threads pin memory and copy meanwhile; only this thread's own calls are held to the rules.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    def chance(self) -> object:
        number = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator = torch.cuda.default_generators[number]
        return (generator.initial_seed(), generator.get_offset(), torch.get_rng_state().numpy().tobytes())


@dataclass(frozen=True)
class Recording:
    """Work on inputs at fixed places. rates: of the learning rates, () each, by optimizer and group. home: where the
    weights lay when it was made."""

    inputs: Mapping[Any, Tensor]
    optimizers: Sequence[Optimizer]
    rates: Sequence[Sequence[Tensor]]
    run: Callable[[], Mapping[Any, Tensor]]
    home: tuple[int, ...]

    def replay(self, inputs: Mapping[Any, Tensor]) -> Mapping[Any, Tensor]:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        with on_device(self.optimizers, self.rates):
            outputs = self.run()
        # The weights have moved behind torch's back; whoever keeps casts of them by their version must see it.
        torch.autograd.graph.increment_version(parameters_of(self.optimizers))
        return outputs


def parameters_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def home_of(optimizers: Sequence[Optimizer]) -> tuple[int, ...]:
    """Where the weights lie that are moved, by the first of each group: they are laid and loaded together."""
    return tuple(group["params"][0].data_ptr() for optimizer in optimizers for group in optimizer.param_groups)


@dataclass
class Graphs:
    """The recordings of a run, by name and by the shapes of their inputs. tell: hears why one could not be made, when
    its work is launched operator by operator as before."""

    recorder: Recorder
    device: torch.device
    tell: Callable[[str], None]
    _recordings: dict[Hashable, Recording] = field(default_factory=dict)
    _warm: dict[Hashable, int] = field(default_factory=dict)
    _eager: set[Hashable] = field(default_factory=set)
    replays: int = 0

    def rate(self, value: float) -> float:
        """A learning rate as a recording takes it: on a GPU fp32, in steps that are not replayed too, so that it
        does not matter which are."""
        return value if self.device.type == "cpu" else c_float(value).value

    def run(
        self,
        name: str,
        inputs: Mapping[Key, Tensor],
        optimizers: Sequence[Optimizer],
        work: Callable[[Mapping[Key, Tensor]], Outputs],
    ) -> Outputs:
        """Do the work: the first times as it stands, then from a recording. It answers with tensors of no graph, which
        are to be read or copied before the next call."""
        key = (name, *((each, tuple(t.shape), t.dtype) for each, t in inputs.items()))
        recording = self._recordings.get(key)
        if recording is not None and recording.home != home_of(optimizers):
            self._recordings.pop(key)  # somebody has laid the weights elsewhere since
        if key not in self._recordings and key not in self._eager:
            if self._warm.get(key, 0) < WARM_UP:
                return self._watched(name, key, inputs, work)
            self._record(name, key, inputs, optimizers, work)
        if key not in self._recordings:
            return work(inputs)
        self.replays += 1
        return self._recordings[key].replay(inputs)  # type: ignore[return-value]

    def _watched(self, name: str, key: Hashable, inputs: Mapping[Key, Tensor], work: Callable[..., Outputs]) -> Outputs:
        """Work before it is recorded: it must not draw from global generators, which a recording would not."""
        self._warm[key] = self._warm.get(key, 0) + 1
        before = self.recorder.chance()
        outputs = work(inputs)
        if self.recorder.chance() != before:
            self._give_up(name, key, "it draws from torch's global generator, as dropout does")
        return outputs

    def _record(
        self,
        name: str,
        key: Hashable,
        inputs: Mapping[Key, Tensor],
        optimizers: Sequence[Optimizer],
        work: Callable[[Mapping[Key, Tensor]], Mapping[Any, Tensor]],
    ) -> None:
        if len(self._recordings) == MOST:
            self._give_up(name, key, f"there are {MOST} recordings already")
            return
        own = {each: tensor.clone() for each, tensor in inputs.items()}
        rates = [[self._rate_of(group) for group in o.param_groups] for o in optimizers]
        # A cast that someone made of the weights as they are would else be taken for that of all later steps.
        torch.autograd.graph.increment_version(parameters_of(optimizers))
        try:
            with on_device(optimizers, rates):
                run = self.recorder.capture(lambda: work(own))
        except RuntimeError as failed:
            for optimizer in optimizers:  # gradients of a recording that came to nothing
                optimizer.zero_grad(set_to_none=True)
            self._give_up(name, key, str(failed).splitlines()[0] if str(failed) else type(failed).__name__)
            return
        self._recordings[key] = Recording(own, optimizers, rates, run, home_of(optimizers))

    def _rate_of(self, group: Mapping[str, Any]) -> Tensor:
        # torch's fused kernels read fp32 on a GPU; a CPU takes the number as it is.
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        return torch.full((), group["lr"], dtype=dtype, device=self.device)

    def _give_up(self, name: str, key: Hashable, reason: str) -> None:
        self._eager.add(key)
        self.tell(f"engine.graphs: {name} is not recorded, but launched as before: {reason}")


@contextmanager
def on_device(optimizers: Sequence[Optimizer], rates: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Inside, optimizers read their learning rates from tensors, which hold what the groups say; afterwards the groups
    hold plain numbers again, as checkpoints and logs want them."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            before.append((group, {name: group[name] for name in ("lr", "capturable") if name in group}))
            group["lr"] = rate.fill_(group["lr"])
            if "capturable" in group:
                group["capturable"] = True
    try:
        yield
    finally:
        for group, was in before:
            group.update(was)
