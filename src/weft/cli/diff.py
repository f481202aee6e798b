"""weft diff: how two adapters, runs or configs were made differently, and how far their changes lie apart."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from weft.config.show import ABSENT

if TYPE_CHECKING:
    from weft.config.show import Change
    from weft.run.origins import Differences, Origin

LONGEST = 150  # columns of a line; --json cuts nothing


def run(argv: Sequence[str]) -> int:
    """Print the report; that there are differences is no failure."""
    parser = argparse.ArgumentParser(
        prog="weft diff",
        description="Say how two adapters, runs or configs were made differently: keys of the config, data, base, "
        "versions, and how far their changes lie apart. Layer by layer: weft verify.",
    )
    for name in ("one", "other"):
        parser.add_argument(name, type=Path, help="an adapter in any format, a run's folder, or a run.yaml")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object")
    arguments = parser.parse_args(argv)

    from weft.run.origins import differences, origin_of

    one, other = origin_of(arguments.one), origin_of(arguments.other)
    found = differences(one, other)
    print(json.dumps(_plain(found), indent=1) if arguments.json else _words(one, other, found))
    return 0


def _plain(found: "Differences") -> dict[str, object]:
    def listed(changes: "Sequence[Change]") -> dict[str, list[object]]:
        return {change.path: [change.old, change.new] for change in changes}

    return {
        "equal": found.none,
        "config": listed(found.config),
        "facts": listed(found.facts),
        "change": asdict(found.apart) if found.apart else None,
        **({"change not compared": found.why_not} if found.why_not else {}),
    }


def _words(one: "Origin", other: "Origin", found: "Differences") -> str:
    lines = []
    for origin in (one, other):
        if not origin.config:
            lines.append(f"{origin.path}: its header has no config of Weft's, so only facts are compared")
        lines += [f"{origin.path}: {problem}" for problem in origin.problems[:1]]
    shared = [change for change in found.facts if ABSENT not in (change.old, change.new)]
    facts = [f"{change.path}: {change.old} -> {change.new}" for change in shared]  # texts, without quotes
    for origin, alone in ((one, "new"), (other, "old")):
        names = [change.path for change in found.facts if getattr(change, alone) == ABSENT]
        facts += [f"told by {origin.path} alone: {', '.join(names)}"] if names else []
    for title, changes in (("config", [str(change) for change in found.config]), ("made of", facts)):
        if changes:
            lines += [f"{title}:", *(f"  {_cut(change)}" for change in changes)]
    if found.apart is not None:
        lines.append(_distance(found))
    elif one.adapter and other.adapter:
        lines.append(f"changes: not compared: {found.why_not}")
    if found.none:
        compared = "" if found.apart else "; weights were not compared"
        lines.append(f"no difference{compared}")
    return "\n".join(lines)


def _distance(found: "Differences") -> str:
    apart = found.apart
    assert apart is not None
    alone = f"; {apart.alone} layers are in one of them alone" if apart.alone else ""
    if apart.relative == 0:
        return f"changes: equal on {apart.layers} layers{alone}"
    cosine = "" if apart.cosine is None else f", cosine {apart.cosine:.6f}"
    return f"changes: {apart.relative:.3g} apart, relative to the first{cosine}, on {apart.layers} layers{alone}"


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
