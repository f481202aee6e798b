"""How long training stands still for a checkpoint: written while it waits, and in the background.

    python benchmarks/checkpoints.py --worlds 1 4 --rounds 5 --json benchmarks/results/checkpoints-cpu.json

The state is that of a LoRA of rank 32 on attention and ffn of a Wan 2.1 1.3B with `weft train`'s own AdamW: weights
and two moments in fp32, on several processes sharded as FSDP2 shards them; the adapter is copied for its file besides.
Training is stood for by matrix products: `--between` seconds of them are the forward and backward passes between the
save and the next optimizer step, which waits until the state is copied. Figures are medians over rounds, of rank 0.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from weft.contracts import NoState
from weft.run.checkpoint import CheckpointWriter
from weft.run.learner import Learner
from weft.run.optimizers import AdamW
from weft.run.retention import Retention

BLOCKS, WIDTH, FFN, RANK = 30, 1536, 8960, 32
LAYERS = {f"attn{i}.{name}": (WIDTH, WIDTH) for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
LAYERS |= {"ffn.net.0.proj": (WIDTH, FFN), "ffn.net.2": (FFN, WIDTH)}


@dataclass
class Matrices:
    """Adapters without a network."""

    own: dict[str, nn.Parameter]
    names: tuple[str, ...] = ("default",)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return self.own

    def fixed(self, name: str) -> dict[str, Tensor]:
        return {}


@dataclass
class Measured:
    """Seconds of each round. call: training waits for the save to begin. hold: the next optimizer step waits for the
    copy. whole: until the checkpoint is there. slower: what the work meanwhile took beyond its usual time."""

    call: list[float] = field(default_factory=list)
    hold: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    slower: list[float] = field(default_factory=list)

    def record(self) -> dict[str, float]:
        stall = [call + hold for call, hold in zip(self.call, self.hold, strict=True)]
        return {
            "call_s": median(self.call), "call_min_s": min(self.call), "hold_s": median(self.hold),
            "hold_min_s": min(self.hold), "stall_s": median(stall), "stall_min_s": min(stall),
            "slower_s": median(self.slower), "whole_s": median(self.whole),
        }  # fmt: skip


def learner_of(world: int) -> Learner:
    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
    parameters = {}
    for block in range(BLOCKS):
        for layer, (inside, outside) in LAYERS.items():
            for end, shape in (("lora_A", (RANK, inside)), ("lora_B", (outside, RANK))):
                tensor = torch.randn(shape) if mesh is None else distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
                parameters[f"blocks.{block}.{layer}.{end}.weight"] = nn.Parameter(tensor)
    optimizer = AdamW().build(parameters, lambda name: 1.0)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    engine: Any = SimpleNamespace(device=torch.device("cpu"), state_dict=dict)
    model: Any = SimpleNamespace(adapters=Matrices(parameters))
    unused: Any = None
    return Learner(model, unused, NoState(), engine, {"default": optimizer}, 0, unused)


def step(matrix: Tensor) -> float:
    """The seconds of a stretch of work."""
    began = perf_counter()
    for _ in range(4):
        torch.mm(matrix, matrix)
    return perf_counter() - began


def measure(learner: Learner, run: Path, background: bool, rounds: int, between: float) -> Measured:
    matrix, found = torch.randn(768, 768), Measured()
    writer = CheckpointWriter(run, Retention(newest=1), background)
    adapter = dict(learner.model.adapters.parameters("default")) if not dist.is_initialized() else {}
    for number in range(rounds + 1):
        usual = median(step(matrix) for _ in range(20))
        learner.step = number
        if dist.is_initialized():
            dist.barrier()
        began = perf_counter()
        writer.save(learner, {}, tensors=adapter)
        called, steps = perf_counter(), list[float]()
        while perf_counter() - called < between:
            steps.append(step(matrix))
        asked = perf_counter()
        learner.hold()
        held = perf_counter()
        while not writer.done():
            steps.append(step(matrix))
        whole = perf_counter()
        if number:  # the first one warms up
            found.call.append(called - began)
            found.hold.append(held - asked)
            found.whole.append(whole - began)
            found.slower.append(sum(steps) - usual * len(steps))
    writer.wait()
    return found


def rank_of(rank: int, world: int, port: int, run: str, rounds: int, between: float, told: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    learner = learner_of(world)
    found = {name: measure(learner, Path(run) / name, background, rounds, between).record()
             for name, background in (("waiting", False), ("background", True))}  # fmt: skip
    if rank == 0:
        numbers = sum(p.numel() for p in learner.model.adapters.parameters("default").values())
        told.put({"processes": world, "parameters": numbers, "bytes": 12 * numbers, **found})
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def world_of(world: int, rounds: int, between: float, folder: Path | None) -> dict[str, Any]:
    context, run = multiprocessing.get_context("spawn"), tempfile.mkdtemp(prefix="checkpoints.", dir=folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = context.Queue()
    ranks = [context.Process(target=rank_of, args=(r, world, port, run, rounds, between, told)) for r in range(world)]
    for rank in ranks:
        rank.start()
    try:
        return told.get(timeout=900)
    finally:
        for rank in ranks:
            rank.join(60)
        shutil.rmtree(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 4], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--between", type=float, default=4, help="seconds of work before the next optimizer step")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; /dev/shm: without a disk")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = [world_of(world, arguments.rounds, arguments.between, arguments.folder) for world in arguments.worlds]
    for result in results:
        print(f"{result['processes']} processes, {result['bytes'] / 1e6:.0f} MB")
        for name in ("waiting", "background"):
            figures = result[name]
            print(f"  {name:<11} stands still {1000 * figures['stall_s']:.1f} ms (at the save "
                  f"{1000 * figures['call_s']:.1f}, before the next step {1000 * figures['hold_s']:.1f}), "
                  f"work is slower by {figures['slower_s']:.2f} s, whole after {figures['whole_s']:.2f} s")  # fmt: skip
    if arguments.json:
        facts = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "rounds": arguments.rounds,
            "between_s": arguments.between,
            "in_memory": arguments.folder == Path("/dev/shm"),
        }
        arguments.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
