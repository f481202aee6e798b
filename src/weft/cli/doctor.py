"""weft doctor: what this machine can do, and whether it does it right."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

SIGNS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "note": "-   "}


def run(argv: Sequence[str]) -> int:
    """Print the report. Exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="weft doctor", description="Check this machine.")
    parser.add_argument("--json", action="store_true", help="one JSON list in place of the report")
    parser.add_argument("--no-copies", action="store_true", help="leave out the self-test of each device")
    arguments = parser.parse_args(argv)

    from weft.cli.checks import Check, all_checks  # here, for torch takes seconds that --help need not wait

    found: list[Check] = []
    group = ""
    for check in all_checks(Path.cwd(), copies=not arguments.no_copies):
        found.append(check)
        if arguments.json:
            continue
        if check.group != group:
            group = check.group
            print(group)
        print(f"  {SIGNS[check.status]} {check.name:<20} {check.detail}", flush=True)
    failed = [check for check in found if check.status == "fail"]
    if arguments.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
    else:
        names = ", ".join(f"{check.group}: {check.name}" for check in failed)
        print(
            f"{len(failed)} of {len(found)} checks failed: {names}." if failed else f"{len(found)} checks, none failed."
        )
    return 1 if failed else 0
