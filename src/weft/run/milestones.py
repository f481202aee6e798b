"""Between the steps: checkpoints, adapters, validation, samples, and the account of steps that went wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from weft import plugins
from weft.contracts import Encoders, Phase
from weft.data.media import contact_sheet, write_video
from weft.durable import write_folder
from weft.errors import RunError
from weft.events import Evaluated, Exported, Incident, Listener, PhaseStarted, Sampled, Saved
from weft.formats.adapter_file import SavedAdapter
from weft.run.checkpoint import save_checkpoint
from weft.run.config import RunConfig
from weft.run.evaluate import Evaluator, averaged, resting
from weft.run.folder import write_json
from weft.run.learner import Learner
from weft.run.sampling import Shot, decoded, encode_prompts, generate
from weft.run.train import Outcome


@dataclass
class Keeper:
    """Saves, validates and samples a run when its config says so. Nothing here changes what is learned."""

    config: RunConfig
    inputs: Mapping[str, str]  # fingerprints of clips and model, kept in the checkpoints
    provenance: Mapping[str, str]
    tell: Listener
    encoders: "LazyEncoders"
    evaluator: Evaluator | None
    fps: float
    saved_at: int | None = None
    evaluated_at: int | None = None
    last: Evaluated | None = None
    _text: dict[str, Tensor] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.config.folder

    def before_start(self, learner: Learner) -> None:
        """The state before the first step: validation, and the base's own samples."""
        if learner.step == 0:
            self._evaluate(learner)
            if self.config.samples.baseline and self.config.samples.prompts:
                self.sample(learner, adapter=False)

    def after_step(self, learner: Learner) -> None:
        step = learner.step
        if due(step, self.config.validation.every):
            self._evaluate(learner)
        if due(step, self.config.samples.every):
            self.sample(learner)
        if due(step, self.config.save.every):
            self.save(learner)

    def after_experience(self, learner: Learner) -> None:
        self.finish(learner)

    def finish(self, learner: Learner) -> None:
        """The end of a stretch: validate and save, unless the last step just did."""
        if self.evaluated_at != learner.step:
            self._evaluate(learner)
        self.save(learner)

    def save(self, learner: Learner) -> None:
        """A checkpoint to resume from, and the adapter beside it; not twice for one step."""
        if self.saved_at == learner.step:
            return
        self.tell(PhaseStarted(phase="saving"))
        self.export(learner, self.run / f"global_step_{learner.step}")
        folder = save_checkpoint(self.run, learner, self.recorded(), self.config.save.keep)
        self.saved_at = learner.step
        self.tell(Saved(step=learner.step, folder=str(folder)))

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint says that it was made from."""
        return {**self.config.resolved(), "inputs": dict(self.inputs)}

    def export(self, learner: Learner, folder: Path) -> None:
        """The first role's adapter (its moving average, where the run keeps one) in the config's formats."""
        role = learner.objective.roles[0]
        with averaged(learner):
            tensors = {name: t.detach().cpu().clone() for name, t in learner.model.adapters.state_dict(role).items()}
        adapter = saved_adapter(self.config, learner, tensors, {**self.provenance, "weft.step": str(learner.step)})

        def fill(target: Path) -> None:
            for name in self.config.save.formats:
                plugins.find("format", name)().write(target, adapter)

        write_folder(folder, fill)

    def export_final(self, learner: Learner) -> Path:
        folder = self.run / "adapter"
        self.export(learner, folder)
        self.tell(Exported(step=learner.step, folder=str(folder)))
        return folder

    def _evaluate(self, learner: Learner) -> None:
        if self.evaluator is None or not self.config.validation.every:
            return
        self.tell(PhaseStarted(phase="validating"))
        self.last = self.evaluator.evaluate(learner)
        self.evaluated_at = learner.step
        self.tell(self.last)

    def shots(self) -> list[Shot]:
        """What the config asks to be generated."""
        s = self.config.samples
        return [
            Shot(prompt=prompt, negative=s.negative, frames=s.frames, width=s.width, height=s.height, steps=s.steps,
                 guidance=s.guidance, seed=s.seed + i)
            for i, prompt in enumerate(s.prompts)
        ]  # fmt: skip

    def sample(self, learner: Learner, adapter: bool = True) -> list[Path]:
        """Videos of every prompt on the same noise each time, and one sheet of their frames."""
        shots = self.shots()
        if not shots:
            return []
        self.tell(PhaseStarted(phase="sampling", total=len(shots)))
        encoders = self.encoders.open()
        if not self._text:
            self._text = encode_prompts(shots, encoders)
        role = learner.objective.roles[0] if adapter else None
        with resting(learner.model.network), averaged(learner), learner.model.adapters.use(role):
            latents = generate(learner.model, learner.engine, self.config.family, shots, self._text)
        folder = self.run / "samples" / (f"step_{learner.step:06d}" if adapter else "base")
        folder.mkdir(parents=True, exist_ok=True)
        rows, files = [], []
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

    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        """Keep the batch and the numbers of a step whose gradient was not finite; stop after too many in a row."""
        in_a_row, limit = learner.skipped_in_a_row, self.config.schedule.incidents
        overflow = any(step.overflow for step in outcome.steps.values())
        reason = "fp16 overflow, the loss scale was lowered" if overflow else "the gradient is not finite"
        folder = None if overflow else self._keep_incident(learner, phase, outcome)
        self.tell(Incident(step=learner.step + 1, phase=phase.name, reason=reason, in_a_row=in_a_row,
                           folder=str(folder) if folder else None))  # fmt: skip
        if in_a_row >= (10 * limit if overflow else limit):
            raise RunError(
                f"{self.run}: {in_a_row} steps in a row had a gradient that is not finite, the last at step "
                f"{learner.step + 1}. Their clips and numbers are in {self.run / 'incidents'}. Lower optimizer.lr or "
                "look at those clips; the newest checkpoint is from before."
            )

    def _keep_incident(self, learner: Learner, phase: Phase, outcome: Outcome) -> Path:
        folder = self.run / "incidents" / f"step_{learner.step + 1:06d}_{phase.name}"
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "step": learner.step + 1,
            "phase": phase.name,
            "seed": learner.seed,
            "drawn": learner.drawn,
            "keys": [batch.keys for batch in outcome.batches],
            "metrics": {name: repr(value) for name, value in outcome.metrics.items()},
        }
        write_json(folder / "incident.json", facts)
        tensors = {
            f"{i}.{name}": t.cpu().contiguous() for i, b in enumerate(outcome.batches) for name, t in b.tensors.items()
        }
        save_file(tensors, folder / "batches.safetensors")
        return folder


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


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def saved_adapter(
    config: RunConfig, learner: Learner, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> SavedAdapter:
    """A role's tensors with all that a reader needs to apply them."""
    adapter = config.adapter
    return SavedAdapter(
        tensors=dict(tensors),
        rank=adapter.rank,
        alpha=float(adapter.alpha if adapter.alpha is not None else adapter.rank),
        rslora=adapter.rslora,
        dora=adapter.dora,
        targets=tuple(learner.model.adapters.paths),
        metadata=dict(metadata),
    )
