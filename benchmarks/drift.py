"""Learners on synthetic documents that drift by the year, over several seeds: weft's own runs, compared by pairs.

    python benchmarks/drift.py --folder drift --seeds 0-4 --json benchmarks/results/drift-cpu.json

SYNTHETIC: shows mechanics, no evidence about clinical data. Seeds vary first weights, order and replay; documents and
splits stay. Each run has its own folder, and one that has finished is not trained again, so the command may be stopped
and given once more. The methods are written here; how they compare is for the numbers to say.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from time import process_time
from typing import Any

import torch

from weft.cli import train
from weft.cli.seeds import seeds_of
from weft.demo.continual import MAIN, World, bayes_accuracy, summary_of, write_world
from weft.demo.drift import BANNER, Drift
from weft.math.intervals import paired, t_interval
from weft.run.bench_machine import processor

DRIFT = Drift(per_year=400)
EPOCHS = 2
BESIDE = "replay"  # what the others are compared with


@dataclass(frozen=True)
class Method:
    """A learner of the shipped parts, and what of it is changed."""

    learner: str
    overrides: tuple[str, ...] = ()
    joint: bool = False


METHODS: Mapping[str, Method] = {
    "sequential": Method("traditional"),
    "joint": Method("traditional", joint=True),
    "replay": Method("replay"),
    "agem": Method("agem"),
    "cmaml, second order": Method("cmaml"),
    "sync, second order": Method("sync"),
    "lamaml, second order": Method("lamaml"),
    "lamaml, first order": Method("lamaml", ("objective.order=first",)),
    "lamaml, as published": Method("lamaml", ("objective.preset=paper", "objective.order=second",
                                              "objective.inner_steps=4", "objective.outer=sgd_alpha",
                                              "objective.rates={start: 0.3, lr: 0.1}")),
    # As many gradients of a batch as second order takes: each batch is shown nine times, at a third of the rate.
    "replay, equal evaluations": Method("replay", ("data.glances=9", "optimizer.lr=1e-3")),
}  # fmt: skip


def run_of(world: World, name: str, seed: int) -> Path:
    """Train once, unless it has been done; the run's folder."""
    method = METHODS[name]
    short = f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    folder = world.runs / short
    if not (folder / "seconds.json").exists():
        joint = ["data.mode=joint"] if method.joint else []
        began = process_time()
        with redirect_stdout(StringIO()):
            code = train.run(
                [str(world.configs[method.learner]), f"name={short}", f"seed={seed}", *joint, *method.overrides]
            )
        if code:
            raise SystemExit(code)
        (folder / "seconds.json").write_text(json.dumps(process_time() - began))
    return folder


def told(folder: Path) -> dict[str, float | None]:
    """The numbers of one run."""
    summary = summary_of(folder)
    own = summary["metrics"][MAIN]
    numbers = {name: own[name] for name in ("average", "bwt", "forgetting", "next")}
    numbers["auroc"] = summary["metrics"]["auroc"]["average"]
    numbers["gradient_evaluations"] = summary["gradient_evaluations"]
    numbers["processor_seconds"] = json.loads((folder / "seconds.json").read_text())
    return numbers


def means(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds, with Student's 95 % interval."""
    found: dict[str, Any] = {}
    for name in runs[0]:
        values = [run[name] for run in runs if run[name] is not None]
        interval = t_interval(values) if values else None
        found[name] = None if interval is None else {"mean": interval.mean, "half": interval.half}
    return found


def differences(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By seed, less those of BESIDE."""
    found: dict[str, Any] = {}
    for name in ("average", "bwt", "forgetting", "next", "auroc"):
        pairs = [(a[name], b[name]) for a, b in zip(runs, others, strict=True) if None not in (a[name], b[name])]
        if pairs and (difference := paired(*map(list, zip(*pairs, strict=True)))) is not None:
            found[name] = asdict(difference)
    return found


def result_of(world: World, runs: Mapping[str, Sequence[dict[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
    rows = {
        name: {"mean": means(own), "runs": list(own)}
        | ({} if name == BESIDE else {f"less {BESIDE}": differences(own, runs[BESIDE])})
        for name, own in runs.items()
    }
    return {
        "date": date.today().isoformat(), "banner": BANNER, "processor": processor(), "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "transformers", "peft")},
        "case": f"BERT of 2 layers of 64, LoRA rank 4 on all layers, {DRIFT.per_year} documents a year, 6 years, "
        f"{EPOCHS} epochs, batch 16, memory 200, 16 replayed; all dials at their defaults",
        "sha256": world.drift.checksum, "seeds": list(seeds), "metric": MAIN, "interval": "Student, 95 %",
        "bayes_accuracy": bayes_accuracy(world), "methods": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("drift"))
    parser.add_argument("--seeds", default="0-4")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = write_world(arguments.folder, DRIFT, sorted({method.learner for method in METHODS.values()}), EPOCHS)
    with redirect_stdout(StringIO()):
        assert train.run([str(world.base)]) == 0
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.methods}
    done: list[int] = []
    for seed in seeds_of(arguments.seeds):
        for name in arguments.methods:
            runs[name].append(told(run_of(world, name, seed)))
            last = runs[name][-1]
            cost = f"{last['gradient_evaluations']:,.0f} gradients  {last['processor_seconds']:.0f} s"
            print(f"seed {seed}  {name:<28} ACC {last['average']:.3f}  BWT {last['bwt'] or 0:+.3f}  {cost}", flush=True)
        done.append(seed)
        if arguments.json and BESIDE in runs:
            arguments.json.write_text(json.dumps(result_of(world, runs, done), indent=1) + "\n")


if __name__ == "__main__":
    main()
