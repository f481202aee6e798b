"""A run's state: one word that is true, and a reason that a user understands."""

import json
import os
import platform
import signal
import subprocess
from pathlib import Path

import pytest

from tests.dashboard import folders
from tests.dashboard.written import Clock, RunWriter
from weft import events
from weft.dashboard.pace import eta
from weft.dashboard.state import OVER, PHASES
from weft.dashboard.store import Store
from weft.run.folder import born

NOW = 1_795_274_532.0


def state_of(folder: Path, now: float = NOW) -> tuple[str, str | None]:
    summary = Store(folder.parent, lambda: now).summary(folder.name)
    return summary["state"], summary["reason"]


@pytest.mark.parametrize("name", ["training", "paused", "stalled", "stopped", "failed", "crashed"])
def test_each_run_of_the_gallery_is_in_its_state(tmp_path, name) -> None:
    state, reason = state_of(folders.GALLERY[name](tmp_path, NOW))
    assert state == ("crashed" if name == "failed" else name)
    assert bool(reason) == (state in ("crashed", "stalled"))


def test_a_run_that_has_only_begun_is_in_the_phase_of_its_heart(tmp_path) -> None:
    summary = Store(tmp_path, lambda: NOW)
    folders.no_points(tmp_path, NOW)
    found = summary.run("no-points")
    assert (found["state"], found["done"], found["total"], found["note"]) == ("caching", 37, 100, "clips/37.mp4")
    assert (found["step"], found["total_steps"], found["eta"], found["commands"]) == (0, 200, None, [])


def test_a_killed_run_is_crashed_with_step_and_advice_and_its_last_lines(tmp_path) -> None:
    folders.crashed(tmp_path, NOW)
    run = Store(tmp_path, lambda: NOW).run("crashed")
    assert "step 81" in run["reason"] and "newest checkpoint" in run["reason"]
    assert run["log"][-1] == {"text": "Fatal Python error: Segmentation fault", "level": "bad"}
    assert (run["eta"], run["commands"], run["gpus"][0]["state"]) == (None, [], "crashed")


def test_a_failed_run_says_its_own_reason(tmp_path) -> None:
    state, reason = state_of(folders.failed(tmp_path, NOW))
    assert (state, "CUDA out of memory" in str(reason)) == ("crashed", True)


def test_a_stalled_run_says_since_when_and_at_what(tmp_path) -> None:
    folder = folders.stalled(tmp_path, NOW)
    store = Store(tmp_path, lambda: NOW)
    run = store.run(folder.name)
    assert run["since"] == pytest.approx(NOW - 600, abs=2)
    assert "while training" in run["reason"] and "still lives" in run["reason"]
    assert (run["gpus"][0]["state"], run["eta"]) == ("stalled", None)
    assert "stop" in run["commands"]


def test_a_process_that_was_held_by_ctrl_z_is_stalled_and_the_page_says_how_it_goes_on(tmp_path) -> None:
    state, reason = state_of(folders.stalled(tmp_path, NOW), NOW + 40)
    assert state == "stalled" and reason and "Ctrl-Z" in reason and "kill -CONT" in reason


def test_a_slow_step_is_no_stall(tmp_path) -> None:
    """600 s without a sign, where 200 s between two have been usual."""
    folder = folders.stalled(tmp_path, NOW)
    beat = json.loads((folder / "heartbeat.rank0.json").read_text())
    (folder / "heartbeat.rank0.json").write_text(json.dumps({**beat, "slowest": 200.0}))
    assert state_of(folder) == ("training", None)


