"""`weft train --detach` and `weft stop`: a run in the background, and its end."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.cli.main import main
from weft.cli.stop import trainer_of
from weft.errors import RunError
from weft.run.folder import born
from weft.run.listeners import read_events, read_steps


@pytest.fixture
def other_program():
    """A program that is none of ours, and must be left alone."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def write_claim(folder: Path, **facts: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    own = {"pid": os.getpid(), "born": born(os.getpid()), "host": platform.node(), "started": time.time()}
    (folder / "process.rank0.json").write_text(json.dumps({**own, **facts}))
    return folder


def test_a_folder_where_nothing_trains_is_told_with_the_nearest(tmp_path):
    (tmp_path / "first-run").mkdir()
    with pytest.raises(RunError, match=r"nothing trains here\.$"):
        trainer_of(tmp_path / "first-run")
    with pytest.raises(RunError, match=r"no such folder\. Did you mean 'first-run'"):
        trainer_of(tmp_path / "frist-run")


def test_a_number_that_another_program_has_now_is_not_signalled(tmp_path, other_program, capsys):
    folder = write_claim(tmp_path / "run", pid=other_program.pid, born="1")
    assert main(["stop", str(folder)]) == 2
    assert "may be another program's by now, so nothing was stopped" in capsys.readouterr().err
    assert other_program.poll() is None


def test_a_killed_run_and_one_on_another_machine_are_told_apart(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(RunError, match="ended without signing off"):
        trainer_of(write_claim(tmp_path / "killed", pid=ended.pid, born=None))
    with pytest.raises(RunError, match=r"on elsewhere\. Run weft stop there"):
        trainer_of(write_claim(tmp_path / "far", host="elsewhere"))


def test_a_process_that_nobody_has_waited_for_counts_as_ended(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = write_claim(tmp_path / "run", pid=child.pid, born=born(child.pid))
    assert trainer_of(folder).works()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie from here on
    with pytest.raises(RunError, match="ended without signing off"):
        trainer_of(folder)
    child.wait()


def test_a_slow_one_is_signalled_once_however_often_it_is_asked(tmp_path, capsys):
    counts = (
        "import signal, time\nheard = []\nsignal.signal(15, lambda *_: print('heard', flush=True))\n"
        "print('ready', flush=True)\nend = time.time() + 60\nwhile time.time() < end: time.sleep(0.1)"
    )
    child = subprocess.Popen([sys.executable, "-c", counts], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    folder = write_claim(tmp_path / "run", pid=child.pid, born=born(child.pid))
    assert main(["stop", str(folder), "--timeout", "0.5"]) == 2
    assert "has not ended yet" in capsys.readouterr().err
    assert main(["stop", str(folder), "--timeout", "0.5"]) == 2
    assert "was asked before" in capsys.readouterr().out
    child.kill()
    assert child.communicate()[0] == "heard\n"


def test_of_several_runs_those_that_still_train_are_stopped(tmp_path, capsys):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    living = write_claim(tmp_path / "run_gpu1", pid=child.pid, born=born(child.pid))
    (tmp_path / "run_gpu0").mkdir()
    assert main(["stop", str(tmp_path / "run_gpu0"), str(living)]) == 0
    assert "run_gpu0: nothing trains here" in capsys.readouterr().err
    assert child.wait() == -signal.SIGTERM


@pytest.mark.slow
def test_a_run_in_the_background_is_followed_stopped_and_goes_on(run_yaml, tmp_path, capsys):
    run = tmp_path / "runs" / "run"
    command = ["train", "--detach", str(run_yaml), "schedule.steps=3000", "save.every=0"]
    assert main(command) == 0
    said = capsys.readouterr().out
    pid = int(re.findall(r"process (\d+) trains in the background", said)[0])
    assert f"follow: tail -F {run}/train.log" in said and f"stop:   weft stop {run}" in said
    assert os.getsid(pid) == pid  # a closed terminal does not reach it
    assert main(command) == 2
    assert f"process {pid} trains here" in capsys.readouterr().err
    log = run / "events.rank0.jsonl"
    while not (log.is_file() and len(read_steps(log)) >= 2):
        time.sleep(0.1)
    assert main(["stop", str(run), "--timeout", "60"]) == 0
    step = [event for event in read_events(log) if event["event"] == "run_ended"][-1]["step"]
    assert f"stopped and saved at step {step}." in capsys.readouterr().out
    assert (run / "checkpoints" / f"global_step_{step}").is_dir()
    assert "training run: step 0 of 3000" in (run / "train.log").read_text()
    assert os.waitpid(pid, 0)[1] >> 8 == 128 + signal.SIGTERM
    assert main(["stop", str(run)]) == 2
    assert "nothing trains here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_refusal_in_the_background_is_shown_in_front(run_yaml, capsys, monkeypatch, quick_python):
    monkeypatch.setattr(sys, "executable", quick_python)
    assert main(["train", "--detach", str(run_yaml), "resume=latest"]) == 2
    assert "has no whole checkpoint" in capsys.readouterr().err
