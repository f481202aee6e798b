"""What a run will do, before any weight is read: clips, buckets, targets, steps, memory, disk."""

from dataclasses import dataclass

from weft.adapters.targets import TargetReport
from weft.data.buckets import Bucket
from weft.data.cache import CacheStatus
from weft.data.survey import Survey
from weft.errors import DataError, WeftError
from weft.run.assemble import Trainable, check_engine, target_report
from weft.run.checks import check_adapter, check_optimizer, check_samples
from weft.run.config import RunConfig
from weft.run.estimate import Card, Estimate, card_of, device_of, estimate, precision_of
from weft.run.ladder import Rung, device_memory, ladder
from weft.run.surveyed import surveyed


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
    limit: int | None  # bytes of memory that there are, as asked for or of the device; None: not known
    rungs: tuple[Rung, ...]  # what would bring the largest bucket below the limit; empty when it fits

    def epochs(self, steps: int) -> float:
        return steps / self.steps_per_epoch if self.steps_per_epoch else 0.0


def plan(config: RunConfig, limit: int | None = None) -> Plan:
    """A run as it would go on a GPU with a memory of limit bytes, or else on this machine's device.

    Raises WeftError only for what makes a plan impossible; all else is in its problems.
    """
    problems: list[str] = []
    config = config if limit is None else for_gpu(config)
    config.objective.check(config.family)
    survey = surveyed(config)
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
    experts = len(config.family.experts)
    trainable = experts * config.adapter.trainable(targets)
    buckets = sorted(survey.buckets(), key=lambda bucket: -bucket.tokens)
    card = card_of(config) if limit is None else Card(gpu=True, memory=limit)
    memory = estimate(config, buckets, trainable, card)
    limit = device_memory(config) if limit is None else limit
    over = limit is not None and any(each.total > limit for each in memory.values())
    per_epoch = survey.steps_per_epoch(config.data.batch_size, config.schedule.accumulate) if buckets else 0
    return Plan(
        survey=survey,
        targets=targets,
        parameters=Trainable(trainable, trainable + experts * sum(p.numel() for p in skeleton.parameters())),
        memory=memory,
        precision=precision_of(config),
        steps_per_epoch=per_epoch,
        cache=config.data.store(survey, identity).status(),
        disk=disk_bytes(config, trainable),
        problems=tuple(problems),
        limit=limit,
        rungs=tuple(ladder(config, buckets, limit, card)) if over and limit is not None else (),
    )


def for_gpu(config: RunConfig) -> RunConfig:
    """The config with the precision that a GPU would take, where this machine has none to ask."""
    if config.engine.precision != "auto" or device_of(config).type != "cpu":
        return config
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": "bf16"})})


def disk_bytes(config: RunConfig, trainable: int) -> int:
    """Checkpoints that are kept (weights, two moments, moving average in fp32) and adapters, all of which are kept."""
    checkpoint = trainable * 4 * (4 if config.ema else 3)
    saves = config.schedule.steps // config.save.every if config.save.every else 0
    adapters = (saves + 1 + (1 if not saves or config.schedule.steps % config.save.every else 0)) * 4 * trainable
    return checkpoint * min(config.save.keep, saves + 1) + adapters * len(config.formats)


def refuse(problems: tuple[str, ...]) -> None:
    """Raises DataError with every problem of a plan."""
    if problems:
        raise DataError("\n".join(problems))