def test_a_process_that_is_no_more_asked_for_its_end_is_dead(tmp_path) -> None:
    """A zombie has its number still, and works no more."""
    with subprocess.Popen(["sleep", "60"]) as child:
        run = folders.begun(tmp_path / "run", NOW, alive=True)
        facts = {"pid": child.pid, "born": born(child.pid), "host": platform.node(), "started": run.start}
        for path in (run.folder / "process.rank0.json", run.folder / "heartbeat.rank0.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
        assert state_of(run.folder)[0] == "training"
        os.kill(child.pid, signal.SIGSTOP)
        assert state_of(run.folder, NOW + 300)[0] == "stalled", "its heart stands still, too"
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{child.pid}").exists()
        assert state_of(run.folder)[0] == "crashed"


def test_a_number_that_is_another_process_now_is_a_crash(tmp_path) -> None:
    run = folders.begun(tmp_path / "run", NOW, alive=True)
    for path in (run.folder / "process.rank0.json", run.folder / "heartbeat.rank0.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "born": "1"}))
    assert state_of(run.folder)[0] == "crashed"


def elsewhere(folder: Path, pid: int = 7, **change: float) -> None:
    """Move a run's process to another machine."""
    for name in ("process.rank0.json", "heartbeat.rank0.json"):
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, "host": "far away", "pid": pid, **change}))


def test_a_process_on_another_host_lives_as_long_as_its_heart_beats(tmp_path) -> None:
    """Its clock may be wrong by minutes: what counts is that the beat changes while we look."""
    run, clock = folders.begun(tmp_path / "run", NOW, alive=True), Clock(NOW)
    store = Store(tmp_path, clock)
    late = NOW - 600
    states = []
    for seconds in range(0, 121, 5):
        clock.now = NOW + seconds
        beats = min(seconds, 40)  # then it is silent
        elsewhere(run.folder, time=late + beats, progress=late + beats)
        states.append(store.summary("run")["state"])
    assert states[:9] == ["training"] * 9
    assert states[-1] == "crashed"
    assert states.index("crashed") * 5 <= 40 + 60


def test_a_heart_on_another_host_that_stopped_hours_ago_is_a_crash_at_once(tmp_path) -> None:
    run = folders.begun(tmp_path / "run", NOW, alive=True)
    elsewhere(run.folder, time=NOW - 7200, progress=NOW - 7200)
    assert state_of(run.folder)[0] == "crashed"


def test_a_heart_that_beats_on_in_another_container_is_no_crash(tmp_path) -> None:
    """Containers may share a host's name and not its numbers: the pid is not to be seen, and the beat goes on."""
    run, clock = folders.begun(tmp_path / "run", NOW, alive=False), Clock(NOW)
    store = Store(tmp_path, clock)
    assert store.summary("run")["state"] == "crashed"
    for seconds in (2, 4, 6):
        clock.now = NOW + seconds
        run.clock.now = clock.now
        run.beats("training", 81)
        found = store.summary("run")["state"]
    assert found == "training"
    clock.now += 70
    assert store.summary("run")["state"] == "crashed"


def test_an_older_run_without_heartbeat_is_judged_by_process_and_gpu_file(tmp_path) -> None:
    run = folders.begun(tmp_path / "run", NOW, alive=True)
    (run.folder / "heartbeat.rank0.json").unlink()
    assert state_of(run.folder, NOW + 30)[0] == "training"
    assert state_of(run.folder, NOW + 300)[0] == "stalled"


def test_the_heartbeat_of_an_earlier_process_counts_for_nothing(tmp_path) -> None:
    run = folders.begun(tmp_path / "run", NOW, alive=True)
    beat = json.loads((run.folder / "heartbeat.rank0.json").read_text())
    stale = {**beat, "pid": 1, "born": "1", "phase": "saving", "time": NOW + 5, "progress": NOW - 9999}
    (run.folder / "heartbeat.rank0.json").write_text(json.dumps(stale))
    assert state_of(run.folder) == ("training", None)


def test_a_finished_run_that_is_started_again_is_starting(tmp_path) -> None:
    folder = folders.stopped(tmp_path, NOW - 3600)
    run = RunWriter.reopened(folder, NOW - 3)
    run.trains(alive=True)
    assert state_of(folder) == ("starting", None)
    run.tell(events.PhaseStarted(phase="starting"))
    run.tell(events.PhaseStarted(phase="caching", total=3))
    assert state_of(folder) == ("caching", None)


def test_after_a_validation_the_next_step_says_that_it_trains_again(tmp_path) -> None:
    run = folders.begun(tmp_path / "run", NOW, alive=True)
    (run.folder / "heartbeat.rank0.json").unlink()
    run.evaluated(81)
    assert state_of(run.folder)[0] == "validating"
    run.step(82)
    assert state_of(run.folder)[0] == "training"


