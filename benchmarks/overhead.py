"""Weft's loop against a bare PyTorch + PEFT loop: the same model, batches and optimizer, in turns within one process.

    python benchmarks/overhead.py --rounds 15 --steps 4 --json benchmarks/results/overhead-cpu.json

Times are processor time of this process on one thread, which other work on the machine does not stretch as it does
wall time; each figure is the median over rounds of the ratio within a round.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from time import process_time
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console

from weft.cli.bench import SMOKE
from weft.config.source import read_text
from weft.data.buckets import Bucket
from weft.engines.single_device import SingleEngine
from weft.events import tell_all
from weft.families.loading import model_folder
from weft.run.assemble import assemble
from weft.run.bench import Nothing, RandomItems, random_items
from weft.run.bench_machine import processor
from weft.run.config import RunConfig, parse_config
from weft.run.listeners import EventLog, Terminal
from weft.run.train import Course, train

TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
SHIFT = 5.0
PLAIN = ("adapter.fused=false", "family.lean=false")
PLAIN_LAYERS = "plain layers"  # the bare loop's own, so that the loops alone are compared


def config_of(backend: str, batch: int, *more: str) -> RunConfig:
    overrides = [f"adapter.backend={backend}", f"data.batch_size={batch}", "optimizer.lr=1e-4", "engine.device=cpu"]
    return parse_config(read_text(SMOKE, "overhead", [*overrides, *more, "schedule.steps=100000"]))


def stream_of(config: RunConfig) -> RandomItems:
    shape = Bucket(9, 64, 64, config.family.geometry().tokens(9, 64, 64))
    return RandomItems(random_items(config, shape), last_step=0)


def weft_loop(backend: str, batch: int, folder: Path, *more: str) -> Callable[[int], None]:
    """The loop of `weft train` with the log and the terminal that a user has. more: overrides of the config."""
    config = config_of(backend, batch, *more)
    learner = assemble(config, SingleEngine.open("cpu", "fp32"))
    stream = stream_of(config)
    number = len(list(folder.iterdir()))
    quiet = Console(file=(folder / f"{number}.txt").open("w"))
    tell = tell_all(EventLog(folder / f"{number}.jsonl"), Terminal(quiet))
    course = Course(config.schedule, Nothing(), tell)

    def run(steps: int) -> None:
        stream.last_step = learner.step + steps
        train(learner, [stream], course)

    return run


def bare_loop(batch: int) -> Callable[[int], None]:
    """What one writes by hand with diffusers and PEFT."""
    config = config_of("peft", batch)
    folder = model_folder("tiny-wan") / "transformer"
    network = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS), network)
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batches = stream_of(config).batches(0, 0, 1)
    text_length = config.family.tokens_of_text

    def run(steps: int) -> None:
        for _ in range(steps):
            clips = next(batches)
            latents, text = clips["latents"], clips["text"][:, :text_length]
            t = torch.sigmoid(torch.randn(len(latents)))
            t = SHIFT * t / (1 + (SHIFT - 1) * t)
            noise, sigma = torch.randn_like(latents), t.view(-1, 1, 1, 1, 1)
            predicted = network((1 - sigma) * latents + sigma * noise, t * 1000, text, return_dict=False)[0]
            loss = (predicted - (noise - latents)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return run


def measure(loops: dict[str, Callable[[int], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of processor time per step of each loop in each round; the order turns from round to round."""
    for run in loops.values():
        run(2)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = process_time()
            loops[name](steps)
            seconds[name].append((process_time() - began) / steps)
    return seconds


def figures(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median step time and the ratio to the base, with the ratio's quartiles."""
    out = {}
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds[base], strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        out[name] = {"step_seconds": median(values), "ratio": median(ratios), "ratio_p25": low, "ratio_p75": high}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="per round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loops = {"bare diffusers + PEFT": bare_loop(arguments.batch)}
        for backend in ("peft", "native"):
            loops[f"weft, {backend}, {PLAIN_LAYERS}"] = weft_loop(backend, arguments.batch, Path(folder), *PLAIN)
            loops[f"weft, {backend}"] = weft_loop(backend, arguments.batch, Path(folder))
        seconds = measure(loops, arguments.rounds, arguments.steps)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "diffusers", "peft")},
        "case": f"tiny-wan, 9x64x64, batch {arguments.batch}, rank 16 on attention+ffn, fp32",
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "loops": figures(seconds, "bare diffusers + PEFT"),
    }
    print(f"{result['case']}, {result['processor']}, one thread, processor time")
    for name, row in result["loops"].items():
        print(
            f"  {name:<28} {1000 * row['step_seconds']:8.1f} ms/step   x{row['ratio']:.3f}  "
            f"({row['ratio_p25']:.3f} to {row['ratio_p75']:.3f})"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
