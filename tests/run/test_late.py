"""Steps that are told when the next one is under way: the same events, incidents and checkpoints, bit by bit."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.learners import ROLE, FixedStream, NoMilestones, batch_of, learner_of, small_config, weights
from tests.run.test_train import broken, keeper_of
from weft.contracts import Batch
from weft.errors import DataError, RunError
from weft.events import Event, Incident, StepEnded
from weft.run.checkpoint_tree import learner_state, pack
from weft.run.config import RunConfig
from weft.run.late import Sent
from weft.run.learner import Learner
from weft.run.stopwatch import Stopwatch
from weft.run.train import Course, train

DEPTHS = (0, 1)
GOOD = [batch_of(1, seed) for seed in range(3)]


@pytest.fixture
def configured(world, tmp_path):
    """A config of six steps on the small model, in a folder of its own."""

    def make(name: str = "run", **change: Any) -> RunConfig:
        schedule = {"steps": 6, "warmup": 1, "curve": "cosine", "incidents": 3, **change.pop("schedule", {})}
        return small_config(tmp_path / name, world / "model", schedule=schedule, **change)

    return make


@dataclass
class Snapshots(NoMilestones):
    """Keeps all of the learner that moves, at the steps where something is due and at the end of a stretch."""

    at: Sequence[int] = ()
    told: list[Event] = field(default_factory=list)
    taken: list[tuple[int, int, Any, dict[str, torch.Tensor]]] = field(default_factory=list)

    def is_due(self, learner: Learner) -> bool:
        return learner.step in self.at

    def after_step(self, learner: Learner) -> None:
        if self.is_due(learner):
            self.take(learner)

    def after_experience(self, learner: Learner) -> None:
        self.take(learner)

    def take(self, learner: Learner) -> None:
        tensors: dict[str, torch.Tensor] = {}
        tree = pack(learner_state(learner), tensors)
        self.taken.append((learner.step, len(self.told), tree, {n: t.clone() for n, t in tensors.items()}))


def run_of(
    config: RunConfig,
    given: Sequence[Batch],
    depth: int,
    at: Sequence[int] = (),
    stop: Callable[[], bool] | None = None,
) -> tuple[Learner, list[Any], Snapshots]:
    learner, told = learner_of(config), []
    snapshots = Snapshots(at=at, told=told)
    course = Course(config.schedule, snapshots, told.append, stop or (lambda: False), depth=depth)
    half = config.schedule.steps // 2
    train(learner, [FixedStream(given, half, "first"), FixedStream(given, config.schedule.steps, "second")], course)
    return learner, told, snapshots


def timeless(events: Sequence[Any]) -> list[str]:
    """Events without what no two runs have alike."""
    return [repr(replace(e, seconds={}, memory=None) if isinstance(e, StepEnded) else e) for e in events]


def assert_same_states(one: Snapshots, other: Snapshots) -> None:
    for (step, heard, tree, tensors), (step_2, heard_2, tree_2, tensors_2) in zip(one.taken, other.taken, strict=True):
        assert (step, heard, json.dumps(tree)) == (step_2, heard_2, json.dumps(tree_2))
        assert tensors.keys() == tensors_2.keys()
        assert all(torch.equal(t, tensors_2[name]) for name, t in tensors.items())


@pytest.mark.parametrize("ema", [None, {"decay": 0.5, "start": 1}])
def test_a_run_that_is_told_late_tells_and_keeps_the_same_with_a_gradient_in_it_that_is_not_finite(configured, ema):
    given = [*GOOD[:1], broken(), GOOD[1]]  # steps 2 and 5
    runs = [run_of(configured(f"{ema is None} {d}", ema=ema), given, d, at=(2, 4)) for d in DEPTHS]
    (now, told, kept), (late, told_late, kept_late) = runs
    assert timeless(told) == timeless(told_late)
    assert [event.step for event in told_late] == [1, 2, 3, 4, 5, 6]
    assert [event.metrics.get("train/skipped") for event in told_late] == [None, 1.0, None, None, 1.0, None]
    assert kept.skips == kept_late.skips == [ROLE, ROLE]
    assert [step for step, *_ in kept_late.taken] == [2, 3, 4, 6]
    # At the checkpoint after step 2 it is known that this step was skipped.
    assert [tree["skipped_in_a_row"] for _, _, tree, _ in kept_late.taken] == [1, 0, 0, 0]
    assert_same_states(kept, kept_late)
    assert all(torch.equal(p, weights(late)[name]) for name, p in weights(now).items())


def test_a_step_is_told_when_the_next_has_been_launched_and_a_milestone_waits_for_its_own(configured):
    config, learner_steps = configured(), []
    learner = learner_of(config)
    milestones = Snapshots(at=(4,))

    def tell(event: Any) -> None:
        learner_steps.append((event.step, learner.step))

    train(learner, [FixedStream(GOOD, 6)], Course(config.schedule, milestones, tell, depth=1))
    assert learner_steps == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6)]


def test_an_incident_has_the_batches_the_number_and_the_draws_of_its_own_step(configured):
    folders = []
    for depth in DEPTHS:
        config, told = configured(f"incident {depth}", save={"every": 0}), []
        course = Course(config.schedule, keeper_of(config, told), told.append, depth=depth)
        bad = broken()
        train(learner_of(config), [FixedStream([GOOD[0], bad, *GOOD, GOOD[0]], 6)], course)
        (incident,) = [event for event in told if isinstance(event, Incident)]
        assert (incident.step, incident.in_a_row) == (2, 1)
        folders.append(config.folder / "incidents" / "step_000002_train")
        assert torch.equal(load_file(folders[-1] / "batches.rank0.safetensors")["0.latents"], bad["latents"])
    facts = [json.loads((folder / "incident.rank0.json").read_text()) for folder in folders]
    assert facts[0] == facts[1] and facts[0]["drawn"] == 2


def test_too_many_skips_in_a_row_end_the_run_one_step_late_and_name_the_step_in_which_they_were_too_many(configured):
    never = {"every": 0}
    config, told = configured(save=never, validation=never, samples=never, schedule={"incidents": 2}), []
    learner = learner_of(config)
    course = Course(config.schedule, keeper_of(config, told), told.append, depth=1)
    with pytest.raises(RunError, match="2 steps in a row had a gradient that is not finite, the last at step 3"):
        train(learner, [FixedStream([GOOD[0], broken(), broken(), GOOD[1]], 6)], course)
    assert [event.step for event in told if isinstance(event, StepEnded)] == [1, 2]
    assert learner.step == 4


def test_a_stop_comes_to_the_same_end_and_all_is_told_before(configured):
    ends = []
    for depth in DEPTHS:
        asked = iter([False, False, True])
        ends.append(run_of(configured(f"stop {depth}"), GOOD, depth, stop=lambda asked=asked: next(asked)))
    (now, told, _), (late, told_late, _) = ends
    assert now.step == late.step == 2 and timeless(told) == timeless(told_late)
    assert [event.step for event in told_late] == [1, 2]


def test_what_fails_in_a_step_is_raised_after_the_step_before_it_was_told(configured):
    @dataclass(frozen=True)
    class Short(FixedStream):
        def batches(self, start, rank, world):
            yield from self.given
            raise DataError("there is no third batch")

    config, told = configured(), []
    with pytest.raises(DataError, match="third"):
        train(learner_of(config), [Short(GOOD[:2], 6)], Course(config.schedule, NoMilestones(), told.append, depth=1))
    assert [event.step for event in told] == [1, 2]


# ---- Numbers on their way ------------------------------------------------------------------------------------------


def test_numbers_come_as_they_were_when_they_were_sent(configured):
    loss, moved, items = torch.tensor(1.1), torch.tensor(True), torch.tensor(2**40 + 1)
    numbers = Sent({"loss": loss, "moved": moved, "items": items, "rate": 1e-4}, torch.device("cpu"))
    loss.fill_(7)  # a replay writes over its answers
    expected = {"loss": torch.tensor(1.1).item(), "moved": 1.0, "items": 2**40 + 1, "rate": 1e-4}
    assert numbers.read() == expected
    assert Sent({}, torch.device("cpu")).read() == {}


def test_a_stopped_watch_tells_the_same_however_late_it_is_read():
    watch = Stopwatch()
    watch.lap("data")
    watch.lap("forward")
    watch.lap("data")
    watch.stop()
    first = watch.seconds()
    assert first == watch.seconds()
    assert set(first) == {"data", "forward", "total"} and first["total"] >= first["data"] + first["forward"] - 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_parts_are_the_devices_own_time_and_the_host_is_not_stopped():
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch = Stopwatch(device=device)
        for _ in range(20):
            a = a @ a * 1e-4
        watch.lap("forward")
        watch.stop()
        numbers = Sent({"sum": a.sum()}, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers.read().keys() == {"sum"}
    assert watch.seconds()["forward"] > 0.01  # 20 x 1.1e12 FLOP
