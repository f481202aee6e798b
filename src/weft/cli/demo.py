"""weft demo: a LoRA on real mp4 files in under two minutes on two cores, and the measured proof that it learned."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Render clips, then `weft plan` and `weft train` on them; exit code 1 when the concept was not learned."""
    parser = argparse.ArgumentParser(prog="weft demo", description="A LoRA on a small model, from clips to proof.")
    parser.add_argument("--out", type=Path, default=Path("weft-demo"), help="folder for all of it (default: weft-demo)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    arguments = parser.parse_args(argv)

    from weft.errors import RunError

    out: Path = arguments.out
    if (out / "runs").exists():
        raise RunError(f"{out} holds an earlier demo. Delete that folder, or choose another: weft demo --out FOLDER.")

    began = time.monotonic()
    from weft.cli import plan, train
    from weft.demo.concept import CLIPS, TRIGGER, prove, write_comparison, write_demo

    files = write_demo(out, arguments.steps)
    print(f"{CLIPS} clips of a '{TRIGGER}', a shape that the small base model has never seen: {out / 'clips'}\n")
    for verb, name in ((plan.run, "plan"), (train.run, "train")):
        print(f"$ weft {name} {files.config}", flush=True)
        code = verb([str(files.config)])
        if code:
            return code
        print(flush=True)
    proof = prove(files)
    video, sheet = write_comparison(files, out)
    print_proof(proof.rows())
    print(f"\nsee for yourself: {video}\n                  {sheet}\nthe adapter:      {files.run / 'adapter'}")
    seconds = round(time.monotonic() - began)
    print(f"{seconds} s in all")
    figures = {"steps": arguments.steps, "seconds": seconds, "right": proof.rows()}
    (out / "proof.json").write_text(json.dumps(figures, indent=1) + "\n")
    if not proof.learned:
        print("the samples do not show that the concept was learned; try more --steps", file=sys.stderr)
        return 1
    return 0


def print_proof(rows: Sequence[tuple[str, str, str]]) -> None:
    """Before against after, measured on videos of captions that no training clip had."""
    print("measured in the videos of held-out captions, same noise:")
    print(f"  {'':<22}{'before':>8}{'after':>8}")
    for name, before, after in rows:
        print(f"  {name:<22}{before:>8}{after:>8}")
