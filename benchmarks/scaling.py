"""Host memory of each process and bytes on the wire in a step, for every layout of processes: a real Qwen3 with random
weights, over gloo. What crosses between processes is read off the loopback device: keep the machine otherwise idle.

Usage: python benchmarks/scaling.py [--width 768] [--layers 12] [--steps 4] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

WORDS = 8192
ROW = 128  # tokens
LAYOUTS: Mapping[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "DDP, 2": (2, {"data": 2}, {}),
    "DDP, 4": (4, {"data": 4}, {}),
    "FSDP2, 2": (2, {"shard": 2}, {}),
    "FSDP2, 4": (4, {"shard": 4}, {}),
    "FSDP2, 4, read by rank 0": (4, {"shard": 4}, {"read": "broadcast"}),
    "HSDP, 2 x 2": (4, {"data": 2, "shard": 2}, {}),
    "Ulysses, 2": (2, {"sequence": 2}, {}),
    "FSDP2 2 x Ulysses 2": (4, {"shard": 2, "sequence": 2}, {}),
    "DeepSpeed ZeRO-2, 2": (2, {}, {"kind": "deepspeed", "zero": 2}),
    "DeepSpeed ZeRO-3, 2": (2, {}, {"kind": "deepspeed", "zero": 3}),
}


class Rows:
    """Rows of random tokens, each a conversation that is learned whole."""

    name = "random"
    epoch_draws = None

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def batches(self, start: int, rank: int, world: int) -> Iterator[Any]:
        import torch

        from weft.contracts import Batch

        for number in count(start + rank, world):
            ids = torch.randint(WORDS, (1, ROW + 1), generator=torch.Generator().manual_seed(number))
            tensors = {"ids": ids[:, :-1], "labels": ids[:, 1:], "positions": torch.arange(ROW)[None]}
            yield Batch(tensors, (str(number),))

    def position(self, drawn: int) -> dict[str, Any]:
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        """A row follows from its number."""


class Nothing:
    """Between the steps nothing happens."""

    def is_due(self, learner: Any) -> bool:
        return False

    def after_step(self, learner: Any) -> None: ...
    def after_experience(self, learner: Any) -> None: ...
    def skipped(self, learner: Any, phase: Any, outcome: Any) -> None:
        raise ArithmeticError(f"the gradient of step {learner.step + 1} is not finite")


def make_model(folder: Path, width: int, layers: int) -> int:
    """A Qwen3 in fp32 with random weights; returns its bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=WORDS, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
        tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    network = Qwen3ForCausalLM(config)
    network.save_pretrained(folder)
    return sum(p.numel() * 4 for p in network.parameters())


def config_of(model: Path, parallel: Mapping[str, Any], engine: Mapping[str, Any], steps: int) -> Any:
    from weft.config.source import read_text
    from weft.run.config import parse_config

    plain = {
        "name": "scaling",
        "family": {"kind": "causal-lm", "source": str(model)},
        "adapter": {"kind": "lora", "backend": "native", "rank": 16, "targets": "all"},
        "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "data": {"kind": "chat", "sources": [{"path": "none.jsonl"}], "length": ROW, "batch_size": 1},
        "engine": {"device": "cpu", "precision": "fp32", "recompute": True, **engine},
        "parallel": dict(parallel),
        "schedule": {"steps": steps, "accumulate": 1},
    }
    return parse_config(read_text(json.dumps(plain)))


def on_rank(rank: int, world: int, port: int, model: str, case: str, steps: int, answers: Any) -> None:
    """Load and train as one rank; what it held and what crossed the wire."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port),
                   "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                   "DS_ACCELERATOR": "cpu"}  # fmt: skip
    import torch

    from weft.events import Event, StepEnded
    from weft.run.assemble import assemble, count_parameters
    from weft.run.train import Course, train

    torch.set_num_threads(1)
    _, parallel, engine_options = LAYOUTS[case]
    config = config_of(Path(model), parallel, engine_options, steps)
    engine = config.engine.open(config.parallel)
    config.family.skeleton()  # what its libraries import is not the weights' memory
    engine.barrier()
    before = reset_peak()
    learner = assemble(config, engine)
    loaded = resident("VmHWM") - before
    seen: list[tuple[float, int]] = []

    def tell(event: Event) -> None:
        if isinstance(event, StepEnded):
            engine.barrier()
            seen.append((perf_counter(), loopback()))

    train(learner, [Rows(steps)], Course(config.schedule, Nothing(), tell))
    pairs = list(pairwise(seen))
    answers.put({
        "rank": rank,
        "peak_while_loading": loaded,
        "peak_while_training": resident("VmHWM") - before,
        "wire_bytes_per_step": median(b[1] - a[1] for a, b in pairs),
        "seconds_per_step": median(b[0] - a[0] for a, b in pairs),
        "trainable": count_parameters(learner).trainable,
    })  # fmt: skip
    engine.barrier()
    engine.close()


def reset_peak() -> int:
    """Begin the count of peak memory anew; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def loopback() -> int:
    """Bytes that the loopback device has received."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def measured(model: Path, case: str, steps: int) -> dict[str, Any]:
    """One layout in fresh processes: the largest of the ranks, the wire as a whole."""
    world = LAYOUTS[case][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(target=on_rank, args=(rank, world, port, str(model), case, steps, answers))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    found = [answers.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    return {
        "processes": world,
        "peak_while_loading": max(each["peak_while_loading"] for each in found),
        "peak_while_training": max(each["peak_while_training"] for each in found),
        "wire_bytes_per_step": next(each["wire_bytes_per_step"] for each in found if each["rank"] == 0),
        "seconds_per_step": median(each["seconds_per_step"] for each in found),
        "trainable": found[0]["trainable"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of layouts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        weights = make_model(model, arguments.width, arguments.layers)
        rows = {case: measured(model, case, arguments.steps) for case in arguments.only or LAYOUTS}
    made = {
        "schema": 1,
        "model": {"class": "Qwen3ForCausalLM", "width": arguments.width, "layers": arguments.layers,
                  "bytes": weights},
        "case": {"rank": 16, "targets": "all", "row": ROW, "precision": "fp32", "recompute": True},
        "layouts": rows,
        "software": {name: version(name) for name in ("weft", "torch", "transformers")},
        "hardware": {"platform": platform.platform(), "cores": os.cpu_count()},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    print(f"weights {weights / 2**20:.0f} MiB")
    print("| layout | MiB, loading | MiB, training | MB on the wire a step |\n| --- | --- | --- | --- |")
    for case, row in rows.items():
        loading, training = (row[name] / 2**20 for name in ("peak_while_loading", "peak_while_training"))
        print(f"| {case} | {loading:.0f} | {training:.0f} | {row['wire_bytes_per_step'] / 1e6:.1f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
