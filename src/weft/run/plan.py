"""What a run will do, before any weight is read: clips, buckets, targets, steps, memory, disk."""

from dataclasses import dataclass

from weft.adapters.targets import TargetReport
from weft.data.buckets import Bucket
from weft.data.survey import Survey
from weft.errors import DataError, WeftError
from weft.run.assemble import target_report
from weft.run.config import RunConfig
from weft.run.estimate import Estimate, estimate, precision_of
from weft.run.start import check_samples


@dataclass(frozen=True)
class Plan:
    """A run as it would go. problems: why it would not start; empty when it would."""

    survey: Survey
    targets: TargetReport
    trainable: int
    total: int
    memory: dict[Bucket, Estimate]
    precision: str
    steps_per_epoch: int
    problems: tuple[str, ...]

    def epochs(self, steps: int) -> float:
        return steps / self.steps_per_epoch if self.steps_per_epoch else 0.0


def plan(config: RunConfig) -> Plan:
    """Raises WeftError only for what makes a plan impossible; all else is in its problems."""
    problems: list[str] = []
    survey = config.data.survey(config.family.geometry())
    for ask in (lambda: survey.refuse_when_unusable(config.data.unreadable), lambda: check_samples(config)):
        try:
            ask()
        except WeftError as problem:
            problems.append(str(problem))
    skeleton = config.family.skeleton()
    targets = target_report(config, skeleton)
    trainable = targets.parameters(config.adapter.rank)
    buckets = sorted(survey.buckets(), key=lambda bucket: -bucket.tokens)
    per_epoch = survey.steps_per_epoch(config.data.batch_size, config.schedule.accumulate) if buckets else 0
    return Plan(
        survey=survey,
        targets=targets,
        trainable=trainable,
        total=sum(p.numel() for p in skeleton.parameters()),
        memory=estimate(config, buckets, trainable),
        precision=precision_of(config),
        steps_per_epoch=per_epoch,
        problems=tuple(problems),
    )


def refuse(problems: tuple[str, ...]) -> None:
    """Raises DataError with every problem of a plan."""
    if problems:
        raise DataError("\n".join(problems))
