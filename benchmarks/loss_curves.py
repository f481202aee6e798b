"""How far training with each option of speed and memory is from training with none: small models of all families.

    python -m benchmarks.loss_curves --steps 50 --json benchmarks/results/loss-curves-cpu.json

Each row is a run beside one of the same model, batches and first weights in the libraries' own code: the largest
relative difference of a loss, and that of the way that all weights together have gone. Compiled blocks are traced and
parted as for inductor and run operator by operator; --inductor compiles one run for real.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.run.options import ALONE, KINDS, PLAIN, TOGETHER, Kind, Small, Way, apart, curve

from weft.run.bench_machine import processor

COMPILED_WITH = "native"  # tracing takes longer than the steps


def ways(backend: str, precision: str) -> Iterator[tuple[str, Way]]:
    """In half precision the libraries' own code rounds elsewhere at every step, so that all together say enough."""
    for name, way in {**(ALONE if precision == "fp32" else {}), **TOGETHER}.items():
        if way.budget is None or (backend == COMPILED_WITH and precision == "fp32"):
            yield name, way


def rows_of(kind: Kind, folder: Path, steps: int, precision: str, backend: str) -> dict[str, Any]:
    small, change = Small.make(kind, folder), {"precision": precision}
    plain, rows = curve(small, PLAIN, backend, steps, engine=change), dict[str, Any]()
    truth = plain if precision == "fp32" else curve(small, PLAIN, backend, steps, engine={"precision": "fp32"})
    rows["none"] = {"first": plain.losses[0], "last": plain.losses[-1]}
    if precision != "fp32":
        rows["none"]["from_fp32"] = dict(zip(("loss", "weights"), apart(plain, truth), strict=True))
    for name, way in ways(backend, precision):
        found = curve(small, way, backend, steps, engine=change)
        loss, weights = apart(found, plain)
        rows[name] = {"loss": loss, "weights": weights}
        if precision != "fp32":
            rows[name]["from_fp32"] = dict(zip(("loss", "weights"), apart(found, truth), strict=True))
        print(f"  {kind}, {precision}, {backend:<7} {name:<32} loss {loss:.1e}, weights {weights:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backends", nargs="+", default=["native", "peft"])
    parser.add_argument("--inductor", action="store_true", help="one more run, of Wan, compiled by inductor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    result = {
        "date": date.today().isoformat(), "processor": processor(),
        "versions": {name: version(name) for name in ("weft", "torch", "diffusers", "transformers", "peft")},
        "steps": arguments.steps, "rows": rows,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        for number, kind in enumerate(KINDS):
            for precision in ("fp32", "bf16"):
                for backend in arguments.backends:
                    folder = Path(root) / f"{number}-{precision}-{backend}"
                    found = rows_of(kind, folder, arguments.steps, precision, backend)
                    rows.setdefault(kind, {}).setdefault(precision, {})[backend] = found
                    if arguments.json:  # what is measured stays, come what may
                        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        if arguments.inductor:
            small = Small.make("Wan", Path(root) / "inductor")
            plain = curve(small, PLAIN, COMPILED_WITH, arguments.steps)
            found = curve(small, TOGETHER["all, compiled"], COMPILED_WITH, arguments.steps, inductor=True)
            result["inductor"] = dict(zip(("loss", "weights"), apart(found, plain), strict=True))
            print(f"  Wan, compiled by inductor: {result['inductor']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
