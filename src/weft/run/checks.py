"""All of a run that can be refused before a weight is read, and what its numbers come to on so many processes."""

from bisect import bisect_left
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.adapters.targets import TargetReport
from weft.contracts import Distilled, Engine, Validated, as_video
from weft.errors import ConfigError
from weft.events import Listener
from weft.formats.adapter_file import SavedAdapter
from weft.run.assemble import check_engine, earlier_adapter, find_adapter, target_report
from weft.run.config import RunConfig
from weft.run.documents import check_documents, labelled, last_steps
from weft.run.estimate import device_of
from weft.run.pace import Pace
from weft.run.recording import check_graphs
from weft.run.shots import check_shots, shots_of
from weft.run.surveyed import surveyed, unheard
from weft.run.trackers import check_trackers
from weft.run.writing import check_replies


def check(config: RunConfig, engine: Engine | None = None, tell: Listener = unheard) -> Any:
    """All that can be refused before weights are read: model files, data, targets, buckets, sample sizes. Returns what
    the data holds. engine: None where none is at work yet."""
    check_objective(config)
    survey = surveyed(config, tell)
    survey.refuse_when_unusable(config.data.unreadable)
    check_samples(config)
    config = labelled(config, survey)
    skeleton = config.family.skeleton()
    check_adapter(config, target_report(config, skeleton))
    for role in config.objective.roles(config.family.experts):
        target_report(config, skeleton, role)
    if engine is not None:
        check_engine(config, engine)
    check_recording(config, engine)
    check_optimizer(config)
    check_trackers(config.track)
    return survey


def check_recording(config: RunConfig, engine: Engine | None) -> None:
    """Raises ConfigError for steps that are to be recorded and cannot be."""
    if engine is not None:
        check_graphs(config, engine.device, engine.world, engine.precision)
    else:
        check_graphs(config, device_of(config), config.parallel.least().world, config.engine.precision)


def check_objective(config: RunConfig) -> None:
    """Raises ConfigError for an objective that does not go with the family or with captions alone, for a role that the
    model does not have, and for a warm-up that a role's own steps do not outlast."""
    objective, family = config.objective, config.family
    objective.check(family)
    roles = objective.roles(family.experts)
    if idle := [name for name in config.roles if not any(name in (role, role.partition("_")[0]) for role in roles)]:
        raise ConfigError(f"roles.{idle[0]}: with this model there are only {', '.join(roles)}. Leave it out.")
    if not config.data.has_latents:
        check_captions_do(config)
    if config.schedule.epochs is None:
        check_warmups(config)
    if config.save.keep_best and not isinstance(objective, Validated):
        raise ConfigError(
            f"save.keep_best: objective '{objective.kind}' has no loss that tells the best checkpoint. Leave it out."
        )


def check_captions_do(config: RunConfig) -> None:
    """Raises ConfigError where captions alone are not enough."""
    family, objective = config.family, config.objective
    reason = objective.needs_clips(family) if isinstance(objective, Distilled) else None
    if as_video(family).image == "channels":
        reason = "this model goes on from a clip's first frame"
    if reason:
        raise ConfigError(f"data.kind: '{config.data.kind}' has captions alone, but {reason}. Write data.kind=video.")


def check_warmups(config: RunConfig) -> None:
    """Raises ConfigError for an optimizer that would never reach its learning rate."""
    pace = Pace(config.objective, config.family.experts, config.schedule.steps)
    for role in config.objective.roles(config.family.experts):
        steps, warmup = len(pace.steps.get(role, ())), config.rate_of(role).warmup
        if role in pace.steps and warmup >= steps:
            raise ConfigError(
                f"schedule.warmup: it is {warmup}, but {role} moves in only {steps} of {config.schedule.steps} steps. "
                f"Write roles.{role}.warmup, or more schedule.steps."
            )
        if config.objective.parts and role not in pace.steps:
            raise ConfigError(
                f"schedule.steps: {config.schedule.steps} are too few for {role} to move once. Write more."
            )


def check_adapter(config: RunConfig, targets: TargetReport) -> None:
    """Raises WeftError for an adapter to start from that is not there, or that stands on other layers."""
    path = config.adapter.start_from
    if path is None:
        return
    for expert in config.family.experts:
        check_earlier(config, targets, find_adapter(path, expert.name), earlier_adapter(path, expert.name))


def check_earlier(config: RunConfig, targets: TargetReport, path: Path, earlier: SavedAdapter) -> None:
    """Raises WeftError for one adapter that cannot be started from."""
    mends = config.adapter.differences(earlier)
    mends += [f"adapter.bias={earlier.bias}"] if earlier.bias != config.adapter.biases else []
    if mends:
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
    for role in config.objective.roles(config.family.experts):
        config.optimizer_of(role).build({"w": nn.Parameter(torch.zeros(1))}, config.adapter_of(role).lr_factor)


def check_samples(config: RunConfig) -> None:
    """Raises ConfigError for sample sizes, first frames and prompts that the model cannot take."""
    if config.family.medium == "video":
        check_shots(config.family, shots_of(config.samples), "samples.")
    elif config.family.medium == "documents":
        check_documents(config)
    else:
        check_replies(config)


def settled(config: RunConfig, survey: Any, data_world: int) -> RunConfig:
    """The config with the numbers that follow from others: accumulate from global_batch, steps from epochs; of
    documents also the classes of the data, and what an objective makes of a stream's length.

    data_world: processes that train on different data. Raises ConfigError for a global batch that they cannot share.
    """
    config = labelled(config, survey)
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
    micro_batches = found.get("accumulate", schedule.accumulate) * data_world  # of a step
    if config.family.medium == "documents":
        ends = last_steps(config, survey.stretches, micro_batches)
        config = config.model_copy(update={"objective": config.objective.fitted(ends)})
        found["steps"] = list(ends.values())[-1]
    elif schedule.epochs is not None:
        draws = survey.epoch_draws(config.data.batch_size)
        if draws is None:
            raise ConfigError("schedule.epochs: the length of streamed data is not known. Write schedule.steps.")
        found["steps"] = steps_of(config, ceil(schedule.epochs * draws / micro_batches))
    if schedule.epochs is not None and schedule.warmup >= found["steps"]:
        raise ConfigError(
            f"schedule.warmup: it is {schedule.warmup}, but {schedule.epochs:g} epochs are only {found['steps']} "
            "steps. Lower it."
        )
    return config.model_copy(update={"schedule": schedule.model_copy(update=found)}) if found else config


def steps_of(config: RunConfig, micro_batches: int) -> int:
    """The fewest steps whose phases draw so many micro-batches. A step has at least one phase."""
    pace = Pace(config.objective, config.family.experts, micro_batches)
    return bisect_left(range(micro_batches), micro_batches, key=pace.micro_batches)


def items_per_step(config: RunConfig, data_world: int) -> int:
    """Items that a step learns from, on all processes together, where no batch is short."""
    return config.data.batch_size * config.schedule.accumulate * data_world
