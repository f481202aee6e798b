"""All of a run that can be refused before a weight is read, and what its numbers come to on so many processes."""

from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.adapters.targets import TargetReport
from weft.contracts import Engine
from weft.errors import ConfigError
from weft.events import Listener
from weft.formats.reading import read_adapter
from weft.run.assemble import check_engine, find_adapter, target_report
from weft.run.config import RunConfig
from weft.run.shots import check_shots, shots_of
from weft.run.surveyed import surveyed, unheard
from weft.run.trackers import check_trackers
from weft.run.writing import check_replies


def check(config: RunConfig, engine: Engine | None = None, tell: Listener = unheard) -> Any:
    """All that can be refused before weights are read: model files, data, targets, buckets, sample sizes. Returns what
    the data holds. engine: None where none is at work yet."""
    config.objective.check(config.family)
    survey = surveyed(config, tell)
    survey.refuse_when_unusable(config.data.unreadable)
    check_samples(config)
    check_adapter(config, target_report(config, config.family.skeleton()))
    if engine is not None:
        check_engine(config, engine)
    check_optimizer(config)
    check_trackers(config.track)
    return survey


def check_adapter(config: RunConfig, targets: TargetReport) -> None:
    """Raises WeftError for an adapter to start from that is not there, or that stands on other layers."""
    path = config.adapter.start_from
    if path is None:
        return
    for role in config.objective.shown(config.family.experts):
        check_earlier(config, targets, find_adapter(path, role))


def check_earlier(config: RunConfig, targets: TargetReport, path: Path) -> None:
    """Raises WeftError for one adapter that cannot be started from."""
    earlier = read_adapter(path)
    if mends := config.adapter.differences(earlier):
        raise ConfigError(
            f"adapter.start_from: {path} is of kind {earlier.kind} and rank {earlier.rank}, which the config cannot "
            "continue. "
            f"Write {' '.join(mends)}."
        )
    others = set(earlier.paths) ^ set(targets.paths)
    if others:
        raise ConfigError(
            f"adapter.start_from: {path} and adapter.targets differ in {len(others)} layers, "
            f"first '{min(others)}'. Name the same targets."
        )


def check_optimizer(config: RunConfig) -> None:
    """Raises ConfigError for an optimizer that is not there or refuses its arguments; a parameter of one number
    stands for the adapter's."""
    config.optimizer.build({"w": nn.Parameter(torch.zeros(1))}, config.adapter.lr_factor)


def check_samples(config: RunConfig) -> None:
    """Raises ConfigError for sample sizes, first frames and prompts that the model cannot take."""
    if config.family.medium == "video":
        check_shots(config.family, shots_of(config.samples), "samples.")
    else:
        check_replies(config)


def settled(config: RunConfig, survey: Any, data_world: int) -> RunConfig:
    """The config with the numbers that follow from others: accumulate from global_batch, steps from epochs.

    data_world: processes that train on different data. Raises ConfigError for a global batch that they cannot share.
    """
    schedule, together = config.schedule, config.data.batch_size * data_world
    found: dict[str, int] = {}
    if schedule.global_batch is not None:
        if schedule.global_batch % together:
            below = schedule.global_batch // together * together
            near = " or ".join(str(n) for n in (below, below + together) if n)
            raise ConfigError(
                f"schedule.global_batch: {schedule.global_batch} items do not divide by {together}, the items of one "
                f"micro-batch (data.batch_size {config.data.batch_size}) on {data_world} processes. Write {near}, or "
                "another data.batch_size."
            )
        found["accumulate"] = schedule.global_batch // together
    if schedule.epochs is not None:
        draws = survey.epoch_draws(config.data.batch_size)
        if draws is None:
            raise ConfigError("schedule.epochs: the length of streamed data is not known. Write schedule.steps.")
        steps = ceil(schedule.epochs * draws / (found.get("accumulate", schedule.accumulate) * data_world))
        if schedule.warmup >= steps:
            raise ConfigError(
                f"schedule.warmup: it is {schedule.warmup}, but {schedule.epochs:g} epochs are only {steps} steps. "
                "Lower it."
            )
        found["steps"] = steps
    return config.model_copy(update={"schedule": schedule.model_copy(update=found)}) if found else config


def items_per_step(config: RunConfig, data_world: int) -> int:
    """Items that a step learns from, on all processes together, where no batch is short."""
    return config.data.batch_size * config.schedule.accumulate * data_world
