"""Memory and time of every rung of the memory ladder, each in a fresh process on random weights.

On a cpu "the device" is memory apart from the host's: what waits on the host in the engine's own account is taken off.
Usage: python benchmarks/memory_ladder.py [--model small|1.3b|5b|14b] [--size WIDTHxHEIGHTxFRAMES] [--json FILE]
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from weft.config.source import read_text
from weft.contracts import Batch, NoState, Rng
from weft.data.buckets import Bucket
from weft.engines.offload import Waiting
from weft.engines.residency import frozen_by_block
from weft.families.loading import model_folder
from weft.run.assemble import assemble
from weft.run.config import RunConfig, parse_config
from weft.run.estimate import estimate
from weft.run.learner import Learner
from weft.run.parts import trained_of
from weft.run.rehearsal import LiveBytes

# blocks, heads of 128, width of the feed-forward layers, channels of the latents, default size
MODELS = {
    "small": (12, 4, 2048, 16, "416x240x9"),
    "1.3b": (30, 12, 8960, 16, "832x480x81"),
    "5b": (30, 24, 14336, 48, "1280x704x121"),
    "14b": (40, 40, 13824, 16, "832x480x81"),
}
RECOMPUTE = ["engine.recompute=true"]
OFFLOAD = [*RECOMPUTE, "engine.offload_inputs=true"]
EIGHT = [*OFFLOAD, "optimizer.kind=adamw8bit"]
FP8 = [*EIGHT, "family.dtype=fp8"]


def rungs(blocks: int) -> dict[str, list[str]]:
    """Each rung on top of those before it, as overrides."""
    return {
        "nothing": [],
        "recompute": RECOMPUTE,
        "+ offload_inputs": OFFLOAD,
        "+ 8-bit optimizer": EIGHT,
        "+ fp8 weights": FP8,
        "int8 in their place": [*EIGHT, "family.dtype=int8"],
        "nf4 in their place": [*EIGHT, "family.dtype=nf4"],
        f"fp8, + stream {blocks // 2} blocks": [*FP8, f"engine.stream_blocks={blocks // 2}"],
        f"fp8, + stream all {blocks} blocks": [*FP8, f"engine.stream_blocks={blocks}"],
    }


def make_model(folder: Path, name: str) -> Path:
    """A transformer with random weights in bf16 beside the shipped model's other parts."""
    layers, heads, ffn, channels, _ = MODELS[name]
    shipped = model_folder("tiny-wan")
    folder.mkdir(parents=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(shipped / part, folder / part)
    index = json.loads((shipped / "model_index.json").read_text())
    if channels == 48:
        vae = json.loads((folder / "vae" / "config.json").read_text())
        vae |= {"z_dim": 48, "scale_factor_spatial": 16, "scale_factor_temporal": 4}
        (folder / "vae" / "config.json").write_text(json.dumps(vae))
        index["expand_timesteps"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, in_channels=channels,
            out_channels=channels,
        )  # fmt: skip
    network.save_config(folder / "transformer")
    torch.manual_seed(0)
    # Never zeros: they multiply faster than numbers do.
    weights = {n: (0.02 * torch.randn(t.shape)).bfloat16() for n, t in network.state_dict().items()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def config_of(model: Path, device: str, precision: str, overrides: list[str]) -> RunConfig:
    plain = {
        "name": "ladder",
        "output": str(model.parent / "runs"),
        "family": {"kind": "wan", "source": str(model), "text_length": 512},
        "adapter": {"kind": "lora", "backend": "native", "rank": 32, "targets": "attention+ffn"},
        "objective": {"kind": "flow-matching"},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "data": {"kind": "video", "sources": [{"path": "none"}], "buckets": {"sides": [512], "frames": [49]}},
        "engine": {"kind": "torch", "device": device, "precision": precision},
    }
    return parse_config(read_text(json.dumps(plain), overrides=overrides))


def bucket_of(config: RunConfig, size: str) -> Bucket:
    width, height, frames = map(int, size.split("x"))
    return Bucket(frames, height, width, config.family.geometry().tokens(frames, height, width))


def step(learner: Learner, batch: Batch) -> None:
    """One training step as the loop makes it."""
    (phase,) = learner.objective.phases(0, learner.experts)
    with learner.model.adapters.use(phase.role):
        with learner.engine.computing():
            rng = learner.rng(phase.name, 0, 1)
            loss = learner.objective.loss(phase.name, learner.model, batch, NoState(), rng)
        learner.engine.backward(loss.total, last=True)
    learner.engine.step(learner.optimizers[phase.optimizers[0]], 1.0)


def kept_bytes(learner: Learner, batch: Batch) -> int:
    """What autograd keeps on the device between a forward and its backward pass, each storage once."""
    (phase,) = learner.objective.phases(0, learner.experts)
    frozen = {t.untyped_storage().data_ptr() for t in frozen_by_block(learner.model.network, ())[None]}
    seen: dict[int, Tensor] = {}
    inputs = learner.engine.inputs

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            seen[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()  # the tensor itself would refer to its own graph, which then were never freed

    if inputs is not None:
        own = inputs.pack

        def both(tensor: Tensor) -> Tensor | Waiting:
            kept = own(tensor)
            return kept if isinstance(kept, Waiting) else pack(kept)

        inputs.pack = both
    with learner.model.adapters.use(phase.role), saved_tensors_hooks(pack, lambda t: t), learner.engine.computing():
        rng: Rng = learner.rng(phase.name, 0, 1)
        loss = learner.objective.loss(phase.name, learner.model, batch, NoState(), rng)
    total = sum(t.untyped_storage().nbytes() for t in seen.values())
    del loss
    if inputs is not None:
        del inputs.pack
    return total


def weight_bytes(learner: Learner) -> int:
    """Frozen weights on the device: those that do not wait on the host, and the slots of the ring."""
    hosts = {p.host.untyped_storage().data_ptr() for s in learner.engine.streams for p in s.parcels.values()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in
                frozen_by_block(learner.model.network, ())[None]}  # fmt: skip
    storages |= {s.memory.untyped_storage().data_ptr(): s.memory.untyped_storage() for s in learner.engine.ring.slots}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in hosts)


def state_bytes(learner: Learner) -> int:
    """Trained weights, their gradients and the optimizer's state."""
    parameters = [p for name in learner.model.adapters.names for p in learner.model.adapters.parameters(name).values()]
    states = [t for o in learner.optimizers.values() for s in o.state.values() for t in s.values()]
    return sum(2 * p.nbytes for p in parameters) + sum(t.nbytes for t in states if isinstance(t, Tensor))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One rung, in this process."""
    torch.set_num_threads(arguments.threads)
    config = config_of(arguments.folder, arguments.device, arguments.precision, arguments.overrides)
    bucket = bucket_of(config, arguments.size)
    learner = assemble(config, config.engine.open())
    device, items = learner.engine.device, config.data.batch_size
    shape = config.family.geometry().latent_shape(bucket.frames, bucket.height, bucket.width)
    tensors = {"latents": torch.randn(items, *shape), **config.family.conditions(items, *shape[1:])}
    batch = learner.engine.put(Batch(tensors, tuple(map(str, range(items)))))
    kept = kept_bytes(learner, batch)
    cuda = device.type == "cuda"
    if cuda:
        step(learner, batch)  # kernels are chosen, the optimizer makes its state
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    # A cpu may be shared: its own time on one thread is steadier than the clock's.
    clock, seconds = (perf_counter if cuda else process_time), []
    for _ in range(arguments.steps):
        began = clock()
        step(learner, batch)
        learner.engine.synchronize()
        seconds.append(clock() - began)
    found: dict[str, Any] = {
        "tokens": bucket.tokens,
        "kept": kept,
        "weights": weight_bytes(learner),
        "adapter": state_bytes(learner),
        "seconds": median(seconds),
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "waiting": learner.engine.inputs.moved // (arguments.steps + 1 + cuda)
        if learner.engine.inputs is not None
        else 0,
        "estimate": estimate(config, [bucket], trained_of(config))[bucket].total,
    }
    if cuda:
        found["activations"] = None
        found["device"] = torch.cuda.max_memory_allocated(device)
        return found
    found["activations"] = peak_of_activations(learner, batch)
    found["device"] = found["weights"] + found["adapter"] + found["activations"]
    return found


def peak_of_activations(learner: Learner, batch: Batch) -> int:
    """The most that a step holds at a time beside weights, adapters and their gradients."""
    (phase,) = learner.objective.phases(0, learner.experts)
    for parameter in learner.model.adapters.parameters(phase.role).values():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live, learner.model.adapters.use(phase.role):
        if learner.engine.inputs is not None:
            learner.engine.inputs.host_memory = live.ignoring
        with learner.engine.computing():
            loss = learner.objective.loss(phase.name, learner.model, batch, NoState(), learner.rng(phase.name, 0, 1))
        learner.engine.backward(loss.total, last=True)
    return live.peak


def in_fresh_process(arguments: argparse.Namespace, folder: Path, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", str(folder), "--device", arguments.device, "--size",
               arguments.size, "--steps", str(arguments.steps), "--threads", str(arguments.threads), "--precision",
               arguments.precision, "--overrides", *overrides]  # fmt: skip
    # Freed tensors go back to the system at once, so that the process's peak is not that of fragmentation.
    settings = {"PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if ended.returncode:
        return {"failed": ended.stderr.strip().splitlines()[-1]}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """A Markdown table in MiB; time as a ratio to the first rung that ran."""
    lines = ["| rung | weights | adapter | kept | peak of activations | device | estimate | process RSS | step time |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    first = next((row for row in found.values() if "failed" not in row), None)
    for name, row in found.items():
        if "failed" in row or first is None:
            lines.append(f"| {name} | {row['failed']} |")
            continue
        peak = "" if row["activations"] is None else mib(row["activations"])
        sizes = [mib(row[key]) for key in ("weights", "adapter", "kept")]
        whole = [mib(row[key]) for key in ("device", "estimate", "rss")]
        lines.append(f"| {' | '.join([name, *sizes, peak, *whole])} | {row['seconds'] / first['seconds']:.2f} |")
    return "\n".join(lines)


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), name) if Path("/proc/cpuinfo").is_file() else name  # fmt: skip
    return {"device": name if device.startswith("cuda") else cpu, "torch": torch.__version__,
            "diffusers": diffusers.__version__, "peft": version("peft"),
            "date": datetime.now(UTC).date().isoformat()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--size", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each rung; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overrides", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.size = arguments.size or MODELS[arguments.model][4]
    if arguments.folder is not None:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(Path(root) / "model", arguments.model)
        for name, overrides in rungs(MODELS[arguments.model][0]).items():
            found[name] = in_fresh_process(arguments, folder, overrides)
            print(name, found[name], file=sys.stderr)
    facts = {"model": arguments.model, "size": arguments.size, "precision": arguments.precision, "batch": 1, "rank": 32,
             "steps": arguments.steps, "threads": arguments.threads, **machine(arguments.device)}  # fmt: skip
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "rungs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
