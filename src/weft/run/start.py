"""One training run from its config to its adapter: check, cache, assemble, resume, train, export."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch.nn import ModuleDict

from weft.contracts import Engine, Validated
from weft.data.cache import CacheStatus
from weft.durable import write_whole
from weft.engines.peers import LOST_PEER, lost_peer
from weft.errors import ConfigError, RunError
from weft.events import Listener, Notice, PhaseStarted, RunEnded, RunStarted, tell_all
from weft.run.assemble import assemble, count_parameters, free_memory, start_from
from weft.run.attention import Used, attending
from weft.run.blocks import compile_as_chosen
from weft.run.checkpoint import restore_learner
from weft.run.checkpoint_folders import find_checkpoint, set_aside_after
from weft.run.checkpoint_tree import seed_chance
from weft.run.checks import check, items_per_step, settled
from weft.run.config import RunConfig
from weft.run.control import Control, changed_rates
from weft.run.evaluate import Evaluator, so_far
from weft.run.float8_error import FirstBatch
from weft.run.folder import claim, environment, is_disk_full, remove_leftovers, write_json
from weft.run.gpu_log import open_gpu_log, remove_dead
from weft.run.heartbeat import Heartbeat, remove_stale
from weft.run.inbox import Inbox
from weft.run.learner import Learner
from weft.run.listeners import EventLog
from weft.run.media import opened
from weft.run.milestones import Keeper
from weft.run.provenance import provenance
from weft.run.questions import shapes_of
from weft.run.ranks import decided
from weft.run.recording import graphs_of
from weft.run.resuming import resumed_state
from weft.run.run_log import RunLog
from weft.run.scoring import Scorer
from weft.run.shortage import explained, naming
from weft.run.trackers import trackers
from weft.run.train import Course, train


@dataclass(frozen=True)
class Result:
    """How a run ended. adapter: the finished adapter's folder, or None when it was stopped before the end.
    adapters: those of all experts, where several were trained; adapter is the first of them. commanded: it was stopped
    by a command, which is meant for every host.
    """

    folder: Path
    step: int
    finished: bool
    adapter: Path | None
    loss: float | None = None
    baseline: float | None = None
    adapters: tuple[Path, ...] = ()
    commanded: bool = False


def train_run(
    config: RunConfig,
    tell: Listener,
    stop: Callable[[], bool] = lambda: False,
    input_text: str = "",
) -> Result:
    """Train as the config says, from the newest checkpoint where there is one. Raises WeftError.

    Every rank of a group of processes calls it; rank 0 alone writes what a run has once.
    """
    engine = config.engine.open(config.parallel)
    try:
        survey = check(config, engine, tell)
        config = settled(config, survey, engine.data_world)
        inputs = inputs_of(config, survey, engine)
        found, passed = decided(engine, lambda: chosen_checkpoint(config))
        checkpoint = Path(found) if found else None
        state = resumed_state(config, inputs, checkpoint)
        with open_run(config, engine, tell, input_text) as run:
            for sentence in passed:
                run.tell(Notice(text=sentence))
            for name in decided(engine, lambda: aside(config.folder, checkpoint)):
                run.tell(Notice(text=f"{name}: a checkpoint beyond the start of this run, set aside"))
            with explained(config), attending(config.family, engine.device) as policy:
                compile_as_chosen(config, shapes_of(config, survey), engine, run.tell)
                learner, keeper, stream = prepare(config, survey, inputs, engine, run.tell)
                run.learner, run.keeper = learner, keeper
                sign_at_questions(learner, run.beat)
                seed_chance(config.seed)
                if state is None:
                    start_from(config, learner)
                else:
                    restore_learner(learner, state)
                    keeper.saver.saved_at = learner.step
                run.tell(started(config, learner, checkpoint))
                for sentence in changed_rates(learner, state.tree.get("rates", {})) if state else ():
                    run.tell(Notice(text=sentence))
                control = Control(keeper, run.tell, stop, run.inbox)
                control.begin(learner)
                keeper.before_start(learner)
                run.tell(PhaseStarted(phase="training", total=config.schedule.steps))
                rates = {name: config.rate_of(name) for name in learner.optimizers}
                graphs = graphs_of(config, survey, engine, run.tell)
                course = Course(
                    config.schedule, keeper, run.tell, stop, control, rates=rates, sign=run.beat.micro_batch,
                    graphs=graphs, before=FirstBatch(config.family, run.tell), noted=Used(run.tell, policy).note,
                )  # fmt: skip
                finished = train(learner, stream, course)
                control.end(learner)
                result = conclude(learner, keeper, finished, control.ended)
                run.tell(RunEnded(step=learner.step, outcome="finished" if finished else "stopped"))
            return result
    finally:
        engine.close()


@dataclass
class OpenRun:
    """A run that this process is at work on. learner: once there is one."""

    tell: Listener
    beat: Heartbeat
    learner: Learner | None = None
    keeper: Keeper | None = None
    inbox: Inbox | None = None  # of the first rank

    @property
    def step(self) -> int:
        return self.learner.step if self.learner else 0


@contextmanager
def open_run(config: RunConfig, engine: Engine, tell: Listener, input_text: str) -> Iterator[OpenRun]:
    """Claim the run's folder, open this rank's logs, and write down how it ended when it failed."""
    run = config.folder
    run.mkdir(parents=True, exist_ok=True)
    if engine.rank == 0:
        claim(run)
        remove_leftovers(run)  # before another rank writes: its drafts would be taken for leftovers
        remove_dead(run)
        remove_stale(run)
    engine.barrier()
    process = claim(run, engine.rank)
    try:
        with (
            Heartbeat(run, engine.rank, engine.world) as beat,
            closing(RunLog(run, engine.rank)) as said,
            closing(EventLog(run / f"events.rank{engine.rank}.jsonl")) as log,
        ):
            own = tell_all(beat, log, open_gpu_log(run, engine), said, tell)
            work = OpenRun(tell_all(own, *(trackers(config, own) if engine.rank == 0 else ())), beat)
            try:
                if engine.rank == 0:
                    work.inbox = Inbox(run)
                    write_inputs(config, input_text, engine)
                engine.barrier()
                yield work
            except BaseException as failed:
                if is_disk_full(failed):  # nor could the logs take another line
                    raise RunError(
                        f"{run}: the disk is full, at step {work.step}. Older checkpoints are untouched: "
                        "free some space and run the same command again to go on from the newest."
                    ) from failed
                said.failed(failed)
                reason = LOST_PEER if lost_peer(failed) else f"{type(failed).__name__}: {failed}".splitlines()[0]
                work.tell(RunEnded(step=work.step, outcome="failed", reason=reason))
                raise
            finally:
                if work.keeper is not None:
                    work.keeper.saver.close()
    finally:
        process.unlink(missing_ok=True)


def chosen_checkpoint(config: RunConfig) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from, and a sentence for each that was passed over."""
    checkpoint, passed = find_checkpoint(config.folder, config.resume)
    return str(checkpoint) if checkpoint else None, passed


