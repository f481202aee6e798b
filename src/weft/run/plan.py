"""What a run will do, before any weight is read: data, shapes, targets, steps, memory, processes, disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from weft.data.buckets import Bucket
from weft.data.cache import CacheStatus
from weft.engines.parallel import Layout
from weft.errors import DataError, WeftError
from weft.run.assemble import Trainable, bias_numbers, target_report
from weft.run.blocks import choice_of
from weft.run.checks import (
    check_adapter,
    check_objective,
    check_optimizer,
    check_samples,
    check_warmups,
    items_per_step,
    settled,
)
from weft.run.config import RunConfig
from weft.run.documents import labelled
from weft.run.estimate import Card, Estimate, card_of, device_of, estimate, precision_of
from weft.run.ladder import Rung, device_memory, ladder, room_in
from weft.run.layouts import check_layout, layout_of
from weft.run.pace import Pace
from weft.run.parts import Part, parts_of
from weft.run.questions import Shape, shapes_of
from weft.run.surveyed import surveyed
from weft.run.trackers import check_trackers


@dataclass(frozen=True)
class Plan:
    """A run as it would go. problems: why it would not start; empty when it would."""

    survey: Any
    parts: tuple[Part, ...]  # what is trained; of most objectives one for each expert
    parameters: Trainable
    layout: Layout
    shapes: dict[Shape, int]  # items of an epoch
    memory: dict[Shape, Estimate]  # of each process
    precision: str
    steps: int
    items: int  # of a step, on all processes together
    steps_per_epoch: int | None  # None: of streams it is not known
    epochs: float | None  # passes over the data
    cache: CacheStatus | None  # None: nothing is kept on disk
    disk: int  # bytes that checkpoints and adapters will take
    problems: tuple[str, ...]
    limit: int | None  # bytes of memory that there are, as asked for or of the device; None: not known
    room: int | None  # of these, what a run may be planned to fill
    rungs: tuple[Rung, ...]  # what would bring the largest shape below that; empty when it fits
    blocks: tuple[str, ...] = ()  # whether they are compiled, and what they may keep, in words

    @property
    def shapes_are_buckets(self) -> bool:
        return all(isinstance(shape, Bucket) for shape in self.shapes)


def plan(config: RunConfig, limit: int | None = None, processes: int | None = None) -> Plan:
    """A run as it would go on GPUs with a memory of limit bytes, or else on this machine's device; on so many
    processes, or the fewest that the config can mean.

    Raises WeftError only for what makes a plan impossible; all else is in its problems.
    """
    config = config if limit is None else for_gpu(config)
    layout = layout_of(config, processes)
    check_objective(config)
    survey = surveyed(config)
    config = labelled(config, survey)
    skeleton = config.family.skeleton()
    shapes = shapes_of(config, survey)
    config, late = settled_or_not(config, survey, layout) if shapes else (config, ())
    parts = parts_of(config, skeleton)
    problems = told_by(
        lambda: survey.refuse_when_unusable(config.data.unreadable),
        lambda: check_samples(config),
        lambda: check_adapter(config, target_report(config, skeleton)),
        lambda: check_warmups(config),
        lambda: check_layout(config, layout),
        lambda: check_optimizer(config),
        lambda: check_trackers(config.track),
    )
    trained = {part.role: part.parameters for part in parts}
    card = card_of(config) if limit is None else Card(gpu=True, memory=limit)
    choice = choice_of(config, shapes, None if limit is None else card, layout)
    config = choice.applied(config)
    memory = estimate(config, sorted(shapes, key=lambda shape: -shape.tokens), trained, card, layout)
    if limit is None and (card.gpu or layout.world == 1):  # how many processes share a host's memory is not known
        limit = device_memory(config)
    room = None if limit is None else room_in(limit)
    over = room is not None and any(each.total > room for each in memory.values())
    together = config.schedule.accumulate * layout.data_world  # micro-batches of a step
    draws = survey.epoch_draws(config.data.batch_size) if shapes else None
    epochs, per_epoch = passes(config, draws, together) if shapes else (None, 0)
    return Plan(
        survey=survey,
        parts=parts,
        parameters=of_all(config, skeleton, trained),
        layout=layout,
        shapes=shapes,
        memory=memory,
        precision=precision_of(config),
        steps=config.schedule.steps,
        items=items_per_step(config, layout.data_world),
        steps_per_epoch=per_epoch,
        epochs=epochs,
        cache=cache_of(config, survey),
        disk=disk_bytes(config, trained, per_epoch),
        problems=(*late, *problems),
        limit=limit,
        room=room,
        blocks=tuple(choice.lines()),
        rungs=tuple(ladder(config, list(shapes), room, card, layout)) if over and room is not None else (),
    )


def of_all(config: RunConfig, skeleton: nn.Module, trained: Mapping[str, int]) -> Trainable:
    """How much is trained, of all experts' networks with all that stands on them."""
    numbers, trainable = sum(p.numel() for p in skeleton.parameters()), sum(trained.values())
    own = sum(bias_numbers(config, skeleton, role) for role in trained)
    beside = trainable - own if config.adapter.has_base else 0  # else it is the network itself that is trained
    return Trainable(trainable, beside + len(config.family.experts) * numbers)


