"""Distil the shipped tiny Wan into a few steps, from captions alone, and measure what teacher, base and student draw.

Every video is judged against its caption, shape, colour and way together: on combinations of the three that the base
was trained on, or on those that it has never seen. Usage: python benchmarks/distillation.py [--json FILE] [--sheet PNG]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import numpy as np

from weft.contracts import as_video
from weft.data.media import contact_sheet
from weft.demo.judge import Verdict, judge
from weft.demo.shapes import FRAMES, SIDE, Scene, every_scene, is_held_out
from weft.few_steps import StepList
from weft.run.apply import Applied, apply_chosen, choose
from weft.run.sampling import decoded, generate
from weft.run.shots import Shot, encoded

EXAMPLE = Path(__file__).parents[1] / "examples" / "distillation" / "tiny.yaml"


@dataclass(frozen=True)
class Manner:
    """A way to make videos. calls: of the network for one video. student: with the adapter. steps_of: a student's own
    way through its steps, with fresh noise; None: the model's own sampler."""

    name: str
    steps: int
    guidance: float
    student: bool = False
    steps_of: StepList | None = None

    @property
    def calls(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)


def scenes(split: str, count: int, noises: int) -> list[Scene]:
    """So many different scenes of one side of the tiny world's split, each once for each noise that begins a video."""
    whole = [scene for scene in every_scene() if is_held_out(scene) == (split == "held-out")]
    return Random(0).sample(whole, min(count, len(whole))) * noises


def distil(arguments: argparse.Namespace) -> float:
    """Run `weft train` on the example; returns its seconds."""
    argv = [sys.executable, "-m", "weft", "train", str(EXAMPLE), f"output={arguments.out}",
            f"data.cache_folder={arguments.out / 'cache'}", f"engine.device={arguments.device}",
            *arguments.overrides]  # fmt: skip
    began = monotonic()
    subprocess.run(argv, check=True)
    return monotonic() - began


def verdicts(applied: Applied, asked: Sequence[Scene], manner: Manner) -> tuple[list[Verdict], list[np.ndarray]]:
    """Each scene's video in one manner, judged. The same noise for all manners."""
    shots = [
        Shot(prompt=scene.caption(), frames=FRAMES, width=SIDE, height=SIDE, steps=manner.steps,
             guidance=manner.guidance, seed=1000 + i)
        for i, scene in enumerate(asked)
    ]  # fmt: skip
    family = as_video(applied.model.family)
    if manner.steps_of:
        shots = [replace(shot, step_list=manner.steps_of) for shot in shots]
    told = encoded(shots, family, applied.encoders)
    with applied.use(manner.student):
        latents = generate(applied.model, applied.engine, shots, told)
    videos = [decoded(latent, applied.encoders) for latent in latents]
    return [judge(video, scene) for video, scene in zip(videos, asked, strict=True)], videos


def share(found: Sequence[Verdict], what: str) -> float:
    return sum(getattr(verdict, what) for verdict in found) / len(found)


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[tuple[str, np.ndarray]]]:
    """A row of figures for each manner, and the videos of some captions for a sheet."""
    chosen = choose([arguments.out / "four-steps"], None)
    steps = chosen.step_list
    assert steps is not None, "the adapter's header has no list of steps"
    applied = apply_chosen(chosen, arguments.device, "auto")
    asked = scenes(arguments.split, arguments.captions, arguments.noises)
    g, n = chosen.config["objective"]["guidance"], len(steps.times)
    manners = [
        Manner("teacher", 40, g), Manner("base", n, 1.0), Manner("base, guided", n, g),
        Manner("base in the student's way", n, 1.0, steps_of=steps), Manner("student", n, 1.0, True, steps),
    ]  # fmt: skip
    rows, drawn = [], {}
    for manner in manners:
        found, drawn[manner.name] = verdicts(applied, asked, manner)
        right = share(found, "right")
        rows.append({
            "manner": manner.name, "steps": manner.steps, "guidance": manner.guidance, "calls": manner.calls,
            **{what: round(share(found, what), 4) for what in ("color", "motion", "shape", "right")},
            "standard_error": round(sqrt(right * (1 - right) / len(found)), 4),
        })  # fmt: skip
        print(rows[-1], flush=True)
    sheet = [
        (f"{m.name}, {m.steps} steps, {m.calls} calls: {asked[i].caption()}", drawn[m.name][i])
        for i in range(arguments.shown) for m in manners
    ]  # fmt: skip
    return rows, sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/distillation"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--split", default="known", choices=["known", "held-out"], help="combinations to judge on")
    parser.add_argument("--captions", type=int, default=216, help="that are judged, at most")
    parser.add_argument("--noises", type=int, default=1, help="videos of each caption")
    parser.add_argument("--shown", type=int, default=4, help="captions on the sheet")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the example's config")
    parser.add_argument("--measure-only", action="store_true", help="of a run that is there")
    arguments = parser.parse_intermixed_args()
    seconds = None if arguments.measure_only else distil(arguments)
    rows, sheet = measure(arguments)
    if arguments.sheet:
        contact_sheet(sheet, arguments.sheet)
    if arguments.json:
        facts = {
            "benchmark": "distillation", "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in ("weft", "torch", "diffusers")},
            "overrides": arguments.overrides,
            "seconds_of_training": None if seconds is None else round(seconds),
            "split": arguments.split,
            "captions": arguments.captions,
            "noises": arguments.noises, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