def aside(run: Path, checkpoint: Path | None) -> list[str]:
    """Set later checkpoints of the run aside; not those of another run that this one begins from."""
    if checkpoint is not None and checkpoint.parent != run / "checkpoints":
        return []
    return [folder.name for folder in set_aside_after(run, checkpoint)]


def fill_cache(config: RunConfig, survey: Any, tell: Listener) -> CacheStatus:
    """Encode what the disk cache lacks, and say what it holds then. Raises ConfigError for a cache of another kind."""
    if config.family.medium == "documents":
        raise ConfigError("weft cache: documents may be private, so their tokens stay in memory. Run weft train.")
    if config.data.cache != "disk":
        raise ConfigError(f"data.cache: '{config.data.cache}' keeps nothing for later. Write data.cache=disk.")
    engine = config.engine.open()
    for sentence in survey.notices:
        tell(Notice(text=sentence))
    store = config.data.store(survey, config.family.identity(), config.objective.texts)
    with explained(config), naming("caching", engine.device):
        filled = store.fill(lambda: config.family.encoders(engine.device, engine.carry), tell)
    store.pack(tell)
    if filled.damaged:
        tell(Notice(text=f"{filled.damaged} cache entries were damaged and have been encoded anew"))
    survey.without(filled.failed).refuse_when_unusable(config.data.unreadable)
    return store.status()


