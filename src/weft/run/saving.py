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
from weft.math.sharded import whole
from weft.run.assemble import adapter_folder
from weft.run.checkpoint import CheckpointWriter
from weft.run.checkpoint_folders import step_of
from weft.run.checkpoint_tree import copy_of, tensors_of
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.retention import Retention


@dataclass(frozen=True)
class Export:
    """An adapter on its way into files. tensors: as they lie in the learner, by canonical name. whole: paths of modules
    that are trained whole beside it. options: what the network adds to the fields that its kind decides."""

    recipe: Any  # of its adapter's kind
    targets: tuple[str, ...]
    about: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    whole: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def saved(self, tensors: Mapping[str, Tensor]) -> SavedAdapter:
        """With copies in place of its tensors, and all that a reader needs to apply them."""
        beside = {name: tensor for name, tensor in tensors.items() if self._is_beside(name)}
        made = self.recipe.exported({name: tensor for name, tensor in tensors.items() if name not in beside})
        made |= {"tensors": {**made["tensors"], **beside}, "options": {**made.get("options", {}), **self.options}}
        return SavedAdapter(
            **made, targets=self.targets, metadata=dict(self.about), whole=self.whole, bias=self.recipe.biases
        )

    def _is_beside(self, name: str) -> bool:
        """Whether a tensor is of the network itself, and not of the adapter on it."""
        is_bias = self.recipe.biases != "none" and "bias" in name.rpartition(".")[2]
        return is_bias or name.startswith(tuple(f"{path}." for path in self.whole))


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
        exports = self.gathered(learner, f"global_step_{learner.step}")
        tensors = {f"{folder}/{name}": t for folder, export in exports.items() for name, t in export.tensors.items()}
        self.writer.save(learner, self.recorded(), loss, partial(self._write, exports), tensors)
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
        exports = self.gathered(learner, stem)
        self.settle()
        tensors = {f"{folder}/{name}": t for folder, export in exports.items() for name, t in export.tensors.items()}
        self.writer.shards.first(lambda: self._write(exports, {name: t.cpu() for name, t in tensors.items()}))
        return list(exports)

    def gathered(self, learner: Learner, stem: str) -> dict[Path, Export]:
        """Folder -> adapter, whose tensors may be the learner's own. Every rank must ask."""
        found = {}
        objective = learner.objective
        steps = objective.step_list(learner.model.family) if isinstance(objective, Distilled) else None
        own = {STEP_LIST: steps.to_json()} if steps else {}
        own |= {"weft.loss": f"{loss:.6g}"} if (loss := self.loss_at(learner.step)) is not None else {}
        own |= {"weft.rates": json.dumps(learner.rates)} if learner.rates else {}  # set by hand while it trained
        for role, expert in zip(learner.shown, learner.experts, strict=True):
            about = {**self.provenance, "weft.step": str(learner.step), "weft.steps": str(learner.pace.total),
                     "weft.expert": expert.name, "weft.times": json.dumps(expert.times),
                     "weft.saved": str(int(time.time())), **own}  # fmt: skip
            folder = self.config.folder / adapter_folder(stem, expert.name)
            recipe, adapters = self.config.adapter_of(role), learner.model.adapters
            found[folder] = Export(
                recipe, tuple(adapters.paths_of(role)), about, shown_tensors(learner, role), adapters.whole(role),
                recipe.of_network(learner.model.network),
            )  # fmt: skip
        return found

    def loss_at(self, step: int) -> float | None:
        """The loss of validation that the step was saved with."""
        return self.measured[1] if self.measured[0] == step else None

    def _write(self, exports: Mapping[Path, Export], tensors: Mapping[str, Tensor]) -> None:
        """Write adapters of tensors in host memory."""
        for folder, export in exports.items():
            adapter = export.saved({name: tensors[f"{folder}/{name}"] for name in export.tensors})
            write_folder(folder, partial(self._fill, adapter))

    def _fill(self, adapter: SavedAdapter, folder: Path) -> None:
        for name in self.config.formats:
            plugins.find("format", name)().write(folder, adapter)


def shown_tensors(learner: Learner, role: str) -> dict[str, Tensor]:
    """A role's adapter as it is exported: whole tensors, of its moving average where there is one. Those that are not
    sharded share the learner's memory, unless they may be carried about with the frozen weights. Every rank must
    ask."""
    adapters = learner.model.adapters
    average = learner.ema[role].tensors if role in learner.ema else {}
    own = {**tensors_of(adapters, role), **average} if average else adapters.state_dict(role)
    return {name: whole(tensor.detach()) for name, tensor in {**own, **copy_of(adapters.fixed(role))}.items()}
