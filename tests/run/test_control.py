"""Commands to a running trainer: what each does, what none of them changes, and what a crash does not forget."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest

from tests.learners import learner_of, small_config
from tests.multi import spawn
from tests.run.test_resume import Killed, silent, tensor_bytes
from tests.small import config_of, merged, plain_config
from weft.events import Controlled, Evaluated, Event, PhaseStarted, Sampled, Saved, StepEnded
from weft.run import control
from weft.run.checkpoint import read_checkpoint
from weft.run.checkpoint_folders import facts_of, list_checkpoints, read_manifest, sealed
from weft.run.config import RunConfig
from weft.run.folder import claim
from weft.run.inbox import Inbox, post
from weft.run.listeners import read_events, read_steps
from weft.run.milestones import Keeper
from weft.run.start import train_run

STEPS = 6
QUICK = 0.002  # seconds between two looks into the inbox
CHANGE = {
    "schedule": {"steps": STEPS, "curve": "cosine", "warmup": 1},
    "save": {"every": 0},
    "validation": {"every": 0},
    "adapter": {"input_dropout": 0.1, "lora_plus": 4},
    "samples": {
        "prompts": ["a square"],
        "frames": 5,
        "width": 32,
        "height": 32,
        "steps": 1,
        "every": 0,
        "baseline": False,
    },
}
Given = tuple[str, Mapping[str, Any]]
# Where the run stands -> what it is told there: after a step, or in the n-th pause.
Plan = Mapping[int | str, list[Given]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "GLANCE", QUICK)


class Told:
    """Hears a run's events, and gives commands where a plan says, as another process would: by the inbox."""

    def __init__(self, run: Path, plan: Plan, then: Callable[[Event], None] = silent) -> None:
        self.run, self.plan, self.then = run, plan, then
        self.heard: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.heard.append(event)
        place: int | str | None = event.step if isinstance(event, StepEnded) else None
        if isinstance(event, PhaseStarted) and event.phase == "paused":
            place = f"pause {sum(isinstance(e, PhaseStarted) and e.phase == 'paused' for e in self.heard)}"
        for command, arguments in self.plan.get(place, []) if place is not None else []:
            post(self.run, command, arguments, by="ctl")
        if isinstance(event, StepEnded) and event.step in self.plan:
            time.sleep(2 * QUICK)
        self.then(event)

    @property
    def answers(self) -> list[tuple[str, int, bool, str]]:
        return [(e.command, e.step, e.done, e.reason) for e in self.heard if isinstance(e, Controlled)]

    @property
    def rates(self) -> list[float]:
        return [e.metrics["default/lr"] for e in self.heard if isinstance(e, StepEnded)]


def trained(config: RunConfig, plan: Plan, then: Callable[[Event], None] = silent) -> Told:
    """What a run that is told so tells."""
    told = Told(config.folder, plan, then)
    train_run(config, told)
    return told


