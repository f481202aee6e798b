"""training_gpu{N}.json: what a run's GPU does, in one file that is always whole."""

import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.small import config_of
from weft.engines.single_device import SingleEngine
from weft.engines.visible import PROCESS_NUMBER
from weft.events import Evaluated, Incident, PhaseStarted, RunEnded, RunStarted, StepEnded
from weft.run import gpu_log
from weft.run.folder import born
from weft.run.gpu_log import GpuLog, History, memory, open_gpu_log, remove_dead
from weft.run.listeners import Eta, EventLog
from weft.run.start import train_run

MEMORY = {"used": 3, "peak": 4, "used_by_all": 5, "total": 6}


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def began(step: int = 0, total: int = 10) -> RunStarted:
    return RunStarted(name="run", step=step, total_steps=total, resumed_from=None, trainable=1, device="cpu")


def step_of(number: int, loss: float, **more: float) -> StepEnded:
    metrics = {"train/loss": loss, "default/lr": 0.5, **more}
    seconds = {"data": 0.5, "forward": 1.0, "total": 2.0}
    return StepEnded(step=number, experience="clips", metrics=metrics, seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hears(tmp_path, clock):
    """Both logs of a run on one clock, told of the same events."""

    def opened():
        log = EventLog(tmp_path / "events.rank0.jsonl")
        gpu = GpuLog(
            tmp_path / "training_gpu0.json", {"run": "run"}, tmp_path / "events.rank0.jsonl", lambda: MEMORY, clock
        )

        def tell(event):
            log(event)
            gpu(event)

        return tell

    return opened


def test_it_says_the_step_the_losses_the_time_left_and_the_wait_for_data(tmp_path, clock, hears):
    tell = hears()
    tell(began())
    for number, loss in ((1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)):
        clock.seconds += 2
        tell(step_of(number, loss))
    found = read(tmp_path / "training_gpu0.json")
    assert (found["state"], found["activity"], found["step"], found["total_steps"]) == ("running", "training", 4, 10)
    # 4; 0.9*4+0.1*3 = 3.9; 0.9*3.9+0.2 = 3.71; 0.9*3.71+0.1 = 3.439
    assert found["loss"] == 1.0 and found["smoothed_losses"] == {"train": pytest.approx(3.439)}
    assert found["lr"] == 0.5 and found["seconds_per_step"] == 2.0 and found["eta"] == 12.0
    assert found["data_wait"] == 0.25 and found["memory"] == MEMORY
    assert (found["started_at"], found["updated_at"], found["pid"]) == (100.0, 108.0, os.getpid())
    assert [point["step"] for point in found["history"]] == [1, 2, 3, 4]


def test_two_experts_are_two_curves(tmp_path, clock, hears):
    tell = hears()
    tell(began())
    for number, phase, loss in ((1, "high", 4.0), (2, "low", 1.0), (3, "high", 2.0)):
        clock.seconds += 2
        tell(StepEnded(step=number, experience="x", metrics={f"{phase}/loss": loss}, seconds={"data": 0, "total": 1}))
    found = read(tmp_path / "training_gpu0.json")
    assert found["smoothed_losses"] == {"high": pytest.approx(3.8), "low": 1.0}
    assert [point["phase"] for point in found["history"]] == ["high", "low", "high"]


def test_it_is_written_at_most_once_a_second_and_at_the_end(tmp_path, clock, hears):
    tell = hears()
    clock.seconds += 1
    tell(began())
    clock.seconds += 0.5
    tell(step_of(1, 1.0))
    assert read(tmp_path / "training_gpu0.json")["step"] == 0
    clock.seconds += 0.5
    tell(step_of(2, 1.0))
    assert read(tmp_path / "training_gpu0.json")["step"] == 2
    tell(step_of(3, 1.0))
    tell(RunEnded(step=3, outcome="finished"))
    found = read(tmp_path / "training_gpu0.json")
    assert (found["step"], found["state"], found["eta"], found["error"]) == (3, "finished", None, None)


def test_a_resumed_run_goes_on_with_the_history_of_the_steps_that_count(tmp_path, clock, hears):
    tell = hears()
    tell(began())
    for number in range(1, 6):
        tell(step_of(number, float(number)))
    tell = hears()  # killed at step 5, resumed at 3
    assert read(tmp_path / "training_gpu0.json")["history"] == []
    clock.seconds = 200.0
    tell(began(step=3))
    tell(step_of(4, 40.0))
    clock.seconds += 1
    tell(step_of(5, 50.0))
    found = read(tmp_path / "training_gpu0.json")
    assert [(p["step"], p["loss"]) for p in found["history"]] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    first = json.loads((tmp_path / "events.rank0.jsonl").read_text().splitlines()[0])
    assert (found["started_at"], found["resumed_at"]) == (first["time"], 200.0)


def test_what_went_wrong_is_kept_and_a_loss_that_is_no_number_is_null(tmp_path, clock, hears):
    tell = hears()
    tell(began())
    clock.seconds += 1
    tell(step_of(1, float("nan")))
    tell(Incident(step=1, phase="train", reason="the gradient is not finite", folder=None, in_a_row=1))
    tell(Evaluated(step=1, loss=1.0, baseline=2.0, by_time={}, baseline_by_time={}, items=3, failed=1))
    tell(RunEnded(step=1, outcome="failed", reason="DataError: gone"))
    found = read(tmp_path / "training_gpu0.json")
    assert found["loss"] is None and found["history"][0]["loss"] is None
    assert found["state"] == "failed" and found["error"]["reason"] == "DataError: gone"
    assert found["validation"] == {"step": 1, "loss": 1.0, "baseline": 2.0, "items": 3, "failed": 1}


def test_a_failure_before_the_first_step_is_in_it_too(tmp_path, hears):
    tell = hears()
    tell(PhaseStarted(phase="caching", total=3))
    tell(RunEnded(step=0, outcome="failed", reason="DataError: gone"))
    found = read(tmp_path / "training_gpu0.json")
    assert (found["state"], found["activity"], found["total_steps"]) == ("failed", "caching", None)


def test_a_long_history_is_thinned_evenly_and_keeps_its_newest_point():
    history = History()
    for step in range(1, 10 * gpu_log.POINTS):
        history.add({"step": step})
    steps = [point["step"] for point in history.points()]
    gaps = {b - a for a, b in pairwise(steps[:-1])}
    assert len(steps) <= gpu_log.POINTS + 1 and steps[0] == 1 and steps[-1] == 10 * gpu_log.POINTS - 1
    assert gaps == {16}  # 9,999 points under 1,000: every 16th


def test_the_log_of_a_dead_process_on_another_gpu_goes_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = {"pid": os.getpid(), "born": born(os.getpid()), "host": platform.node()}
    for number, facts in ((0, {**alive, "pid": ended.pid, "born": "1"}), (1, alive), (2, {**alive, "host": "far"})):
        (tmp_path / f"training_gpu{number}.json").write_text(json.dumps(facts))
    monkeypatch.setenv(PROCESS_NUMBER, "3")
    remove_dead(tmp_path)
    open_gpu_log(tmp_path, SingleEngine(torch.device("cpu"), "fp32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"training_gpu{n}.json" for n in (1, 2, 3)]
    assert read(tmp_path / "training_gpu3.json")["gpu"]["number"] == 3


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's memory so")
def test_memory_on_a_cpu_is_that_of_the_process_and_of_the_machine():
    found = memory(torch.device("cpu"))
    assert 0 < found["used"] <= found["peak"] <= found["total"]
    assert found["used"] <= found["used_by_all"] <= found["total"]


def test_every_run_keeps_one(plain):
    result = train_run(config_of(plain, schedule={"steps": 2}), lambda event: None)
    found = read(result.folder / "training_gpu0.json")
    assert (found["state"], found["step"], found["run"]) == ("finished", 2, "run")
    assert [point["step"] for point in found["history"]] == [1, 2]
    again = train_run(config_of(plain, schedule={"steps": 3, "curve": "constant"},
                                resume_allow=["schedule"]), lambda event: None)  # fmt: skip
    assert [point["step"] for point in read(again.folder / "training_gpu0.json")["history"]] == [1, 2, 3]


def test_the_time_left_is_that_of_usual_steps_and_not_of_one_in_which_the_machine_slept():
    eta = Eta()
    for seconds in (9.0, 9.0, 2.0, 2.0, 3600.0, 2.0):  # two warm the process up, and one is a closed lid
        eta.step(seconds)
    assert eta.left(100) == pytest.approx(200.0)
    for _ in range(60):  # it really is slower now
        eta.step(40.0)
    assert eta.left(100) == pytest.approx(4000.0, rel=0.01)
