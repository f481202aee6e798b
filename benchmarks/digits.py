"""Learners on scikit-learn's digits, turned or shuffled anew for each task: real data code, objectives and loop.

    python -m benchmarks.digits --seeds 5 --json benchmarks/results/digits-cpu.json

A perceptron of 64-100-100-10 and 5 tasks of 100 images; what it can show is that the learners do what the published
ones do. It is no proof of the paper's numbers: those are of other data, and tuned replay is above La-MAML here.
"""

import argparse
import json
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any, get_args

import torch
from tests.digits import BATCH, GLANCES, MEMORY, METHODS, REPLAYED, SHORT, Kind, matrix_of

from weft.math.intervals import paired, t_interval
from weft.run.bench_machine import processor

BESIDE = "replay"


def row_of(kind: Kind, name: str, seeds: int) -> dict[str, Any]:
    """One method over all seeds. RA and BTI in percent, as the paper has them."""
    began, runs = process_time(), []
    for seed in range(seeds):
        matrix, evaluations = matrix_of(METHODS[name], kind, seed)
        transfer = matrix.transfer()
        runs.append({"RA": 100 * (transfer.average or 0), "BTI": 100 * (transfer.bti or 0)})
    row: dict[str, Any] = {"gradient_evaluations": evaluations, "processor_seconds": (process_time() - began) / seeds}
    for number in ("RA", "BTI"):
        interval = t_interval([run[number] for run in runs])
        assert interval is not None
        row[number] = {"mean": interval.mean, "half": interval.half, "runs": [run[number] for run in runs]}
    print(f"{kind:<13} {name:<28} RA {row['RA']['mean']:.1f}  BTI {row['BTI']['mean']:+.1f}  "
          f"{evaluations:,.0f} gradients  {row['processor_seconds']:.1f} s", flush=True)  # fmt: skip
    return row


def table(kind: Kind, seeds: int) -> dict[str, Any]:
    rows = {name: row_of(kind, name, seeds) for name in METHODS}
    for name, row in rows.items():
        if name != BESIDE:
            pairs = {number: paired(row[number]["runs"], rows[BESIDE][number]["runs"]) for number in ("RA", "BTI")}
            row[f"less {BESIDE}"] = {number: asdict(pair) for number, pair in pairs.items() if pair is not None}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "date": date.today().isoformat(), "processor": processor(), "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "scikit-learn")},
        "case": f"digits, {SHORT.tasks} tasks of {SHORT.samples} images, batch {BATCH}, {GLANCES} glances, memory "
        f"{MEMORY}, {REPLAYED} replayed, SGD", "seeds": arguments.seeds, "interval": "Student, 95 %",
    }  # fmt: skip
    result |= {kind: table(kind, arguments.seeds) for kind in get_args(Kind)}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
