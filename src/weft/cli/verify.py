"""weft verify: whether two adapters change a model alike, layer by layer."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.exporting import Origin
    from weft.run.verifying import Verified

SHOWN = 10  # layers that differ most


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft verify",
        description="Compare what two adapters change, whatever their formats: for each layer ||A - B|| / ||A||. "
        "Exit code 0: alike; 1: not; 2: one of them cannot be read.",
    )
    parser.add_argument("one", type=Path, metavar="A", help="an adapter, or the folder of a run")
    parser.add_argument("other", type=Path, metavar="B")
    parser.add_argument("--expert", choices=("high", "low"), help="of two; default: each with the other's of its kind")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative; default 1e-6, which fits fp32")
    parser.add_argument("--json", action="store_true", help="every layer, as one JSON object")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Compare, and say which layers differ."""
    arguments = arguments_of(argv)
    if not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance: expected a number of at least 0, got {arguments.tolerance}.")

    from weft.run.exporting import origins
    from weft.run.verifying import compare

    ones, others = (chosen(origins(path), arguments.expert) for path in (arguments.one, arguments.other))
    if len(ones) != len(others):
        several = arguments.one if len(ones) > 1 else arguments.other
        raise ConfigError(f"--expert: {several} holds adapters for high and for low noise. Say which one is meant.")
    pairs = zip(ones, others, strict=True)
    found = {one.expert: compare(one.adapter, other.adapter, arguments.tolerance) for one, other in pairs}
    if arguments.json:
        each = {expert: facts_of(verified) for expert, verified in found.items()}
        print(json.dumps(each if len(each) > 1 else next(iter(each.values())), indent=1))
    else:
        for expert, verified in found.items():
            tell(verified, f"{expert} noise: " if len(found) > 1 else "")
    return 0 if all(verified.is_equal for verified in found.values()) else 1


def chosen(found: "list[Origin]", expert: str | None) -> "list[Origin]":
    """Of an adapter for two experts the one that is meant; of another one all that there is."""
    return [one for one in found if expert in (None, one.expert)] if len(found) > 1 else found


def facts_of(found: "Verified") -> dict[str, Any]:
    """Numbers that JSON has not are told as words."""
    differences = {path: apart if apart < float("inf") else "other" for path, apart in found.differences.items()}
    largest = found.largest if found.largest < float("inf") else "other"
    return {"equal": found.is_equal, "tolerance": found.tolerance, "largest": largest, "alone": list(found.alone),
            "layers": differences}  # fmt: skip


def tell(found: "Verified", which: str = "") -> None:
    count = len(found.differences)
    beyond = found.worst(count)
    if found.is_equal:
        print(f"{which}alike: {count} layers, {found.largest:.1e} apart at most (tolerance {found.tolerance:g})")
        return
    if count:
        how_far = f"by more than {found.tolerance:g}, {found.largest:.2e} at most"
        print(f"{which}different: {len(beyond)} of {count} layers {how_far}")
    else:
        print(f"{which}different: they have no layer in common")
    for path, apart in beyond[:SHOWN]:
        print(f"{apart:10.2e}  {path}" if apart < float("inf") else f"{'other':>10}  {path} (of another kind or size)")
    if found.alone:
        print(f"changed in one of the two alone: {len(found.alone)} layers, first {found.alone[0]}")
