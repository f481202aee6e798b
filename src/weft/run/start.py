"""One training run from its config to its adapter: check, cache, assemble, resume, train, export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from weft.adapters.targets import TargetReport
from weft.config.show import Change, diff
from weft.data.cache import CacheStatus
from weft.data.survey import Survey
from weft.durable import write_whole
from weft.errors import ConfigError, RunError
from weft.events import Listener, Notice, PhaseStarted, RunEnded, RunStarted, tell_all
from weft.formats.reading import read_adapter
from weft.run.assemble import (
    assemble,
    check_engine,
    count_parameters,
    find_adapter,
    free_memory,
    start_from,
    target_report,
)
from weft.run.checkpoint import find_checkpoint, read_checkpoint, restore_learner, seed_chance, set_aside_after
from weft.run.config import FIXED_ON_RESUME, FREE_ON_RESUME, RunConfig
from weft.run.evaluate import Evaluator
from weft.run.folder import claim, environment, is_disk_full, remove_leftovers, write_json
from weft.run.gpu_log import open_gpu_log
from weft.run.learner import Learner
from weft.run.listeners import EventLog
from weft.run.milestones import Keeper
from weft.run.provenance import manifest_hash, provenance
from weft.run.shortage import explained, naming
from weft.run.shots import check_shots, shots_of
from weft.run.showing import Gallery, LazyEncoders
from weft.run.train import Course, train


@dataclass(frozen=True)
class Result:
    """How a run ended. adapter: the finished adapter's folder, or None when it was stopped before the end.
    adapters: those of all experts, where several were trained; adapter is the first of them.
    """

    folder: Path
    step: int
    finished: bool
    adapter: Path | None
    loss: float | None = None
    baseline: float | None = None
    adapters: tuple[Path, ...] = ()


def train_run(
    config: RunConfig,
    tell: Listener,
    stop: Callable[[], bool] = lambda: False,
    input_text: str = "",
) -> Result:
    """Train as the config says, from the newest checkpoint where there is one. Raises WeftError."""
    survey = check(config)
    run = config.folder
    checkpoint, passed = find_checkpoint(run, config.resume)
    inputs = inputs_of(config, survey)
    state = resumed_state(config, inputs, checkpoint)
    run.mkdir(parents=True, exist_ok=True)
    process = claim(run)
    log = EventLog(run / "events.rank0.jsonl")
    tell = tell_all(log, open_gpu_log(run, config.engine.open().device), tell)
    learner: Learner | None = None
    try:
        remove_leftovers(run)
        write_inputs(config, input_text)
        for sentence in passed:
            tell(Notice(text=sentence))
        if checkpoint is None or checkpoint.parent == run / "checkpoints":
            for folder in set_aside_after(run, checkpoint):
                tell(Notice(text=f"{folder.name}: a checkpoint beyond the start of this run, set aside"))
        with explained(config):
            learner, keeper, stream = prepare(config, survey, inputs, tell)
            seed_chance(config.seed)
            if state is None:
                start_from(config, learner)
            else:
                restore_learner(learner, state)
                keeper.saved_at = learner.step
            tell(started(config, learner, checkpoint))
            keeper.before_start(learner)
            tell(PhaseStarted(phase="training", total=config.schedule.steps))
            finished = train(learner, stream, Course(config.schedule, keeper, tell, stop))
            result = conclude(learner, keeper, finished)
            tell(RunEnded(step=learner.step, outcome="finished" if finished else "stopped"))
        return result
    except BaseException as failed:
        if is_disk_full(failed):  # nor could the log take another line
            raise RunError(
                f"{run}: the disk is full, at step {learner.step if learner else 0}. Older checkpoints are untouched: "
                "free some space and run the same command again to go on from the newest."
            ) from failed
        reason = f"{type(failed).__name__}: {failed}".splitlines()[0]
        tell(RunEnded(step=learner.step if learner else 0, outcome="failed", reason=reason))
        raise
    finally:
        log.close()
        process.unlink(missing_ok=True)


def check(config: RunConfig) -> Survey:
    """All that can be refused before weights are read: model files, clips, targets, buckets, sample sizes."""
    config.objective.check(config.family)
    survey = config.data.survey(config.family.geometry())
    survey.refuse_when_unusable(config.data.unreadable)
    check_samples(config)
    check_adapter(config, target_report(config, config.family.skeleton()))
    check_engine(config, config.engine.open())
    check_optimizer(config)
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
    """Raises ConfigError for sample sizes and first frames that the model cannot take."""
    check_shots(config.family, shots_of(config.samples), "samples.")


def fill_cache(config: RunConfig, survey: Survey, tell: Listener) -> CacheStatus:
    """Encode what the disk cache lacks, and say what it holds then. Raises ConfigError for a cache of another kind."""
    if config.data.cache != "disk":
        raise ConfigError(f"data.cache: '{config.data.cache}' keeps nothing for later. Write data.cache=disk.")
    engine = config.engine.open()
    for sentence in survey.notices:
        tell(Notice(text=sentence))
    store = config.data.store(survey, config.family.identity())
    with explained(config), naming("caching", engine.device):
        filled = store.fill(lambda: config.family.encoders(engine.device, engine.carry), tell)
    if filled.damaged:
        tell(Notice(text=f"{filled.damaged} cache entries were damaged and have been encoded anew"))
    survey.without(filled.failed).refuse_when_unusable(config.data.unreadable)
    return store.status()


def inputs_of(config: RunConfig, survey: Survey) -> dict[str, str]:
    """What a run is made of besides its config: fingerprints of the clips as they will be trained on, and of the
    model's parts."""
    return {"clips": manifest_hash(survey), **config.family.identity()}


