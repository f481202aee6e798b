"""weft verify: whether two adapters change a model alike, layer by layer."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.verifying import Verified

SHOWN = 10  # layers that differ most


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft verify",
        description="Compare what two adapters change, whatever their formats: for each layer ||A - B|| / ||A||. "
        "Exit code 0: alike; 1: not; 2: one of them cannot be read.",
    )
    parser.add_argument("one", type=Path, metavar="A", help="an adapter, or a run's folder with one")
    parser.add_argument("other", type=Path, metavar="B")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative; default 1e-6, which fits fp32")
    parser.add_argument("--json", action="store_true", help="every layer, as one JSON object")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Compare, and say which layers differ."""
    arguments = arguments_of(argv)
    if not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance: expected a number of at least 0, got {arguments.tolerance}.")

    from weft.formats.reading import read_adapter
    from weft.run.assemble import find_adapter
    from weft.run.verifying import compare

    one, other = (read_adapter(find_adapter(path)) for path in (arguments.one, arguments.other))
    found = compare(one, other, arguments.tolerance)
    if arguments.json:
        print(json.dumps(facts_of(found), indent=1))
    else:
        tell(found)
    return 0 if found.is_equal else 1


def facts_of(found: "Verified") -> dict[str, Any]:
    """Numbers that JSON has not are told as words."""
    differences = {path: apart if apart < float("inf") else "other" for path, apart in found.differences.items()}
    largest = found.largest if found.largest < float("inf") else "other"
    return {"equal": found.is_equal, "tolerance": found.tolerance, "largest": largest, "alone": list(found.alone),
            "layers": differences}  # fmt: skip


def tell(found: "Verified") -> None:
    count = len(found.differences)
    beyond = found.worst(count)
    if found.is_equal:
        print(f"alike: {count} layers, {found.largest:.1e} apart at most (tolerance {found.tolerance:g})")
        return
    print(f"different: {len(beyond)} of {count} layers by more than {found.tolerance:g}, {found.largest:.2e} at most")
    for path, apart in beyond[:SHOWN]:
        print(f"{apart:10.2e}  {path}" if apart < float("inf") else f"{'other':>10}  {path} (of another kind or size)")
    if found.alone:
        print(f"changed in one of the two alone: {len(found.alone)} layers, first {found.alone[0]}")
