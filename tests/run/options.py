"""Training of one small model in every way that Weft can compute it, from the libraries' own code to all options."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.learners import NoMilestones, frozen, shake, weights
from tests.small import config_of, make_hunyuan, make_qwen3, make_wan, merged, plain_config
from weft.contracts import UNLEARNED, Batch
from weft.data.buckets import Bucket
from weft.engines.compiling import Compiler
from weft.engines.flat_adamw import FlatAdamW
from weft.engines.graphs import Graphs, OnHost
from weft.engines.recompute import Recompute
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.events import StepEnded
from weft.families.kernels import Kernels
from weft.run.assemble import assemble
from weft.run.bench import random_items
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.partitions import Accounts
from weft.run.questions import Row
from weft.run.train import Course, train

CPU = torch.device("cpu")
Kind = Literal["Wan", "Wan with first frames", "HunyuanVideo", "Qwen3 packed"]
KINDS: tuple[Kind, ...] = ("Wan", "Wan with first frames", "HunyuanVideo", "Qwen3 packed")
LAYERS = 3
EAGER = {name: "eager" for name in Kernels.model_fields if name != "attention"}
# What a family's own fast code is called in its section: (off, on).
LEAN: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wan": ({"lean": False}, {"lean": True}),
    "hunyuan-video": ({"lean": False}, {"lean": True}),
    "causal-lm": ({"kernels": EAGER}, {"kernels": {"rotary": "fused"}}),
}


@dataclass(frozen=True)
class Way:
    """How a run is computed. lean: by the family's own fast code. fused: adapters by math/products.py. flat: AdamW over
    flat memory. late: steps are told one step late. recorded: steps from recordings, as a CPU has them. budget: of
    compiled blocks, by torch's partitioner; None: they are not compiled. The rest as in the engine's section."""

    lean: bool = False
    fused: bool = False
    flat: bool = False
    late: bool = False
    recorded: bool = False
    budget: float | None = None
    recompute: Recompute = False
    stream_blocks: int = 0
    offload_inputs: bool = False


PLAIN = Way()
ALONE: Mapping[str, Way] = {
    "lean": Way(lean=True),
    "fused": Way(fused=True),
    "flat": Way(flat=True),
    "late": Way(late=True),
    "recorded": Way(recorded=True),
    "compiled": Way(budget=1.0),
    "compiled, budget 0.5": Way(budget=0.5),
    "selective": Way(recompute="selective"),
    "recompute": Way(recompute=True),
    "recompute, streamed, offloaded": Way(recompute=True, stream_blocks=LAYERS - 1, offload_inputs=True),
}
SWIFT = Way(lean=True, fused=True, flat=True, late=True)
# Not all options go with each other: compiled blocks keep what their budget says, so nothing is left to recompute.
TOGETHER: Mapping[str, Way] = {
    "all, eager": replace(SWIFT, recorded=True),
    "all, compiled": replace(SWIFT, recorded=True, budget=0.5),
    "all, in little memory": replace(
        SWIFT, recompute="selective", stream_blocks=LAYERS - 1, offload_inputs=True
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What a run told and left. graphs: of compiled blocks."""

    losses: Sequence[float]
    weights: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    graphs: int = 0
    replays: int = 0


@dataclass(frozen=True)
class Over:
    """The given batches over and over."""

    given: Sequence[Batch]
    last_step: int
    name: str = "over"

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        return islice(cycle(self.given), start, None)


