"""What a run will do, before any weight is read: clips, buckets, targets, steps, memory, disk."""

from dataclasses import dataclass

from weft.adapters.targets import TargetReport
from weft.data.buckets import Bucket
from weft.data.cache import CacheStatus
from weft.data.survey import Survey
from weft.errors import DataError, WeftError
from weft.run.assemble import Trainable, check_engine, target_report
from weft.run.config import RunConfig
from weft.run.estimate import Estimate, estimate, precision_of
from weft.run.start import check_adapter, check_optimizer, check_samples


@dataclass(frozen=True)
class Plan:
    """A run as it would go. problems: why it would not start; empty when it would."""

    survey: Survey
    targets: TargetReport
    parameters: Trainable
    memory: dict[Bucket, Estimate]
    precision: str
    steps_per_epoch: int
    cache: CacheStatus
    disk: int  # bytes that checkpoints and adapters will take
    problems: tuple[str, ...]

    def epochs(self, steps: int) -> float:
        return steps / self.steps_per_epoch if self.steps_per_epoch else 0.0


def plan(config: RunConfig) -> Plan:
    """Raises WeftError only for what makes a plan impossible; all else is in its problems."""
    problems: list[str] = []
    survey = config.data.survey(config.family.geometry())
    skeleton = config.family.skeleton()
    targets = target_report(config, skeleton)
    identity = config.family.identity()
    for ask in (
        lambda: survey.refuse_when_unusable(config.data.unreadable),
        lambda: check_samples(config),
        lambda: check_adapter(config, targets),
        lambda: check_engine(config, config.engine.open()),
        lambda: check_optimizer(config),
    ):
        try:
            ask()
        except WeftError as problem:
            problems.append(str(problem))
    trainable = targets.parameters(config.adapter.rank, config.adapter.dora)
    buckets = sorted(survey.buckets(), key=lambda bucket: -bucket.tokens)
    per_epoch = survey.steps_per_epoch(config.data.batch_size, config.schedule.accumulate) if buckets else 0
    return Plan(
        survey=survey,
        targets=targets,
        parameters=Trainable(trainable, trainable + sum(p.numel() for p in skeleton.parameters())),
        memory=estimate(config, buckets, trainable),
        precision=precision_of(config),
        steps_per_epoch=per_epoch,
        cache=config.data.store(survey, identity).status(),
        disk=disk_bytes(config, trainable),
        problems=tuple(problems),
    )


def disk_bytes(config: RunConfig, trainable: int) -> int:
    """Checkpoints that are kept (weights, two moments, moving average in fp32) and adapters, all of which are kept."""
    checkpoint = trainable * 4 * (4 if config.ema else 3)
    saves = config.schedule.steps // config.save.every if config.save.every else 0
    adapters = (saves + 1 + (1 if not saves or config.schedule.steps % config.save.every else 0)) * 4 * trainable
    return checkpoint * min(config.save.keep, saves + 1) + adapters * len(config.save.formats)


def refuse(problems: tuple[str, ...]) -> None:
    """Raises DataError with every problem of a plan."""
    if problems:
        raise DataError("\n".join(problems))
