"""Samples of a run: the same prompts on the same noise each time, as videos and as one sheet of their frames."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

from weft.contracts import Distilled, Encoders
from weft.data.media import contact_sheet, write_video
from weft.events import Listener, PhaseStarted, Sampled
from weft.run.config import RunConfig
from weft.run.evaluate import averaged, in_use, resting
from weft.run.learner import Learner
from weft.run.sampling import decoded, generate
from weft.run.shortage import naming
from weft.run.shots import Shot, Told, encoded, in_few_steps, shots_of
from weft.run.stage import staged


@dataclass
class LazyEncoders:
    """Encoders that are loaded when first asked for, and let go when told."""

    load: Callable[[], Encoders]
    loaded: Encoders | None = None

    def open(self) -> Encoders:
        encoders = self.loaded or self.load()
        self.loaded = encoders
        return encoders

    def close(self) -> None:
        self.loaded = None


@dataclass
class Gallery:
    """Makes a run's samples. What the encoders say of prompts and images is kept, so they are asked once for it."""

    config: RunConfig
    tell: Listener
    encoders: LazyEncoders
    fps: float
    told: Told | None = None

    def sample(self, learner: Learner, adapter: bool = True) -> list[Path]:
        """Videos of every prompt, with the adapters or of the base alone."""
        with naming("sampling", learner.engine.device):
            return self._sample(learner, adapter)

    def shots(self, adapter: bool) -> list[Shot]:
        """What is generated. A few-step student is asked at its own times and without guidance; its teacher, the base,
        as samples say, and so is another expert that has no student."""
        samples, objective, family = self.config.samples, self.config.objective, self.config.family
        shots = shots_of(samples)
        if not adapter or not isinstance(objective, Distilled):
            return shots
        names = [expert.name for expert in family.all_experts]
        trained = [expert.name for expert in family.experts]
        others = [name for name in names if name not in trained] if samples.experts == "all" else []
        steps = objective.step_list(family)
        return [
            in_few_steps(shot, steps, {name: shot.guidance_of(name) if name in others else 1.0 for name in names})
            for shot in shots
        ]

    def _sample(self, learner: Learner, adapter: bool) -> list[Path]:
        shots = self.shots(adapter)
        if not shots:
            return []
        self.tell(PhaseStarted(phase="sampling", total=len(shots)))
        if self.told is None:
            self.told = encoded(shots, self.config.family, self.encoders.open())
            self.encoders.close()
        everyone = self.config.samples.experts == "all"
        with (
            resting(learner.model.network), averaged(learner), in_use(learner, adapter),
            staged(learner, everyone) as model,
        ):  # fmt: skip
            latents = generate(model, learner.engine, shots, self.told)
        if learner.engine.rank != 0:  # every rank answers, for a sharded network answers all at once; one writes
            return []
        folder = self.config.folder / "samples" / (f"step_{learner.step:06d}" if adapter else "base")
        folder.mkdir(parents=True, exist_ok=True)
        encoders = self.encoders.open()
        rows: list[tuple[str, numpy.ndarray]] = []
        files = []
        for i, (shot, latent) in enumerate(zip(shots, latents, strict=True)):
            frames = decoded(latent, encoders)
            files.append(folder / f"{i:02d}.mp4")
            write_video(files[-1], frames, self.fps)
            rows.append((shot.prompt, frames))
            self.tell(Sampled(step=learner.step, prompt=shot.prompt, seed=shot.seed, file=str(files[-1]),
                              adapter=adapter))  # fmt: skip
        contact_sheet(rows, folder / "sheet.png")
        self.encoders.close()
        return files
