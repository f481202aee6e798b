"""`weft ctl`: commands from a shell to a real training process, and what is said when nobody answers."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from weft.cli.ctl import Answers
from weft.cli.launched import STOPPED_EVERYWHERE, Rank, as_rank
from weft.cli.main import main
from weft.run.folder import born
from weft.run.listeners import read_events, read_steps


def written_down(folder: Path, **facts: object) -> Path:
    """A run's folder in which a process says that it trains."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"pid": os.getpid(), "born": born(os.getpid()), "host": platform.node(), "started": time.time()}
    (folder / "process.rank0.json").write_text(json.dumps({**own, **facts}))
    return folder


def beat(folder: Path, **facts: object) -> None:
    own = {"pid": os.getpid(), "host": platform.node(), "rank": 0, "time": time.time(), "progress": time.time(),
           "phase": "training", "step": 12, "total_steps": 400}  # fmt: skip
    (folder / "heartbeat.rank0.json").write_text(json.dumps({**own, **facts}))


def test_a_run_that_nobody_trains_is_told_with_the_nearest(tmp_path, capsys):
    (tmp_path / "first-run").mkdir()
    assert main(["ctl", str(tmp_path / "first-run"), "pause"]) == 2
    assert "nobody trains here now" in capsys.readouterr().err
    assert main(["ctl", str(tmp_path / "frist-run")]) == 2
    assert "no such run. Did you mean 'first-run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["puase"], "no command 'puase'. Did you mean 'pause'?"),
        (["pause", "5"], "pause: 'lr' is no argument of it"),
        (["rate"], "got neither"),
        (["rate", "0"], "must be a number above 0"),
        (["rate", "5e-5", "--factor", "2"], "got both"),
        (["rate", "much"], "invalid float value: 'much'"),
    ],
)
def test_what_is_no_command_is_refused_before_it_is_given(tmp_path, capsys, words, told):
    run = written_down(tmp_path / "run")
    assert main(["ctl", str(run), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (run / "inbox").exists()


def test_alone_it_says_who_trains_where_it_stands_and_what_can_be_asked(tmp_path, capsys):
    run = written_down(tmp_path / "run")
    beat(run)
    assert main(["ctl", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"process {os.getpid()} on {platform.node()}" in said and "training, step 12 of 400" in said
    assert all(f"  {name} " in said for name in ("pause", "resume", "stop", "save", "validate", "sample", "rate"))


def test_a_command_that_is_not_answered_in_time_stays_and_the_silence_is_told(tmp_path, capsys):
    run = written_down(tmp_path / "run", host="elsewhere", pid=7)
    beat(run, time=time.time() - 300)
    assert main(["ctl", str(run), "save", "--timeout", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "process 7 on elsewhere, training at step 12 has not answered 'save' within 0.1 s" in said
    assert "last sign of life 300 s ago" in said and "stays in its inbox" in said
    assert len(list((run / "inbox").glob("*.json"))) == 1


def test_a_trainer_that_ends_before_it_hears_is_told_at_once(tmp_path, capsys):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run = written_down(tmp_path / "run", pid=child.pid, born=born(child.pid))
    threading.Timer(0.3, child.kill).start()
    assert main(["ctl", str(run), "save"]) == 2
    assert f"process {child.pid} ended before it heard 'save'" in capsys.readouterr().err
    child.wait()


def test_a_launcher_learns_that_a_command_has_ended_the_run_on_every_host(tmp_path, monkeypatch):
    """After the signal of one host the others go on without it; after a command nobody does."""
    monkeypatch.setattr("weft.cli.launched.end_with_parent", lambda: None)
    rank = Rank(1, 2, tmp_path / "rank1.outcome")
    assert as_rank(rank, lambda: STOPPED_EVERYWHERE) == 0
    assert json.loads((tmp_path / "rank1.outcome").read_text()) == {"stopped": True, "everywhere": True}


def test_an_answer_is_found_among_new_lines_alone_and_half_a_line_is_read_when_it_is_whole(tmp_path):
    log = tmp_path / "events.rank0.jsonl"
    old: dict[str, Any] = {"event": "control", "id": "old", "command": "save", "step": 1, "done": True, "reason": ""}
    log.write_text(json.dumps(old) + "\n")
    answers = Answers(log)
    assert answers.to("old") is None
    line = json.dumps({**old, "id": "new"})
    with log.open("a") as more:
        more.write("{torn\n[1]\n" + line[:20])
    assert answers.to("new") is None
    with log.open("a") as more:
        more.write(line[20:] + "\n")
    assert answers.to("new") == {**old, "id": "new"}


@pytest.mark.slow
def test_a_running_training_follows_each_command_from_a_shell(run_yaml, tmp_path, start, capsys):
    run = tmp_path / "runs" / "run"
    log = run / "events.rank0.jsonl"
    samples = "samples={prompts: [a square], frames: 5, width: 32, height: 32, steps: 1, every: 0}"
    trainer = start("train", str(run_yaml), "schedule.steps=3000", "save.every=0", "validation.every=5000", samples)

    def told(*words: str) -> str:
        assert main(["ctl", str(run), *words]) == 0
        return capsys.readouterr().out

    def steps() -> int:
        return max(read_steps(log), default=0)

    while not (log.is_file() and steps() >= 2) and trainer.poll() is None:
        time.sleep(0.1)
    assert "pause at step" in told("pause")
    paused = steps()
    assert f"paused, step {paused} of 3000" in told_when_beaten(run, capsys)
    assert f"save at step {paused}: the checkpoint is whole." in told("save")
    assert (run / "checkpoints" / f"global_step_{paused}" / "manifest.json").is_file()
    assert "validate at step" in told("validate") and "sample at step" in told("sample")
    assert (run / "samples" / f"step_{paused:06d}" / "00.mp4").is_file()
    assert "default: 0.001 -> 0.0005" in told("rate", "5e-4")
    assert json.loads((run / "training_gpu0.json").read_text())["activity"] == "paused"
    assert main(["ctl", str(run), "pause"]) == 2
    assert "'pause' was refused" in capsys.readouterr().err
    assert steps() == paused
    assert f"resume at step {paused}: after" in told("resume")
    while steps() <= paused and trainer.poll() is None:
        time.sleep(0.1)
    assert "it saves and ends" in told("stop")
    said, _ = trainer.communicate(timeout=60)
    assert trainer.returncode == 128 + signal.SIGTERM, said
    end = [event for event in read_events(log) if event["event"] == "run_ended"][-1]
    assert end["outcome"] == "stopped"
    assert (run / "checkpoints" / f"global_step_{end['step']}").is_dir()
    assert main(["ctl", str(run), "save"]) == 2
    assert "nobody trains here now" in capsys.readouterr().err


def told_when_beaten(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `weft ctl RUN` says once a beat has come since the pause."""
    heartbeat = run / "heartbeat.rank0.json"
    while json.loads(heartbeat.read_text())["phase"] != "paused":
        time.sleep(0.1)
    assert main(["ctl", str(run)]) == 0
    return capsys.readouterr().out
