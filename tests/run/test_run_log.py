"""run.rank{N}.log: what a run says, and the last words of a process that ends badly."""

import faulthandler
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.small import config_of
from weft.errors import DataError
from weft.events import Event, Incident, Notice, PhaseStarted, RunEnded, RunStarted, Sampled
from weft.run.run_log import RunLog, levelled
from weft.run.start import open_run, train_run

STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (info|warn|bad ) (.+)")


def silent(event: Event) -> None: ...


def said(run: Path, rank: int = 0) -> list[tuple[str, str]]:
    """Level and text of each line; a line without a time has the level ''."""
    lines = (run / f"run.rank{rank}.log").read_text().splitlines()
    found = [STAMPED.fullmatch(line) for line in lines]
    return [(m[1].strip(), m[2]) if m else ("", line) for m, line in zip(found, lines, strict=True)]


def test_a_run_says_its_phases_and_what_came_of_them_but_no_step_and_no_item(plain: dict[str, Any]):
    change = {"schedule": {"steps": 1, "warmup": 0}, "save": {"every": 0}, "validation": {"every": 1}}
    run = train_run(config_of(plain, **change), silent).folder
    texts = [text for level, text in said(run) if level == "info"]
    beginnings = [
        "training run: step 0 of 1", "validating", "step 0: validation loss", "training, 1 to do", "validating",
        "step 1: validation loss", "saving", "step 1: saved", "adapter: ", "finished at step 1",
    ]  # fmt: skip
    after = iter(texts)
    assert all(any(text.startswith(beginning) for text in after) for beginning in beginnings), texts
    log = (run / "run.rank0.log").read_text()
    assert "train/loss" not in log and ".mp4" not in log and "a square" not in log


def test_of_a_sample_the_file_is_named_and_not_what_was_asked(tmp_path: Path):
    with closing(RunLog(tmp_path)) as log:
        log(Sampled(step=3, prompt="a violet ring", seed=0, file="samples/step_000003/00.mp4", adapter=True))
    assert said(tmp_path) == [("info", "step 3: sample samples/step_000003/00.mp4")]


def test_what_nobody_foresaw_leaves_its_trace_without_the_values_of_variables(plain: dict[str, Any]):
    config = config_of(plain)
    with pytest.raises(ZeroDivisionError), open_run(config, config.engine.open(), silent, ""):
        secret = "a caption " + "of somebody"
        assert secret
        print(1 / 0)
    log = said(config.folder)
    assert log[0] == ("bad", "Traceback (most recent call last):") and "in open_run" in log[1][1]
    assert ("", "  ZeroDivisionError: division by zero") in log
    assert log[-1] == ("bad", "failed at step 0: ZeroDivisionError: division by zero")
    assert "caption of somebody" not in (config.folder / "run.rank0.log").read_text()


def test_what_the_user_can_mend_is_one_line(plain: dict[str, Any]):
    config = config_of(plain)
    with pytest.raises(DataError), open_run(config, config.engine.open(), silent, ""):
        raise DataError("clips: there are none.")
    assert said(config.folder) == [("bad", "failed at step 0: DataError: clips: there are none.")]


def test_another_rank_says_only_what_concerns_itself(tmp_path: Path):
    with closing(RunLog(tmp_path, rank=3)) as log:
        log(PhaseStarted(phase="starting"))
        log(Notice(text="a checkpoint was passed over"))
        log(RunStarted(name="run", step=0, total_steps=9, resumed_from=None, trainable=1, device="cuda:3", rank=3))
        log(Incident(step=2, phase="train", reason="the gradient is not finite", folder=None, in_a_row=1))
        log(RunEnded(step=2, outcome="failed", reason="RunError: too many"))
    assert [level for level, _ in said(tmp_path, 3)] == ["info", "warn", "bad"]


def crashing(run: Path, then: str, before: str = "") -> subprocess.CompletedProcess[bytes]:
    """A process that opens the log, and then does something."""
    code = f"import os, sys, signal\nfrom pathlib import Path\nfrom weft.run.run_log import RunLog\n{before}\n"
    code += f"log = RunLog(Path(sys.argv[1]))\n{then}\n"
    return subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, check=False)


@pytest.mark.parametrize(("number", "words"), [(signal.SIGSEGV, "Segmentation fault"), (signal.SIGABRT, "Aborted")])
def test_a_crash_of_c_code_is_the_last_word_of_the_log(tmp_path: Path, number: int, words: str):
    ended = crashing(tmp_path, f"os.kill(os.getpid(), {int(number)})")
    assert ended.returncode == -number
    log = (tmp_path / "run.rank0.log").read_text()
    assert log.startswith(f"Fatal Python error: {words}\n") and "line 6 in <module>" in log
    assert {level for _, level in levelled(log.splitlines())} == {"bad"}


def test_sigusr1_writes_what_all_threads_are_at_and_the_run_goes_on(tmp_path: Path):
    then = "os.kill(os.getpid(), signal.SIGUSR1); print('goes on'); log.close(); os.kill(os.getpid(), signal.SIGUSR1)"
    ended = crashing(tmp_path, then)
    log = (tmp_path / "run.rank0.log").read_text()
    assert log.count("(most recent call first):") == 1 and "line 6 in <module>" in log
    assert ended.returncode == -signal.SIGUSR1  # once the log is closed the signal is what it was


def test_a_signal_that_somebody_else_wants_stays_theirs(tmp_path: Path):
    before = "signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))"
    ended = crashing(tmp_path, "os.kill(os.getpid(), signal.SIGUSR1); log.close()", before)
    assert ended.stdout == b"heard\n" and not (tmp_path / "run.rank0.log").read_text()


def test_a_crash_handler_that_was_there_before_is_left_alone(tmp_path: Path):
    was = faulthandler.is_enabled()
    with (tmp_path / "own").open("w") as own:
        if not was:
            faulthandler.enable(own)
        RunLog(tmp_path).close()
        assert faulthandler.is_enabled()
        if not was:
            faulthandler.disable()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told_once_and_not_again_when_the_log_is_closed(tmp_path: Path):
    os.symlink("/dev/full", tmp_path / "run.rank0.log")
    log = RunLog(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        log(PhaseStarted(phase="starting"))
    log.close()


def test_lines_without_a_time_have_the_level_of_the_line_above():
    lines = [
        "2026-11-21 15:27:32 info  starting", "2026-11-21 15:27:33 bad  Traceback (most recent call last):",
        '    File "x.py", line 3', "2026-11-21 15:27:34 warn step 3: the gradient is not finite",
        "Fatal Python error: Bus error", "Thread 0x1 (most recent call first):",
    ]  # fmt: skip
    assert [level for _, level in levelled(lines)] == ["info", "bad", "bad", "warn", "bad", "bad"]
