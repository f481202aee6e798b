"""What a run leaves: checkpoints to resume from, and adapters for use, in the config's formats."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from weft import plugins
from weft.contracts import Distilled
from weft.durable import write_folder
from weft.events import Exported, Listener, PhaseStarted, Saved
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.run.assemble import adapter_folder
from weft.run.checkpoint import CheckpointWriter
from weft.run.checkpoint_folders import step_of
from weft.run.config import RunConfig
from weft.run.evaluate import averaged
from weft.run.learner import Learner
from weft.run.retention import Retention


@dataclass
class Saver:
    """Writes a run's checkpoints and adapters when it is told to. saved_at: the step of the newest checkpoint."""

    config: RunConfig
    inputs: Mapping[str, str]  # fingerprints of clips and model, kept in the checkpoints
    provenance: Mapping[str, str]
    tell: Listener
    saved_at: int | None = None
    measured: tuple[int, float | None] = (0, None)  # the last step that was saved, and its loss of validation
    writer: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        save = self.config.save
        kept = Retention(save.keep, save.keep_best, save.prune_adapters)
        self.writer = CheckpointWriter(self.config.folder, kept, save.background)

    def save(self, learner: Learner, loss: float | None) -> None:
        """A checkpoint to resume from, and the adapter beside it. loss: of validation at this step. In the background:
        `settle` waits until it is whole. Raises RunError when the one before could not be written."""
        self.tell(PhaseStarted(phase="saving"))
        self.writer.wait()
        self.measured = (learner.step, loss)
        adapters = self.gathered(learner, f"global_step_{learner.step}")
        self.writer.save(learner, self.recorded(), loss, partial(self._write, adapters))
        self.saved_at = learner.step
        self.tell_saved()

    def settle(self) -> None:
        """Wait until everything that was saved is whole. Raises RunError."""
        self.writer.wait()
        self.tell_saved()

    def close(self) -> None:
        """Let what is being saved end, also when the run has failed."""
        self.writer.close()

    def tell_saved(self) -> None:
        """Tell of each checkpoint that has become whole. Raises RunError when one could not be written."""
        for folder in self.writer.done():
            self.tell(Saved(step=step_of(folder), folder=str(folder)))

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint says that it was made from."""
        return {**self.config.resolved(), "inputs": dict(self.inputs)}

    def export_final(self, learner: Learner) -> list[Path]:
        """The finished adapters."""
        folders = self.export(learner, "adapter")
        for folder in folders:
            self.tell(Exported(step=learner.step, folder=str(folder)))
        return folders

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
        own = {STEP_LIST: steps.to_json()} if steps else {}
        own |= {"weft.loss": f"{loss:.6g}"} if (loss := self.loss_at(learner.step)) is not None else {}
        own |= {"weft.rates": json.dumps(learner.rates)} if learner.rates else {}  # set by hand while it trained
        for role, expert in zip(learner.shown, learner.experts, strict=True):
            with averaged(learner):
                state = learner.model.adapters.state_dict(role)
                tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            about = {**self.provenance, "weft.step": str(learner.step), "weft.steps": str(learner.pace.total),
                     "weft.expert": expert.name, "weft.times": json.dumps(expert.times),
                     "weft.saved": str(int(time.time())), **own}  # fmt: skip
            folder = self.config.folder / adapter_folder(stem, expert.name)
            found[folder] = saved_adapter(self.config, learner, role, tensors, about)
        return found

    def loss_at(self, step: int) -> float | None:
        """The loss of validation that the step was saved with."""
        return self.measured[1] if self.measured[0] == step else None

    def _write(self, adapters: Mapping[Path, SavedAdapter]) -> None:
        for folder, adapter in adapters.items():
            write_folder(folder, partial(self._fill, adapter))

    def _fill(self, adapter: SavedAdapter, folder: Path) -> None:
        for name in self.config.formats:
            plugins.find("format", name)().write(folder, adapter)


def saved_adapter(
    config: RunConfig, learner: Learner, role: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> SavedAdapter:
    """A role's state with all that a reader needs to apply it, as the adapter's kind has it in files."""
    facts = config.adapter_of(role).exported(tensors)
    return SavedAdapter(**facts, targets=tuple(learner.model.adapters.paths_of(role)), metadata=dict(metadata))
