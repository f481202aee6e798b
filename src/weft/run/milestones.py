"""Between the steps: when to validate, sample and save as the config's calendar says, and how, also when asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weft.contracts import Phase
from weft.events import Evaluated, Listener, PhaseStarted
from weft.run.checkpoint_tree import under_way
from weft.run.config import RunConfig
from weft.run.evaluate import Evaluator
from weft.run.health import Health
from weft.run.incidents import Incidents
from weft.run.learner import Learner
from weft.run.media import Showing
from weft.run.retention import due_by_epoch
from weft.run.saving import Saver
from weft.run.scoring import UNTRAINED, Scorer
from weft.run.train import Outcome


@dataclass
class Keeper:
    """Validates, samples and saves a run: when its config says so, and when somebody asks. Nothing here changes what is
    learned."""

    config: RunConfig
    inputs: Mapping[str, str]  # fingerprints of clips and model, kept in the checkpoints
    provenance: Mapping[str, str]
    tell: Listener
    showing: Showing
    evaluator: Evaluator | None
    scorer: Scorer | None = None
    evaluated_at: int | None = None
    last: Evaluated | None = None
    saver: Saver = field(init=False)
    incidents: Incidents = field(init=False)
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.config, self.inputs, self.provenance, self.tell)
        private = self.config.data.medium == "documents"
        self.incidents = Incidents(self.run, self.config.schedule.incidents, self.tell, private)
        self.health = Health(self.config, self.tell)

    @property
    def run(self) -> Path:
        return self.config.folder

    # ---- The calendar ----

    def before_start(self, learner: Learner) -> None:
        """The state before the first step: validation, and the base's own samples."""
        self.score(learner)
        if learner.step == 0:
            self.validate(learner)
            if self.config.samples.baseline and self.can_sample:
                self.showing.sample(learner, adapter=False)

    def is_due(self, learner: Learner) -> bool:
        """Whether something is measured, shown or saved after this step."""
        config = self.config
        calendar = (config.validation.every, config.samples.every, config.save.every)
        return any(due(learner.step, every) for every in calendar) or self._an_epoch_ended(learner)

    def after_step(self, learner: Learner) -> None:
        step = learner.step
        self.saver.tell_saved()
        if due(step, self.config.validation.every):
            self.validate(learner)
        if due(step, self.config.samples.every):
            self.sample(learner)
        if due(step, self.config.save.every) or self._an_epoch_ended(learner):
            self.save(learner)

    def _an_epoch_ended(self, learner: Learner) -> bool:
        """Whether the last step went past so many epochs as the config wants a checkpoint after."""
        current, per_phase = under_way(learner), self.config.schedule.accumulate * learner.engine.data_world
        if current is None or self._stretch_ended(learner):  # the end of a stretch saves of itself
            return False
        phases = learner.pace.micro_batches(learner.step) - learner.pace.micro_batches(learner.step - 1)
        before = learner.drawn - phases * per_phase
        return due_by_epoch(before, learner.drawn, current.epoch_draws, self.config.save.every_epochs)

    def _stretch_ended(self, learner: Learner) -> str | None:
        """The experience whose last step was just done."""
        return next((each.name for each in learner.stream if each.last_step == learner.step), None)

    def after_experience(self, learner: Learner) -> None:
        """The end of a stretch: score what was learned in it, validate and save, unless the last step just did."""
        self.score(learner)
        if self.evaluated_at != learner.step:
            self.validate(learner)
        self.save(learner)
        self.saver.settle()

    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        self.incidents.skipped(learner, phase, outcome)

    # ---- What is done ----

    @property
    def can_validate(self) -> bool:
        """Whether there is anything to measure."""
        return self.evaluator is not None and self.config.validation.every > 0

    @property
    def can_sample(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.config.samples.prompts)

    def validate(self, learner: Learner) -> None:
        """Measure the held-out items, where there are any."""
        if self.evaluator is None or not self.can_validate:
            return
        self.tell(PhaseStarted(phase="validating"))
        self.last = self.evaluator.evaluate(learner)
        self.evaluated_at = learner.step
        self.tell(self.last)
        self.health.measure(learner)

    def score(self, learner: Learner) -> None:
        """Score a learner on all experiences of a stream of documents, before the first of them and after each; also
        one that was saved before it was scored."""
        after = UNTRAINED if learner.step == 0 else self._stretch_ended(learner)
        if self.scorer is not None and after is not None:
            self.scorer.score(learner, after)

    def sample(self, learner: Learner) -> None:
        """Make samples of every prompt, where there are any."""
        self.showing.sample(learner)

    def save(self, learner: Learner, anew: bool = False) -> None:
        """A checkpoint to resume from, and the adapter beside it. Not twice for one step, unless anew: something else
        than the step has moved. It is whole once the saver has settled. Raises RunError."""
        if self.saver.saved_at == learner.step and not anew:
            return
        if self.config.save.keep_best and self.evaluated_at != learner.step:
            self.validate(learner)
        self.saver.save(learner, self.last.loss if self.last and self.evaluated_at == learner.step else None)
        self.health.measure(learner)  # while that is written


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
