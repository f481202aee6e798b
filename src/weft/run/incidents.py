"""The account of steps whose gradient was not finite: what they were made of, and when there were too many."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from weft.contracts import Phase
from weft.errors import RunError
from weft.events import Incident, Listener
from weft.run.folder import write_json
from weft.run.learner import Learner
from weft.run.train import Outcome


@dataclass(frozen=True)
class Incidents:
    """Keeps the batches and numbers of skipped steps. limit: how many in a row a run may have. private: a batch can be
    read as what it was made of, which nobody may: its keys and numbers alone are kept."""

    run: Path
    limit: int
    tell: Listener
    private: bool = False

    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        """Keep the batch and the numbers of a step whose gradient was not finite; stop after too many in a row."""
        in_a_row = learner.skipped_in_a_row
        overflow = outcome.overflow
        reason = "fp16 overflow, the loss scale was lowered" if overflow else "the gradient is not finite"
        folder = None if overflow else self._keep(learner, phase, outcome)
        self.tell(Incident(step=outcome.step, phase=phase.name, reason=reason, in_a_row=in_a_row,
                           folder=str(folder) if folder else None))  # fmt: skip
        if in_a_row >= (10 * self.limit if overflow else self.limit):
            raise RunError(
                f"{self.run}: {in_a_row} steps in a row had a gradient that is not finite, the last at step "
                f"{outcome.step}. Their items and numbers are in {self.run / 'incidents'}. Lower optimizer.lr or "
                "look at those items; the newest checkpoint is from before."
            )

    def _keep(self, learner: Learner, phase: Phase, outcome: Outcome) -> Path:
        folder = self.run / "incidents" / f"step_{outcome.step:06d}_{phase.name}"
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "step": outcome.step,
            "phase": phase.name,
            "seed": learner.seed,
            "drawn": outcome.drawn,
            "keys": [batch.keys for batch in outcome.batches],
            "metrics": {name: repr(value) for name, value in outcome.metrics.items()},
        }
        write_json(folder / f"incident.rank{learner.engine.rank}.json", facts)
        if self.private:
            return folder
        tensors = {
            f"{i}.{name}": t.cpu().contiguous() for i, b in enumerate(outcome.batches) for name, t in b.tensors.items()
        }
        save_file(tensors, folder / f"batches.rank{learner.engine.rank}.safetensors")
        return folder