def prepare(
    config: RunConfig, survey: Survey, inputs: Mapping[str, str], tell: Listener
) -> tuple[Learner, Keeper, Sequence[Any]]:
    """Cached data, an assembled learner, and what happens between its steps."""
    engine = config.engine.open()
    tell(PhaseStarted(phase="starting"))
    encoders = LazyEncoders(lambda: config.family.encoders(engine.device, engine.carry))
    with naming("caching", engine.device):
        dataset = config.data.open(
            survey, inputs, encoders.open, tell, seed=config.seed, last_step=config.schedule.steps
        )
    if config.data.cache != "off":
        encoders.close()
    free_memory()
    learner = assemble(config, engine)
    evaluator = None
    if survey.validation and config.validation.every:
        batches, failed = dataset.validation()
        for item in failed:
            tell(Notice(text=f"validation: {item.key} cannot be measured: {item.reason}"))
        evaluator = Evaluator(batches, len(failed), config.validation.seed)
    facts = provenance(config, survey, inputs, engine.device)
    gallery = Gallery(config, tell, encoders, survey.fps)
    keeper = Keeper(config, inputs, facts, tell, gallery, evaluator)
    return learner, keeper, [dataset.train]


def conclude(learner: Learner, keeper: Keeper, finished: bool) -> Result:
    """Save; at the end also the finished adapter and its samples."""
    keeper.save(learner)
    if not finished:
        return Result(keeper.run, learner.step, False, None)
    folders = keeper.export_final(learner)
    keeper.gallery.sample(learner)
    last = keeper.last
    return Result(
        keeper.run, learner.step, True, folders[0], last.loss if last else None, last.baseline if last else None,
        tuple(folders),
    )  # fmt: skip


def started(config: RunConfig, learner: Learner, checkpoint: Path | None) -> RunStarted:
    return RunStarted(
        name=config.name,
        step=learner.step,
        total_steps=config.schedule.steps,
        resumed_from=str(checkpoint) if checkpoint else None,
        trainable=count_parameters(learner).trainable,
        device=str(learner.engine.device),
        rank=learner.engine.rank,
        world=learner.engine.world,
    )


def write_inputs(config: RunConfig, input_text: str) -> None:
    """The resolved config, the user's own text, and the environment, in the run's folder."""
    run = config.folder
    write_whole(run / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True))
    if input_text:
        write_whole(run / "config.input.yaml", input_text)
    write_json(run / "environment.json", environment(config.engine.device))


def resumed_state(config: RunConfig, inputs: Mapping[str, str], checkpoint: Path | None) -> Mapping[str, Any] | None:
    """The checkpoint's state. Raises RunError with the differences when its config or its inputs are others."""
    if checkpoint is None:
        return None
    state, old = read_checkpoint(checkpoint)
    now = {**config.resolved(), "inputs": dict(inputs)}
    changes = [c for c in diff(old, now) if not is_free(c, config.resume_allow)]
    if changes:
        lines = "\n".join(f"  {c.path}: {c.old!r} -> {c.new!r}" for c in changes)
        paths = sorted({c.path for c in changes})
        fixed = [path for path in paths if is_under(path, FIXED_ON_RESUME)]
        allow = "" if fixed else f", or allow it: resume_allow=[{','.join(paths)}]"
        raise RunError(
            f"{config.folder} cannot go on from {checkpoint.name}: what it is made of has changed since.\n{lines}\n"
            f"Change it back, or give the run another 'name'{allow}."
        )
    if state["step"] > config.schedule.steps:
        raise RunError(
            f"{checkpoint} is at step {state['step']}, beyond schedule.steps ({config.schedule.steps}). Raise it."
        )
    return state


def is_free(change: Change, allowed: Sequence[str]) -> bool:
    """Whether a change alters no number of the training, or is allowed by name."""
    return is_under(change.path, (*FREE_ON_RESUME, *allowed))


def is_under(path: str, keys: Sequence[str]) -> bool:
    """Whether a dotted path is one of the keys or lies within one."""
    return any(path == key or path.startswith(f"{key}.") for key in keys)