def passes(config: RunConfig, draws: int | None, together: int) -> tuple[float | None, int | None]:
    """Epochs of the run, and steps of one. draws: micro-batches of an epoch, where that is known. together: those of
    one phase on all processes; a step draws anew for each of its phases."""
    if not draws:
        return None, None
    steps = config.schedule.steps
    drawn = together * Pace(config.objective, config.family.experts, steps).micro_batches(steps)
    return drawn / draws, ceil(steps * draws / drawn)


def cache_of(config: RunConfig, survey: Any) -> CacheStatus | None:
    """What the cache has of the data and of the objective's own texts. Documents have none: they may be private."""
    if config.family.medium == "documents":
        return None
    identity = config.family.identity()
    if config.family.medium == "text":
        return config.data.store(survey, identity).status()
    return config.data.store(survey, identity, config.objective.texts).status()


def told_by(*checks: Callable[[], None]) -> list[str]:
    """What the checks that fail say."""
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except WeftError as problem:
            problems.append(str(problem))
    return problems


def settled_or_not(config: RunConfig, survey: Any, layout: Layout) -> tuple[RunConfig, tuple[str, ...]]:
    """The config with the numbers that follow from others, or as it is with the reason why they do not."""
    try:
        return settled(config, survey, layout.data_world), ()
    except WeftError as problem:
        return config, (str(problem),)


def for_gpu(config: RunConfig) -> RunConfig:
    """The config with the precision that a GPU would take, where this machine has none to ask."""
    if config.engine.precision != "auto" or device_of(config).type != "cpu":
        return config
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": "bf16"})})


def disk_bytes(config: RunConfig, trained: Mapping[str, int], steps_per_epoch: int | None) -> int:
    """Checkpoints that are kept (weights, two moments, moving average in fp32) and adapters, most of which are kept.
    trained: parameters of each role; averaged and exported are those that are shown."""
    save, steps = config.save, config.schedule.steps
    shown = sum(trained[role] for role in config.objective.shown(config.family.experts))
    saves = steps // save.every if save.every else 0
    if save.every_epochs and steps_per_epoch:
        saves += int(steps / (save.every_epochs * steps_per_epoch))
    checkpoint = 4 * (3 * sum(trained.values()) + (shown if config.ema else 0))
    kept = min(save.keep + save.keep_best, saves + 1)
    last = 1 if not save.every or steps % save.every else 0  # a step that saves for itself alone
    written = kept if save.prune_adapters else saves + last
    return checkpoint * kept + (written + 1) * 4 * shown * len(config.formats)


def refuse(problems: tuple[str, ...]) -> None:
    """Raises DataError with every problem of a plan."""
    if problems:
        raise DataError("\n".join(problems))
