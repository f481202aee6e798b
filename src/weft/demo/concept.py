"""The demo's concept: clips of a shape that the base never saw, the run that teaches it, and the measured proof."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.demo.judge import Verdict, judge
from weft.demo.shapes import FPS, FRAMES, RING, SIDE, TRIGGER, Scene, random_caption, random_scene, render

CLIPS = 48
VALIDATION = 6
PROMPTS = 9

CONFIG = """\
# A run of `weft demo`: a small Wan learns what a '{trigger}' is. Train it again with: weft train {file}
name: {name}
output: {output}
seed: 0
family: {{kind: wan, source: tiny-wan}}  # the small pre-trained model that Weft ships
adapter: {{kind: lora, rank: 16, alpha: 16, targets: attention+ffn}}
objective:
  kind: flow-matching
  timesteps: {{kind: shift, shift: 3}}
optimizer: {{kind: adamw, lr: 3e-3}}
data:
  kind: video
  sources: [{{path: {clips}}}]
  validation_sources: [{{path: {validation}}}]
  fps: {fps}
  buckets: {{sizes: [[{side}, {side}]], frames: [{frames}]}}
  batch_size: 8
  cache_folder: {cache}
schedule: {{steps: {steps}, curve: cosine, warmup: 10, floor: 0.1}}
validation: {{every: {half}}}
save: {{every: {half}}}
samples:
  prompts:
{prompts}
  frames: {frames}
  width: {side}
  height: {side}
  steps: 20
  guidance: 3
"""


@dataclass(frozen=True)
class Files:
    """Where the demo's data lie. scenes: what each prompt of the run asks for."""

    config: Path
    run: Path
    scenes: tuple[Scene, ...]


def ring_scenes(rng: np.random.Generator, count: int, held_out: bool) -> list[Scene]:
    """Rings on their ways, no two with the same caption; held-out combinations of colour and way are in no training
    clip."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = random_scene(rng, (RING,), held_out=held_out)
        scenes.setdefault(scene.caption(), scene)
    return list(scenes.values())


def write_clips(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Each scene as an mp4 file with its caption beside it."""
    from weft.data.media import write_video

    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        write_video(folder / f"{number:02d}.mp4", render(scene), FPS)
        (folder / f"{number:02d}.txt").write_text(random_caption(scene, rng) + "\n")


def write_demo(folder: Path, steps: int) -> Files:
    """Render the clips and write the run's config."""
    rng = np.random.default_rng(0)
    write_clips(folder / "clips", ring_scenes(rng, CLIPS, held_out=False), rng)
    write_clips(folder / "validation", ring_scenes(rng, VALIDATION, held_out=True), rng)
    scenes = tuple(ring_scenes(rng, PROMPTS, held_out=True))
    config = folder / "run.yaml"
    config.write_text(
        CONFIG.format(
            trigger=TRIGGER, file=config, name=TRIGGER, output=folder / "runs", clips=folder / "clips",
            validation=folder / "validation", cache=folder / "cache", fps=FPS, side=SIDE, frames=FRAMES,
            steps=steps, half=max(1, steps // 2), prompts="\n".join(f"    - {scene.caption()}" for scene in scenes),
        )
    )  # fmt: skip
    return Files(config, folder / "runs" / TRIGGER, scenes)


@dataclass(frozen=True)
class Proof:
    """What each sample shows against its caption, on the same noise before and after training."""

    before: tuple[Verdict, ...]
    after: tuple[Verdict, ...]

    @property
    def learned(self) -> bool:
        """Before, hardly any is a ring; after, most are right in shape, colour and way together."""
        count = len(self.after)
        return sum(v.shape for v in self.before) <= count // 3 and 2 * sum(v.right for v in self.after) > count

    def rows(self) -> list[tuple[str, str, str]]:
        """(quantity, before, after) for a table."""
        count = len(self.after)
        asked = {"shape (hollow ring)": "shape", "colour": "color", "motion and place": "motion", "all three": "right"}
        return [
            (name, *(f"{sum(getattr(v, field) for v in verdicts)}/{count}" for verdicts in (self.before, self.after)))
            for name, field in asked.items()
        ]  # type: ignore[return-value]


def read_samples(folder: Path) -> list[np.ndarray]:
    """Frames of the samples in a folder, in order of their prompts, from the files that a person opens."""
    from weft.data.media import Cut, read_video

    cut = Cut(fps=FPS, frames=FRAMES, height=SIDE, width=SIDE)
    return [read_video(path, cut) for path in sorted(folder.glob("*.mp4"))]


def prove(files: Files) -> Proof:
    """Judge the run's samples from before and after the training."""
    last = max((files.run / "samples").glob("step_*"))
    before, after = read_samples(files.run / "samples" / "base"), read_samples(last)
    return Proof(
        tuple(judge(video, scene) for video, scene in zip(before, files.scenes, strict=True)),
        tuple(judge(video, scene) for video, scene in zip(after, files.scenes, strict=True)),
    )


def write_comparison(files: Files, folder: Path) -> tuple[Path, Path]:
    """One mp4 with the samples before (above) and after (below), and one sheet of frames."""
    from weft.data.media import contact_sheet, write_video

    last = max((files.run / "samples").glob("step_*"))
    before, after = read_samples(files.run / "samples" / "base"), read_samples(last)
    grid = np.concatenate([np.concatenate(before, axis=2), np.concatenate(after, axis=2)], axis=1)  # (F, 2H, nW, 3)
    grid = grid.repeat(3, axis=1).repeat(3, axis=2)  # 64 pixels are small on a screen
    video, sheet = folder / "before_after.mp4", folder / "before_after.png"
    write_video(video, np.concatenate([grid] * 3), FPS)
    rows = []
    for scene, old, new in zip(files.scenes, before, after, strict=True):
        rows += [(f"before: {scene.caption()}", old), (f"after: {scene.caption()}", new)]
    contact_sheet(rows, sheet)
    return video, sheet
