"""Between the steps: checkpoints, adapters, validation, samples, and the account of steps that went wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from weft import plugins
from weft.contracts import Phase
from weft.durable import write_folder
from weft.errors import RunError
from weft.events import Evaluated, Exported, Incident, Listener, PhaseStarted, Saved
from weft.formats.adapter_file import SavedAdapter
from weft.run.assemble import adapter_folder
from weft.run.checkpoint import save_checkpoint
from weft.run.config import RunConfig
from weft.run.evaluate import Evaluator, averaged
from weft.run.folder import write_json
from weft.run.learner import Learner
from weft.run.showing import Gallery
from weft.run.train import Outcome


@dataclass
class Keeper:
    """Saves, validates and samples a run when its config says so. Nothing here changes what is learned."""

    config: RunConfig
    inputs: Mapping[str, str]  # fingerprints of clips and model, kept in the checkpoints
    provenance: Mapping[str, str]
    tell: Listener
    gallery: Gallery
    evaluator: Evaluator | None
    saved_at: int | None = None
    evaluated_at: int | None = None
    last: Evaluated | None = None

    @property
    def run(self) -> Path:
        return self.config.folder

    def before_start(self, learner: Learner) -> None:
        """The state before the first step: validation, and the base's own samples."""
        if learner.step == 0:
            self._evaluate(learner)
            if self.config.samples.baseline and self.config.samples.prompts:
                self.gallery.sample(learner, adapter=False)

    def after_step(self, learner: Learner) -> None:
        step = learner.step
        if due(step, self.config.validation.every):
            self._evaluate(learner)
        if due(step, self.config.samples.every):
            self.gallery.sample(learner)
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
        self.export(learner, f"global_step_{learner.step}")
        folder = save_checkpoint(self.run, learner, self.recorded(), self.config.save.keep)
        self.saved_at = learner.step
        self.tell(Saved(step=learner.step, folder=str(folder)))

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint says that it was made from."""
        return {**self.config.resolved(), "inputs": dict(self.inputs)}

    def export(self, learner: Learner, stem: str) -> list[Path]:
        """The adapter of each expert (its moving average, where the run keeps one) in the config's formats.

        Returns the folders: the stem itself, or one for each expert, such as adapter_high.
        """
        folders = []
        for role, expert in zip(learner.shown, learner.experts, strict=True):
            with averaged(learner):
                state = learner.model.adapters.state_dict(role)
                tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            about = {**self.provenance, "weft.step": str(learner.step), "weft.expert": expert.name,
                     "weft.times": json.dumps(expert.times)}  # fmt: skip
            adapter = saved_adapter(self.config, learner, tensors, about)
            folders.append(self.run / adapter_folder(stem, expert.name))
            write_folder(folders[-1], partial(self._write, adapter))
        return folders

    def _write(self, adapter: SavedAdapter, folder: Path) -> None:
        for name in self.config.formats:
            plugins.find("format", name)().write(folder, adapter)

    def export_final(self, learner: Learner) -> list[Path]:
        folders = self.export(learner, "adapter")
        for folder in folders:
            self.tell(Exported(step=learner.step, folder=str(folder)))
        return folders

    def _evaluate(self, learner: Learner) -> None:
        if self.evaluator is None or not self.config.validation.every:
            return
        self.tell(PhaseStarted(phase="validating"))
        self.last = self.evaluator.evaluate(learner)
        self.evaluated_at = learner.step
        self.tell(self.last)

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


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def saved_adapter(
    config: RunConfig, learner: Learner, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> SavedAdapter:
    """A role's state with all that a reader needs to apply it, as the adapter's kind has it in files."""
    facts = config.adapter.exported(tensors)
    return SavedAdapter(**facts, targets=tuple(learner.model.adapters.paths), metadata=dict(metadata))
