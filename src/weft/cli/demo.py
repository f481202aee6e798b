"""weft demo: a LoRA on real mp4 files, or a classifier through drifting years, in two minutes, and what came of it."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Render clips, then `weft plan` and `weft train` on them; exit code 1 when the concept was not learned. With
    --continual the same for dated documents, of which a table is all that is claimed."""
    parser = argparse.ArgumentParser(prog="weft demo", description="A LoRA on a small model, from clips to proof.")
    parser.add_argument("--continual", action="store_true", help="documents that drift by the year, and two learners")
    parser.add_argument("--data-only", action="store_true", help="with --continual: write documents and configs alone")
    parser.add_argument("--out", type=Path, default=Path("weft-demo"), help="folder for all of it (default: weft-demo)")
    parser.add_argument("--steps", type=int, help="training steps on clips (default: 300)")
    arguments = parser.parse_args(argv)

    from weft.errors import ConfigError, RunError

    if arguments.continual and arguments.steps is not None:
        raise ConfigError("--steps is of clips; of documents each year is shown once. Leave it out.")
    if arguments.data_only and not arguments.continual:
        raise ConfigError("--data-only is of documents: weft demo --continual --data-only.")

    out: Path = arguments.out
    if (out / "runs").exists():
        raise RunError(f"{out} holds an earlier demo. Delete that folder, or choose another: weft demo --out FOLDER.")

    if arguments.continual:
        return through_the_years(out, arguments.data_only)
    return learn_a_concept(out, 300 if arguments.steps is None else arguments.steps)


def learn_a_concept(out: Path, steps: int) -> int:
    """Clips, plan, training, proof."""
    began = time.monotonic()
    from weft.cli import plan, train
    from weft.demo.concept import CLIPS, TRIGGER, prove, write_comparison, write_demo

    files = write_demo(out, steps)
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
    figures = {"steps": steps, "seconds": seconds, "right": proof.rows()}
    (out / "proof.json").write_text(json.dumps(figures, indent=1) + "\n")
    if not proof.learned:
        print("the samples do not show that the concept was learned; try more --steps", file=sys.stderr)
        return 1
    return 0


def through_the_years(out: Path, data_only: bool) -> int:
    """Documents, a base model, then each learner through all the years, and a table of what came of it."""
    began = time.monotonic()
    from weft.cli import train
    from weft.demo.continual import MAIN, bayes_accuracy, rows_of, write_world
    from weft.demo.drift import BANNER, Drift

    world = write_world(out, Drift())
    print(f"{BANNER}\n{world.drift.documents}: sha256 {world.drift.checksum[:16]}")
    print(f"what no learner may read: {world.drift.truth}")
    if data_only:
        print("Next:")
        for file in (world.base, *world.configs.values()):
            print(f"  weft train {file}")
        return 0
    import torch

    torch.set_num_threads(1)  # several wait for one another on a model this small, for minutes where a core is busy
    for file in (world.base, *world.configs.values()):
        print(f"\n$ weft train {file}", flush=True)
        if code := train.run([str(file)]):
            return code
    best = ", ".join(f"{year} {share:.3f}" for year, share in bayes_accuracy(world).items())
    print(f"\n{BANNER}\nbest possible {MAIN} of each year: {best}\n")
    print_table(("learner", "ACC", "BWT", "forgetting", "next year", "gradients"), rows_of(world))
    runs = " ".join(str(world.runs / learner) for learner in world.configs)
    print(f"\none seed, so these numbers compare nothing yet. All of them: weft compare {runs}")
    print(f"{round(time.monotonic() - began)} s in all")
    return 0


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )


def print_proof(rows: Sequence[tuple[str, str, str]]) -> None:
    """Before against after, measured on videos of captions that no training clip had."""
    print("measured in the videos of held-out captions, same noise:")
    print(f"  {'':<22}{'before':>8}{'after':>8}")
    for name, before, after in rows:
        print(f"  {name:<22}{before:>8}{after:>8}")