def test_a_run_that_ended_without_a_word_and_without_a_trace_is_crashed(tmp_path) -> None:
    """A full disk: the process signed off and could not say more."""
    run = folders.begun(tmp_path / "run", NOW, alive=None)
    state, reason = state_of(run.folder)
    assert (state, "full disk" in str(reason)) == ("crashed", True)


DAMAGES = (
    b"", b"{", b"[1]", b"\xff\x00", b'{"pid": "x", "host": 3, "time": "y", "step": [], "schedule": 3, "samples": []}',
    b'{"pid": 99999999999999999999, "history": [1], "gpu": 1, "memory": [], "time": NaN}',
)  # fmt: skip


@pytest.mark.parametrize("name", ["process.rank0.json", "heartbeat.rank0.json", "training_gpu0.json", "config.yaml"])
@pytest.mark.parametrize("content", DAMAGES)
def test_whatever_small_files_hold_there_is_a_state_and_an_answer_in_json(tmp_path, name, content) -> None:
    folder = folders.begun(tmp_path / "run", NOW, alive=True).folder
    (folder / name).write_bytes(content)
    store = Store(tmp_path, lambda: NOW)
    told = store.run("run")
    assert told["state"] in (*PHASES, *OVER, "stalled")
    assert json.dumps([told, store.status(), store.compare(["run", "run"])], allow_nan=False)


def test_the_time_left_counts_validations_and_no_pauses(tmp_path) -> None:
    """10 s of validation after each 10 steps of 1 s: half of the time. A pause of an hour is none of it."""
    run = RunWriter(tmp_path / "run", NOW - 5000, steps=200)
    run.trains(alive=True)
    run.begin()
    for step in range(1, 101):
        run.step(step, seconds=1.0)
        if step % 10 == 0:
            run.tell(events.PhaseStarted(phase="validating"))
            run.clock.now += 10
        if step == 55:
            run.tell(events.PhaseStarted(phase="paused"))
            run.tell(events.PhaseStarted(phase="training"), after=3600)
    run.gpu_file()
    run.beats("training", 100)
    left = Store(tmp_path, lambda: run.clock.now).summary("run")["eta"]
    assert left == pytest.approx(200, rel=0.1)


def test_there_is_no_time_left_to_tell_while_warming_up_and_none_at_the_end() -> None:
    points = [{"step": n, "time": float(n), "seconds": 1.0} for n in range(1, 3)]
    assert eta(points, [], None, 100) is None
    assert eta(points, [], 1.0, 100) is None
    assert eta([*points, {"step": 3, "time": 3.0, "seconds": 1.0}], [], 1.0, 100) == 100.0
    assert eta(points, [], 1.0, 0) == 0.0


def test_a_lost_peer_is_named_where_the_others_wait_for_it(tmp_path) -> None:
    folder = folders.eight_gpus(tmp_path, NOW)
    now = NOW + 300
    dead = json.loads((folder / "process.rank3.json").read_text()) | {"born": "1"}
    (folder / "process.rank3.json").write_text(json.dumps(dead))
    run = Store(tmp_path, lambda: now).run("eight-gpus")
    assert (run["state"], "rank 3 is gone" in run["reason"]) == ("stalled", True)
    assert [gpu["state"] for gpu in run["gpus"]] == ["stalled"] * 3 + ["crashed"] + ["stalled"] * 4


def test_a_clock_that_is_set_back_takes_no_step_away(tmp_path) -> None:
    run = RunWriter(tmp_path / "backward", NOW - 100)
    run.trains(alive=True)
    run.begin()
    for step in range(1, 21):
        run.step(step)
    run.clock.now -= 3600
    for step in range(21, 31):
        run.step(step)
    assert Store(tmp_path, lambda: run.clock.now).summary("backward")["step"] == 30


def test_a_damaged_time_is_not_when_a_run_ended(tmp_path) -> None:
    told = Store(folders.corrupt(tmp_path, NOW).parent, lambda: NOW).summary("corrupt")
    assert told["since"] > NOW - 3600
