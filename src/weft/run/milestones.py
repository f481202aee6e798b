"""Between the steps: checkpoints, adapters, validation, samples, and the account of steps that went wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from weft import plugins
from weft.contracts import Distilled, Phase
from weft.durable import write_folder
from weft.errors import RunError
from weft.events import Evaluated, Exported, Incident, Listener, PhaseStarted, Saved
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.run.assemble import adapter_folder
from weft.run.checkpoint import CheckpointWriter
from weft.run.checkpoint_folders import step_of
from weft.run.checkpoint_tree import under_way
from weft.run.config import RunConfig
from weft.run.evaluate import Evaluator, averaged
from weft.run.folder import write_json
from weft.run.learner import Learner
from weft.run.media import Showing
from weft.run.retention import Retention, due_by_epoch
from weft.run.train import Outcome


@dataclass
class Keeper:
    """Saves, validates and samples a run when its config says so. Nothing here changes what is learned."""

    config: RunConfig
    inputs: Mapping[str, str]  # fingerprints of clips and model, kept in the checkpoints
    provenance: Mapping[str, str]
    tell: Listener
    showing: Showing
    evaluator: Evaluator | None
    saved_at: int | None = None
    evaluated_at: int | None = None
    last: Evaluated | None = None
    writer: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        save = self.config.save
        kept = Retention(save.keep, save.keep_best, save.prune_adapters)
        self.writer = CheckpointWriter(self.run, kept, save.background)

    @property
    def run(self) -> Path:
        return self.config.folder

    def before_start(self, learner: Learner) -> None:
        """The state before the first step: validation, and the base's own samples."""
        if learner.step == 0:
            self._evaluate(learner)
            if self.config.samples.baseline and self.config.samples.prompts:
                self.showing.sample(learner, adapter=False)

    def after_step(self, learner: Learner) -> None:
        step = learner.step
        self._tell_saved()
        if due(step, self.config.validation.every):
            self._evaluate(learner)
        if due(step, self.config.samples.every):
            self.showing.sample(learner)
        if due(step, self.config.save.every) or self._an_epoch_ended(learner):
            self.save(learner)

    def _an_epoch_ended(self, learner: Learner) -> bool:
        """Whether the last step went past so many epochs as the config wants a checkpoint after."""
        current, per_phase = under_way(learner), self.config.schedule.accumulate * learner.engine.data_world
        if current is None:  # the end of the stretch saves of itself
            return False
        phases = learner.pace.micro_batches(learner.step) - learner.pace.micro_batches(learner.step - 1)
        before = learner.drawn - phases * per_phase
        return due_by_epoch(before, learner.drawn, current.epoch_draws, self.config.save.every_epochs)

    def after_experience(self, learner: Learner) -> None:
        self.finish(learner)

    def finish(self, learner: Learner) -> None:
        """The end of a stretch: validate and save, unless the last step just did."""
        if self.evaluated_at != learner.step:
            self._evaluate(learner)
        self.save(learner)
        self.settle()

    def save(self, learner: Learner) -> None:
        """A checkpoint to resume from, and the adapter beside it; not twice for one step. In the background: `settle`
        waits until it is whole. Raises RunError when the one before could not be written."""
        if self.saved_at == learner.step:
            return
        if self.config.save.keep_best and self.evaluated_at != learner.step:
            self._evaluate(learner)
        self.tell(PhaseStarted(phase="saving"))
        self.writer.wait()
        loss = self.last.loss if self.last and self.evaluated_at == learner.step else None
        adapters = self.gathered(learner, f"global_step_{learner.step}")
        self.writer.save(learner, self.recorded(), loss, partial(self._write, adapters))
        self.saved_at = learner.step
        self._tell_saved()

    def settle(self) -> None:
        """Wait until everything that was saved is whole. Raises RunError."""
        self.writer.wait()
        self._tell_saved()

    def close(self) -> None:
        """Let what is being saved end, also when the run has failed."""
        self.writer.close()

    def _tell_saved(self) -> None:
        for folder in self.writer.done():
            self.tell(Saved(step=step_of(folder), folder=str(folder)))

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint says that it was made from."""
        return {**self.config.resolved(), "inputs": dict(self.inputs)}

    def export(self, learner: Learner, stem: str) -> list[Path]:
        """Write the adapter of each expert (its moving average, where the run keeps one) in the config's formats.

        Returns the folders: the stem itself, or one for each expert, such as adapter_high.
        """
        adapters = self.gathered(learner, stem)
        self.settle()
        self.writer.shards.first(partial(self._write, adapters))
        return list(adapters)

    def gathered(self, learner: Learner, stem: str) -> dict[Path, SavedAdapter]:
        """Folder -> adapter as it is now, in host memory. Every rank must ask."""
        found = {}
        objective = learner.objective
        steps = objective.step_list(learner.model.family) if isinstance(objective, Distilled) else None
        few = {STEP_LIST: steps.to_json()} if steps else {}
        for role, expert in zip(learner.shown, learner.experts, strict=True):
            with averaged(learner):
                state = learner.model.adapters.state_dict(role)
                tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            about = {**self.provenance, "weft.step": str(learner.step), "weft.expert": expert.name,
                     "weft.times": json.dumps(expert.times), **few}  # fmt: skip
            folder = self.run / adapter_folder(stem, expert.name)
            found[folder] = saved_adapter(self.config, learner, role, tensors, about)
        return found

    def _write(self, adapters: Mapping[Path, SavedAdapter]) -> None:
        for folder, adapter in adapters.items():
            write_folder(folder, partial(self._fill, adapter))

    def _fill(self, adapter: SavedAdapter, folder: Path) -> None:
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
                f"{learner.step + 1}. Their items and numbers are in {self.run / 'incidents'}. Lower optimizer.lr or "
                "look at those items; the newest checkpoint is from before."
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
        write_json(folder / f"incident.rank{learner.engine.rank}.json", facts)
        tensors = {
            f"{i}.{name}": t.cpu().contiguous() for i, b in enumerate(outcome.batches) for name, t in b.tensors.items()
        }
        save_file(tensors, folder / f"batches.rank{learner.engine.rank}.safetensors")
        return folder


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def saved_adapter(
    config: RunConfig, learner: Learner, role: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> SavedAdapter:
    """A role's state with all that a reader needs to apply it, as the adapter's kind has it in files."""
    facts = config.adapter_of(role).exported(tensors)
    return SavedAdapter(**facts, targets=tuple(learner.model.adapters.paths_of(role)), metadata=dict(metadata))