@pytest.fixture(scope="module")
def untold(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The run that nobody commands, and its rates."""
    plain = plain_config(tmp_path_factory.mktemp("untold"), world / "model", world / "clips")
    plain["data"]["cache_folder"] = str(world / "cache")
    config = config_of(plain, **CHANGE)
    return config.folder, trained(config, {}).rates


@pytest.fixture
def config(plain: dict[str, Any]) -> RunConfig:
    return config_of(plain, **CHANGE)


def weights_of(run: Path) -> bytes:
    return tensor_bytes(run / "adapter" / "adapter_model.safetensors")


# ---- What is learned -----------------------------------------------------------------------------------------------


def test_pausing_saving_validating_and_sampling_change_no_bit_of_what_is_learned(untold, plain):
    config = config_of(plain, **merged(CHANGE, {"validation": {"every": 100}}))
    told = trained(
        config,
        {
            2: [("pause", {})],
            "pause 1": [("save", {}), ("validate", {}), ("sample", {})],
            "pause 2": [("resume", {})],
            4: [("sample", {}), ("save", {}), ("validate", {})],
        },
    )
    assert weights_of(config.folder) == weights_of(untold[0])
    assert told.rates == untold[1]
    # Each was done, before the next step, in the order in which it was given.
    assert [(command, step, done) for command, step, done, _ in told.answers] == [
        ("pause", 2, True), ("save", 2, True), ("validate", 2, True), ("sample", 2, True), ("resume", 2, True),
        ("sample", 4, True), ("save", 4, True), ("validate", 4, True),
    ]  # fmt: skip
    assert [e.step for e in told.heard if isinstance(e, Saved)] == [2, 4, STEPS]
    assert {2, 4} <= {e.step for e in told.heard if isinstance(e, Evaluated)}
    assert {2, 4} <= {e.step for e in told.heard if isinstance(e, Sampled)}
    phases = [event.phase for event in told.heard if isinstance(event, PhaseStarted)]
    assert phases[phases.index("paused") :][:5] == ["paused", "saving", "validating", "sampling", "paused"]
    assert "training" in phases[phases.index("paused") :]


def test_a_pause_is_in_no_steps_seconds(config):
    def wait(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "paused":
            time.sleep(1.0)

    told = trained(config, {2: [("pause", {})], "pause 1": [("resume", {})]}, wait)
    seconds = [event.seconds for event in told.heard if isinstance(event, StepEnded)]
    assert max(each["total"] for each in seconds) < 1.0
    assert max(each["data"] for each in seconds) < 0.5


def test_stop_saves_after_the_step_and_the_run_goes_on_exactly(untold, config):
    told = Told(config.folder, {3: [("stop", {})]})
    result = train_run(config, told)
    assert (result.finished, result.step) == (False, 3)
    assert told.answers == [("stop", 3, True, "it saves and ends")]
    assert [path.name for path in list_checkpoints(config.folder)] == ["global_step_3"]
    end = list(read_events(config.folder / "events.rank0.jsonl"))[-1]
    assert (end["event"], end["outcome"]) == ("run_ended", "stopped")
    assert train_run(config, silent).finished
    assert weights_of(config.folder) == weights_of(untold[0])


@pytest.mark.parametrize("how", ["command", "signal"])
def test_a_paused_run_can_be_ended(config, how):
    heard: list[str] = []

    def remember(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            heard.append(event.phase)

    told = Told(config.folder, {2: [("pause", {})], "pause 1": [("stop", {})] if how == "command" else []}, remember)
    result = train_run(config, told, lambda: how == "signal" and "paused" in heard)
    assert (result.finished, result.step) == (False, 2)
    assert [path.name for path in list_checkpoints(config.folder)] == ["global_step_2"]


# ---- The rate ------------------------------------------------------------------------------------------------------


def test_a_rate_moves_the_top_of_the_schedule_and_leaves_its_curve(untold, config):
    before = untold[1]  # 1e-3 at the top
    told = trained(config, {2: [("rate", {"lr": 5e-4})], 4: [("rate", {"factor": 0.1, "optimizer": "default"})]})
    factors = [1.0, 1.0, 0.5, 0.5, 0.05, 0.05]
    assert told.rates == pytest.approx([rate * factor for rate, factor in zip(before, factors, strict=True)])
    second = [e.metrics["default/lr_2"] for e in told.heard if isinstance(e, StepEnded)]
    assert second == pytest.approx([4 * rate for rate in told.rates])  # LoRA+'s ratio
    assert [reason for *_, reason in told.answers] == ["default: 0.001 -> 0.0005", "default: 0.0005 -> 5e-05"]
    assert read_checkpoint(list_checkpoints(config.folder)[-1]).tree["rates"] == {"default": pytest.approx(5e-5)}


def test_a_changed_rate_outlives_a_kill_to_the_bit(plain):
    """SIGKILL two steps after the change: no checkpoint is written but the one that the change itself writes."""
    plan: Plan = {3: [("rate", {"lr": 4e-4})]}
    whole, broken = (config_of({**plain, "name": name}, **CHANGE) for name in ("whole", "broken"))
    trained(whole, plan)

    def die(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        trained(broken, plan, die)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(broken.folder)] == ["global_step_3"]
    told = trained(broken, {})
    assert weights_of(broken.folder) == weights_of(whole.folder)
    logs = [read_steps(config.folder / "events.rank0.jsonl") for config in (whole, broken)]
    assert [log[step]["metrics"] for log in logs[:1] for step in log] == [logs[1][step]["metrics"] for step in logs[0]]
    assert any("goes on at a learning rate of 0.0004, set while it trained" in str(event) for event in told.heard)


def test_a_rate_that_was_set_right_after_a_save_is_in_that_steps_checkpoint(plain):
    config = config_of(plain, **merged(CHANGE, {"save": {"every": 2}}))
    told = Told(config.folder, {2: [("rate", {"lr": 4e-4})]}, lambda event: kill_at(event, 3))
    with pytest.raises(Killed):
        train_run(config, told)
    assert read_checkpoint(config.folder / "checkpoints" / "global_step_2").tree["rates"] == {"default": 4e-4}


def kill_at(event: Event, step: int) -> None:
    if isinstance(event, StepEnded) and event.step == step:
        raise Killed


def test_another_rate_in_the_config_counts_again(plain):
    """What the user has written last is meant."""
    config = config_of(plain, **CHANGE)
    train_run(config, Told(config.folder, {2: [("rate", {"lr": 4e-4}), ("stop", {})]}))
    changed = config_of(plain, **CHANGE, optimizer={"lr": 2e-3}, resume_allow=["optimizer.lr"])
    told = trained(changed, {})
    assert told.rates[-1] / 2e-3 == pytest.approx(expected_factor(), rel=1e-6)
    assert any("new learning rate 0.002 counts; 0.0004" in str(event) for event in told.heard)
    assert read_checkpoint(list_checkpoints(config.folder)[-1]).tree["rates"] == {}


def expected_factor() -> float:
    """Of the last of six steps, half a cosine after one step of warm-up: (1 + cos(4 pi / 5)) / 2."""
    return (1 + cos(4 * pi / 5)) / 2


def test_a_checkpoint_from_before_there_were_rates_still_loads(untold, config):
    train_run(config, Told(config.folder, {3: [("stop", {})]}))
    folder = config.folder / "checkpoints" / "global_step_3"
    tree = json.loads((folder / "state.json").read_text())
    assert tree.pop("rates") == {}
    (folder / "state.json").write_text(json.dumps(tree))
    reseal(folder)
    assert train_run(config, silent).finished
    assert weights_of(config.folder) == weights_of(untold[0])


def reseal(folder: Path) -> None:
    """Make a checkpoint whose files were changed one that was saved so."""
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest["files"] |= facts_of(folder, folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


# ---- What is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_followed_is_refused_with_its_reason_and_the_training_goes_on(plain):
    config = config_of(plain, **merged(CHANGE, {"samples": {"prompts": []}}))
    config.folder.mkdir(parents=True)
    (config.folder / "inbox").mkdir()
    (config.folder / "inbox" / "0.json").write_text('{"command": "stop"}')

    def scribble(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == 3:
            (config.folder / "inbox" / "9.json").write_text("hello")

    told = trained(
        config,
        {
            1: [("resume", {}), ("sample", {}), ("validate", {})],
            2: [("rate", {"lr": 1e-3, "optimizer": "defualt"}), ("pause", {}), ("pause", {})],
            "pause 1": [("rate", {"factor": 1e-308}), ("rate", {"factor": 1e-308}), ("resume", {})],
            STEPS: [("save", {})],
        },
        scribble,
    )
    assert [(command, step, reason) for command, step, done, reason in told.answers if not done] == [
        ("stop", 0, "it came before this training began"),
        ("resume", 1, "it is not paused"),
        ("sample", 1, "this run has no samples.prompts"),
        ("validate", 1, "this run has nothing to measure: see validation.every and data.validation_items"),
        ("rate", 2, "there is no optimizer 'defualt'. Did you mean 'default'?"),
        ("pause", 2, "it is paused already"),
        ("rate", 2, "default: the rate would be 0.0"),
        ("unreadable", 3, "it is no JSON that can be read"),
        ("save", STEPS, "the training had ended"),
    ]
    assert 0 < told.rates[-1] < 1e-300  # a foolish number, but one


def test_a_run_whose_inbox_is_taken_away_trains_on_and_says_so(config):
    def remove(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == 1:
            shutil.rmtree(config.folder / "inbox")

    told = trained(config, {}, remove)
    assert sum("commands are not heard" in str(event) for event in told.heard) == 1
    assert len(told.rates) == STEPS


# ---- Several optimizers, several processes -------------------------------------------------------------------------


def test_of_several_optimizers_a_name_picks_one_and_without_a_name_all_are_meant(world, tmp_path):
    config = small_config(tmp_path, world / "model", objective={"kind": "dmd", "steps": 4, "shift": 5.0})
    learner = learner_of(config)
    config.folder.mkdir(parents=True)
    claim(config.folder)
    told: list[Any] = []
    keeper = Keeper(config, {}, {"weft.seed": "5"}, told.append, None, None)  # type: ignore[arg-type]
    orders = control.Control(keeper, told.append, lambda: False, Inbox(config.folder))
    post(config.folder, "rate", {"lr": 3e-4, "optimizer": "critic"}, by="dashboard")
    assert not orders.obey(learner)
    assert learner.rates == {"critic": 3e-4}
    post(config.folder, "rate", {"factor": 0.5}, by="dashboard")
    assert not orders.obey(learner)
    keeper.saver.close()
    assert learner.rates == {"critic": 1.5e-4, "student": 5e-4}
    answers = [event.reason for event in told if isinstance(event, Controlled)]
    assert answers[0] == "critic: 0.001 -> 0.0003"
    assert sorted(answers[1].split(", ")) == ["critic: 0.0003 -> 0.00015", "student: 0.001 -> 0.0005"]


def commanded(plain: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, as its rank, while rank 0's listener gives commands; what was told, and the rates."""
    control.GLANCE, control.MEETING = QUICK, 0.02
    config = config_of(plain)
    rank = int(os.environ["RANK"])
    plan: Plan = {
        1: [("pause", {})],
        "pause 1": [("rate", {"lr": 5e-4}), ("save", {})],
        "pause 2": [("resume", {})],
        3: [("sample", {}), ("validate", {})],
        5: [("stop", {})],
    }
    told = Told(config.folder, plan if rank == 0 else {})
    result = train_run(config, told)
    # Without their minutes and steps: of several processes all act after the step in which the first has heard.
    return {
        "answers": [(command, done) for command, _, done, _ in told.answers],
        "steps": [step for _, step, _, _ in told.answers],
        "rates": told.rates,
        "step": result.step,
        "finished": result.finished,
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "sequence", "zero"])
def test_every_rank_acts_on_a_command_after_the_same_step(plain, layout):
    change: dict[str, Any] = {
        "ddp": {"parallel": {"data": 2}},
        "sequence": {"parallel": {"sequence": 2}, "adapter": {"input_dropout": 0.0}},
        "zero": {"engine": {"kind": "deepspeed", "zero": 2, "device": "cpu"}},
    }[layout]
    steady = {"schedule": {"steps": 12, "curve": "constant", "warmup": 0}, "validation": {"every": 100}}
    config = merged(merged(merged({**plain, "name": layout}, CHANGE), steady), change)
    first, second = spawn(2, commanded, config)
    assert first == second
    assert first["answers"] == [
        (name, True) for name in ("pause", "rate", "save", "resume", "sample", "validate", "stop")
    ]
    assert (first["finished"], first["step"]) == (False, first["steps"][-1])
    heard = first["steps"][0]
    assert heard in (1, 2)  # the word travels with a step
    assert first["rates"] == pytest.approx([1e-3] * heard + [5e-4] * (first["step"] - heard))
    assert first["steps"] == [heard] * 4 + [first["steps"][4]] * 2 + [first["step"]]