@dataclass(frozen=True)
class Small:
    """A small model of a kind in a folder, and what it is trained on."""

    kind: Kind
    folder: Path
    made: dict[str, list[Batch]] = field(default_factory=dict)

    @classmethod
    def make(cls, kind: Kind, folder: Path) -> "Small":
        if kind == "HunyuanVideo":
            make_hunyuan(folder, layers=2, single_layers=LAYERS - 2)
        elif kind == "Qwen3 packed":
            make_qwen3(folder, layers=LAYERS)
        else:
            make_wan(folder, LAYERS, "ti2v" if kind == "Wan with first frames" else "t2v")
        return cls(kind, folder)

    @property
    def family(self) -> str:
        return {"HunyuanVideo": "hunyuan-video", "Qwen3 packed": "causal-lm"}.get(self.kind, "wan")

    def config(self, way: Way, backend: str, steps: int, **change: Any) -> RunConfig:
        """change: of sections, by name."""
        plain = plain_config(self.folder.parent, self.folder, self.folder / "no clips", self.family)
        plain["family"] |= LEAN[self.family][way.lean]
        plain["adapter"] |= {"backend": backend, "fused": way.fused}
        plain["schedule"] = {"steps": steps, "curve": "cosine", "warmup": 2}
        if self.family == "causal-lm":
            plain["adapter"]["targets"] = "all"
            plain["objective"] = {"kind": "next-token"}
            plain["data"] = {"kind": "chat", "sources": [{"path": "none"}], "length": 48, "batch_size": 2}
        return config_of(merged(plain, change))

    def batches(self, config: RunConfig) -> list[Batch]:
        """Three, whose conditions are random; of text conversations of 12 tokens in rows of 48, as a loader tells them:
        where they end, and which tokens are learned."""
        if "all" not in self.made:
            shape = (
                Row(48) if self.family == "causal-lm" else Bucket(9, 64, 64, config.family.geometry().tokens(9, 64, 64))
            )
            make = random_items(config, shape, 12)
            self.made["all"] = [self._filled(make(number), number) for number in range(3)]
        return self.made["all"]

    def _filled(self, batch: Batch, number: int) -> Batch:
        chance = torch.Generator().manual_seed(number)
        told = {
            name: torch.randn(t.shape, generator=chance) if t.is_floating_point() and name != "latents" else t
            for name, t in batch.tensors.items()
        }
        if "labels" not in told:
            return replace(batch, tensors=told)
        told["learned"] = (told["labels"].flatten() != UNLEARNED).nonzero().flatten()
        return replace(batch, tensors=told, texts=((12,) * 4,) * len(batch.keys))


def learner_in(way: Way, config: RunConfig, inductor: bool = False) -> Learner:
    """The learner of a config on a CPU, its adapter shaken, computed in a way. inductor: what is compiled, by it."""
    torch.set_num_threads(1)
    backend = None if inductor else Accounts()
    compiler = None if way.budget is None else Compiler(budget=way.budget, backend=backend)
    residence = Residence(recompute=way.recompute, offload_inputs=way.offload_inputs, stream_blocks=way.stream_blocks)
    precision = "fp32" if config.engine.precision == "auto" else config.engine.precision
    learner = assemble(config, SingleEngine(CPU, precision, residence, compiler=compiler))
    shake(learner)
    if not way.flat:
        optimizers = learner.optimizers
        learner.optimizers = {n: o.apart() if isinstance(o, FlatAdamW) else o for n, o in optimizers.items()}
    return learner


def curve(small: Small, way: Way, backend: str, steps: int, inductor: bool = False, **change: Any) -> Curve:
    """Train a small model in a way. change: of the config's sections."""
    config = small.config(way, backend, steps, **change)
    learner = learner_in(way, config, inductor)
    start, told, said = frozen(weights(learner)), list[Any](), list[str]()
    graphs = Graphs(OnHost(), CPU, said.append) if way.recorded else None
    course = Course(config.schedule, NoMilestones(), told.append, graphs=graphs, depth=int(way.late))
    train(learner, [Over(small.batches(config), steps)], course)
    assert not said, said
    losses = [event.metrics["train/loss"] for event in told if isinstance(event, StepEnded)]
    regions = learner.engine.regions if isinstance(learner.engine, SingleEngine) else []
    assert all(region.stopped is None for region in regions)
    compiled = sum(region.graphs for region in regions)
    return Curve(losses, frozen(weights(learner)), start, compiled, graphs.replays if graphs else 0)


def apart(one: Curve, other: Curve) -> tuple[float, float]:
    """How far a run is from another: the largest relative difference of a loss, and that of the way that all weights
    together have gone, against its length."""
    pairs = zip(one.losses, other.losses, strict=True)
    loss = max(abs(a - b) / abs(b) for a, b in pairs)
    gone = torch.cat([(other.weights[name] - start).flatten() for name, start in other.start.items()])
    off = torch.cat([(one.weights[name] - t).flatten() for name, t in other.weights.items()])
    return loss, float(off.norm() / gone.norm())
