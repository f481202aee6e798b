"""Weights held and step times of distillation: one shared base against the three copies that other trainers hold.

Both train the same student and critic on the same noise; the copies are three networks of their own, asked by turns.
Each runs in a fresh process. Usage: python benchmarks/distillation_memory.py [--model small|1.3b|5b|14b] [--json FILE]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from weft.config.source import read_text
from weft.contracts import Batch, Denoise, Model, NoState, Phase, Rng
from weft.math.chance import generator
from weft.objectives.dmd import Dmd
from weft.run.assemble import assemble
from weft.run.config import RunConfig, parse_config
from weft.run.learner import Learner

CONFIG = """\
name: memory
family: {{kind: wan, source: {source}}}
adapter: {{kind: lora, rank: 16, targets: attention}}
objective: {{kind: dmd, student_every: 1, guidance: 3}}
optimizer: {{kind: adamw, lr: 1e-4}}
data: {{kind: prompts, texts: [nothing], buckets: {{sizes: [[{width}, {height}]], frames: [{frames}]}}, batch_size: 1}}
engine: {{kind: torch, device: {device}, precision: {precision}}}
"""


@dataclass
class Copies:
    """Networks of their own for student, teacher and critic, behind the words in which an objective asks one."""

    family: Any
    of: dict[str | None, Model]
    asked: str | None = None

    @property
    def adapters(self) -> "Copies":
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.of if name is not None)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        before, self.asked = self.asked, name
        try:
            with self.of[name].adapters.use(name):
                yield
        finally:
            self.asked = before

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return self.of[name].adapters.parameters(name)

    def velocity(self, inputs: Denoise) -> Tensor:
        return self.of[self.asked].velocity(inputs)


def networks(model: Any) -> list[nn.Module]:
    if isinstance(model, Copies):
        return [each.network for each in model.of.values()]
    return [model.network]


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the different storages under tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def as_copies(config: RunConfig, learner: Learner) -> Copies:
    """The same student and critic, each on a base of its own, and a third base for the teacher."""
    alone = {name: assemble(config, learner.engine).model for name in ("student", "critic", None)}
    for name, model in alone.items():
        if name is not None:
            model.adapters.load_state_dict(name, learner.model.adapters.state_dict(name))
    return Copies(learner.model.family, alone)


def batch_of(config: RunConfig, device: torch.device) -> Batch:
    """Random conditions and the shape of one clip."""
    bucket = config.data.buckets
    (width, height), frames = bucket.sizes[0], bucket.frames[0]
    family = config.family
    shape = family.geometry().latent_shape(frames, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told, other = (family.conditions(1, *shape[1:]) for _ in range(2))
    tensors = {"blank": torch.zeros(1, *shape), **told, **{f"negative/{name}": t for name, t in other.items()}}
    return Batch({name: t.to(device) for name, t in tensors.items()}, ("one",))


def step(
    model: Any, objective: Dmd, batch: Batch, phase: Phase, number: int, device: torch.device
) -> dict[str, Tensor]:
    """One phase's gradients, by name."""
    rng = Rng(generator(device, number, "own"), generator("cpu", number, "shared"), 0, number, number)
    with model.adapters.use(phase.role):
        objective.loss(phase.name, model, batch, NoState(), rng).total.backward()
    found = {f"{phase.role}.{n}": p.grad.clone() for n, p in model.adapters.parameters(phase.role).items()}
    for parameter in model.adapters.parameters(phase.role).values():
        parameter.grad = None
    return found


def measured(config: RunConfig, three: bool, steps: int) -> dict[str, Any]:
    """Bytes, seconds of each phase, and a digest of the gradients."""
    engine = config.engine.open()
    learner = assemble(config, engine)
    torch.manual_seed(0)
    for name in learner.model.adapters.names:  # B is zero at first, and all three would be one
        for parameter in learner.model.adapters.parameters(name).values():
            nn.init.normal_(parameter, std=0.02)
    model: Any = learner.model
    if three:
        model = as_copies(config, learner)
        learner.model.network.to("meta")
    adapters = {id(p) for name in model.adapters.names for p in model.adapters.parameters(name).values()}
    frozen = [t for n in networks(model) for t in [*n.parameters(), *n.buffers()] if not t.is_meta]
    batch = batch_of(config, engine.device)
    seconds: dict[str, list[float]] = {}
    digest = torch.zeros((), dtype=torch.double)
    for number in range(steps + 1):
        for phase in config.objective.phases(0, config.family.experts):
            engine.synchronize()
            began = perf_counter()
            gradients = step(model, config.objective, batch, phase, number, engine.device)
            engine.synchronize()
            if number:  # the first warms up
                seconds.setdefault(phase.name, []).append(perf_counter() - began)
            digest += sum(
                (g.double().cpu() * torch.arange(1, g.numel() + 1).view_as(g)).sum() for g in gradients.values()
            )
    return {
        "frozen": held(t for t in frozen if id(t) not in adapters and not _is_adapter(t, adapters)),
        "adapters": held(p for name in model.adapters.names for p in model.adapters.parameters(name).values()),
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak": torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "digest": float(digest),
    }


def _is_adapter(tensor: Tensor, adapters: set[int]) -> bool:
    return tensor.requires_grad or id(tensor) in adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small", choices=["small", "1.3b", "5b", "14b"])
    parser.add_argument("--size", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=["one", "three"], help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from memory_ladder import MODELS, make_model  # beside this file

    width, height, frames = (arguments.size or MODELS[arguments.model][-1]).split("x")
    if arguments.alone:
        told = {"source": arguments.source, "width": width, "height": height, "frames": frames,
                "device": arguments.device, "precision": arguments.precision}  # fmt: skip
        config = parse_config(read_text(CONFIG.format(**told)))
        print(json.dumps(measured(config, arguments.alone == "three", arguments.steps)))
        return
    print_all(arguments, make_model)


def print_all(arguments: argparse.Namespace, make_model: Any) -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        source = make_model(Path(folder) / "model", arguments.model)
        for kind in ("one", "three"):
            argv = [sys.executable, __file__, *sys.argv[1:], "--alone", kind, "--source", str(source)]
            said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[kind] = json.loads(said.splitlines()[-1])
            print(kind, rows[kind], flush=True)
    if arguments.json:
        facts = {
            "benchmark": "distillation_memory", "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in ("weft", "torch", "diffusers", "peft")},
            "model": arguments.model, "size": arguments.size, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