def inputs_of(config: RunConfig, survey: Any, engine: Engine) -> dict[str, str]:
    """What a run is made of besides its config: fingerprints of the data as it will be trained on and of the model's
    parts, and how much of it a step takes."""
    return {
        "data": survey.digest(),
        "items_per_step": str(items_per_step(config, engine.data_world)),
        **config.family.identity(),
    }


def prepare(
    config: RunConfig, survey: Any, inputs: Mapping[str, str], engine: Engine, tell: Listener
) -> tuple[Learner, Keeper, Sequence[Any]]:
    """Cached data, an assembled learner, and what happens between its steps."""
    tell(PhaseStarted(phase="starting"))
    dataset: Any
    dataset, showing = opened(config, survey, inputs, engine, tell)
    engine.barrier()  # until the last rank has encoded its part
    free_memory()
    learner = assemble(config, engine)
    learner.stream = dataset.stream
    facts = provenance(config, survey, inputs, engine)
    if config.family.medium == "documents":
        scorer = Scorer(dataset.tests, dataset.validations, config.folder, tell)
        evaluator = Evaluator([], 0, config.validation.seed, among=partial(so_far, dataset.validations))
        measured = any(dataset.validations.values()) and config.validation.every > 0
        keeper = Keeper(config, inputs, facts, tell, showing, evaluator if measured else None, scorer)
        return learner, keeper, learner.stream
    keeper = Keeper(config, inputs, facts, tell, showing, evaluator_of(config, survey, dataset, tell))
    return learner, keeper, learner.stream


def evaluator_of(config: RunConfig, survey: Any, dataset: Any, tell: Listener) -> Evaluator | None:
    """What measures the held-out items, where there are any and it is to."""
    measured = isinstance(config.objective, Validated)
    if survey.validation and config.validation.every and not measured:
        tell(
            Notice(text=f"validation: objective '{config.objective.kind}' has no loss to measure; look at the samples")
        )
    if survey.validation and config.validation.every and measured:
        batches, failed = dataset.validation()
        for item in failed:
            tell(Notice(text=f"validation: {item.key} cannot be measured: {item.reason}"))
        return Evaluator(batches, len(failed), config.validation.seed)
    return None


def sign_at_questions(learner: Learner, beat: Heartbeat) -> None:
    """Make each question to a network a sign of life: between two events of validation or sampling there are many."""
    network = learner.model.network
    for asked in network.values() if isinstance(network, ModuleDict) else (network,):
        asked.register_forward_pre_hook(lambda module, inputs: beat.sign())


def conclude(learner: Learner, keeper: Keeper, finished: bool, commanded: bool) -> Result:
    """Save; at the end also the finished adapter and its samples."""
    keeper.save(learner)
    keeper.saver.settle()
    if not finished:
        return Result(keeper.run, learner.step, False, None, commanded=commanded)
    folders = keeper.saver.export_final(learner)
    if keeper.scorer is not None:
        keeper.scorer.conclude(learner, keeper.config.schedule.accumulate * learner.engine.data_world)
    keeper.sample(learner)
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


def write_inputs(config: RunConfig, input_text: str, engine: Engine) -> None:
    """The resolved config, the user's own text, and the environment, in the run's folder."""
    run = config.folder
    write_whole(run / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True))
    if input_text:
        write_whole(run / "config.input.yaml", input_text)
    write_json(run / "environment.json", environment(str(engine.device)))
