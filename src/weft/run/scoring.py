"""Scores a learner on every task's test documents: before training, and after each experience of the stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from weft.contracts import UNLEARNED, Batch, Documents, as_encoder
from weft.events import Listener, PhaseStarted, Scored
from weft.math.scores import Truth
from weft.run.evaluate import averaged, in_use, resting
from weft.run.learner import Learner
from weft.run.listeners import finite, read_events
from weft.run.predictions import JOINT, UNTRAINED, Answers, Row, keys_of, write_row
from weft.run.score_table import write_summary
from weft.run.shortage import naming

Told = dict[tuple[str, str], Mapping[str, Any]]  # (metric, after) -> what was told


@runtime_checkable
class Costed(Protocol):
    """An objective that knows what its steps cost beside those of others."""

    @property
    def gradient_evaluations(self) -> float:
        """Forward and backward passes of one batch that a step costs."""
        ...


@dataclass
class Scorer:
    """Asks for the test documents of all tasks, later ones too, and keeps what was answered in the run's folder.

    tests, validations: task -> batches in a fixed order, with `ids`, `mask`, `labels` and, where patients are known,
    `group` (B,) int64. Of the validation documents those of tasks that were learned are asked, and no others.
    """

    tests: Mapping[str, Sequence[Batch]]
    validations: Mapping[str, Sequence[Batch]]
    run: Path
    tell: Listener
    _told: Told | None = field(default=None, repr=False)

    def score(self, learner: Learner, after: str) -> Row:
        """One row of the matrix: predictions/NUMBER-AFTER.safetensors, and an event for each metric. after: the
        experience that was just learned, or UNTRAINED. Every rank must ask. A run that goes on from here makes the
        row anew, for it may have been killed in the midst of it; an event that readers of its log know is not told
        again."""
        self.tell(PhaseStarted(phase="validating"))
        stream = [experience.name for experience in learner.stream]
        number = number_of(learner, after)
        learned = [task for task in self.validations if JOINT in stream[:number] or task in stream[:number]]
        with resting(learner.model.network), torch.no_grad(), averaged(learner):
            tests = {task: self._answers(learner, batches) for task, batches in self.tests.items()}
            past = {task: self._answers(learner, self.validations[task]) for task in learned}
        row = Row(number, after, learner.step, tests, past)
        if learner.engine.rank == 0:
            write_row(self.run, row)
        for metric, scores in row.scores.items():
            known = {task: float("nan") if value is None else value for task, value in scores.items()}
            self._tell(learner, Scored(step=learner.step, after=after, metric=metric, scores=known))
        return row

    def conclude(self, learner: Learner, micro_batches: int) -> None:
        """At the end of a run: summary.json. micro_batches: of all data ranks in a step of one phase."""
        if learner.engine.rank == 0:
            phases = learner.pace.micro_batches(learner.step)
            objective = learner.objective
            cost = objective.gradient_evaluations * phases * micro_batches if isinstance(objective, Costed) else None
            write_summary(self.run, cost)

    def _tell(self, learner: Learner, event: Scored) -> None:
        key, said = (event.metric, event.after), {"step": event.step, "scores": finite(event.scores)}
        if self._known(learner).get(key) != said:
            self.tell(event)
            self._known(learner)[key] = said

    def _known(self, learner: Learner) -> Told:
        if self._told is None:
            self._told = told_rows(self.run / f"events.rank{learner.engine.rank}.jsonl")
        return self._told

    def _answers(self, learner: Learner, batches: Sequence[Batch]) -> Answers:
        """Of documents that have a label. The data ranks share the batches; each asks equally often, for sharded
        networks answer all ranks at once."""
        logits = _logits(learner, batches)
        labels = torch.cat([batch["labels"].cpu() for batch in batches] or [torch.zeros(0).long()])
        several = labels.ndim == 2
        chances = (logits.sigmoid() if several else logits.softmax(1)).numpy()
        known = ((~labels.isnan()).any(1) if several else labels != UNLEARNED).numpy()
        keys = keys_of([key for batch in batches for key in batch.keys])
        grouped = batches and all("group" in batch.tensors for batch in batches)
        groups = torch.cat([batch["group"].cpu() for batch in batches]).numpy()[known] if grouped else None
        truth: Truth = labels.float().numpy() if several else labels.long().numpy()
        return Answers(chances[known], truth[known], keys[known], groups)


def number_of(learner: Learner, after: str) -> int:
    """Of a row: 0 before any training, then 1, 2, ... in the order of the stream."""
    return 0 if after == UNTRAINED else [each.name for each in learner.stream].index(after) + 1


def _logits(learner: Learner, batches: Sequence[Batch]) -> Tensor:
    """(N, C) in float64 on the cpu."""
    engine, found = learner.engine, list[Tensor]()
    for start in range(0, len(batches), engine.data_world):
        number = start + engine.data_rank
        asked = engine.put(batches[min(number, len(batches) - 1)])
        with naming("scoring", engine.device, tuple(asked["ids"].shape)), in_use(learner), engine.computing():
            logits = learner.model.logits(Documents(asked["ids"], asked["mask"])).detach()
        for other in range(engine.data_world):  # each rank's own rows, and zeros for the others' to be summed
            at = start + other
            if at < len(batches):
                rows = len(batches[at]["labels"])
                mine = logits if other == engine.data_rank else logits.new_zeros(rows, logits.shape[1])
                found.append(engine.total(mine) if engine.data_world > 1 else mine)
    classes = len(as_encoder(learner.model.family).labels)
    return torch.cat([one.cpu().double() for one in found]) if found else torch.zeros(0, classes, dtype=torch.float64)


def told_rows(log: Path) -> Told:
    """What a reader of a run's log knows of its scores: of each row the last that was told, unless the run went on from
    before it."""
    found: Told = {}
    for event in read_events(log) if log.is_file() else ():
        if event["event"] == "run_started":
            found = {key: said for key, said in found.items() if said["step"] <= event["step"]}
        elif event["event"] == "scored":
            found[event["metric"], event["after"]] = {"step": event["step"], "scores": event["scores"]}
    return found
