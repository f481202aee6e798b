"""The agent of one host, with small programs in the place of ranks."""

import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from weft.engines.elastic import Ending, Hosts, Workers, run_workers

Launch = Callable[..., Ending]
PROLOGUE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
def ready(): Path(sys.argv[2], f"ready{rank}").touch()
def leave(**facts): Path(os.environ["WEFT_OUTCOME"]).write_text(json.dumps(facts))
"""


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def launch(tmp_path: Path, told: list[str]) -> Launch:
    """Run a script on so many ranks of one host."""

    def launched(script: str, number: int = 2, restarts: int = 0) -> Ending:
        program = tmp_path / "rank.py"
        program.write_text(PROLOGUE + textwrap.dedent(script))
        workers = Workers(
            [sys.executable, str(program), "a $5 word", str(tmp_path)], number, restarts, tmp_path / "logs"
        )
        return run_workers(workers, Hosts("test"), told.append)

    return launched


def ask(folder: Path, *numbers: signal.Signals) -> None:
    """Send this process signals, one after the other, once both ranks are ready for them."""

    def send() -> None:
        while not all((folder / f"ready{rank}").exists() for rank in (0, 1)):
            time.sleep(0.05)
        for number in numbers:
            time.sleep(0.2)
            os.kill(os.getpid(), number)

    Thread(target=send, daemon=True).start()


def test_ranks_are_told_their_places_and_rank_0_speaks_without_a_label(launch, capfd):
    ending = launch("""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
        print(*(os.environ[name] for name in names), sys.argv[1])
        print("quietly", file=sys.stderr) if rank else None
    """)
    assert ending == Ending()
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["0 2 0 127.0.0.1 a $5 word", "[rank 1] 1 2 1 127.0.0.1 a $5 word"]
    assert "[rank 1] quietly" in err


def test_the_rank_that_failed_is_told_apart_from_those_that_lost_it(launch, tmp_path):
    ending = launch("""
        if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        leave(said="connection closed", lost_peer=True)
        sys.exit(1)
    """)
    first, *others = ending.failures
    assert (first.rank, first.code, first.lost_peer) == (1, 137, False) and "SIGKILL" in first.said
    assert all(failure.lost_peer for failure in others)
    assert first.log is None  # it wrote nothing, and empty logs are not kept


def test_the_last_line_of_an_error_is_told_with_the_place_of_the_log(launch, tmp_path):
    ending = launch("""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("Traceback ...\\nValueError: bad shape", file=sys.stderr)
        sys.exit(3) if rank == 1 else time.sleep(20)
    """)
    assert [(failure.rank, failure.code, failure.said) for failure in ending.failures] == [
        (1, 3, "ValueError: bad shape")
    ]
    assert ending.failures[0].log == tmp_path / "logs" / "rank1.stderr.log" and ending.failures[0].log.is_file()


def test_all_begin_again_after_a_failure_but_not_after_a_mistake_of_the_users(launch, told, tmp_path):
    once = f"""
        mark = Path({str(tmp_path)!r}) / "failed"
        if rank == 1 and not mark.exists():
            mark.touch()
            sys.exit(1)
        time.sleep(0.5)
    """
    assert launch(once, restarts=1) == Ending()
    assert len(told) == 1 and told[0].endswith("all begin again from the newest checkpoint.")
    mistaken = launch("leave(said='no such model', problems=['no such model']); sys.exit(2)", restarts=3)
    assert mistaken.failures[0].problems == ("no such model",) and len(told) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_rank_once_and_the_slowest_saves_to_its_end(launch, tmp_path, told, number):
    ask(tmp_path, number)
    ending = launch(f"""
        heard = []
        for name in (signal.SIGINT, signal.SIGTERM): signal.signal(name, lambda number, _: heard.append(int(number)))
        ready()
        while not heard: time.sleep(0.05)
        if rank == 0: time.sleep(1)  # the other one has long ended
        Path({str(tmp_path)!r}, f"saved{{rank}}").write_text(str(heard))
        leave(stopped=True)
    """)
    assert ending == Ending(stopped=True, heard=number)
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [str([int(number)])] * 2
    assert told == ["stopping: this step is finished and saved first. Once more ends at once."]


def test_a_second_ctrl_c_ends_ranks_that_do_not_hear(launch, tmp_path, monkeypatch):
    monkeypatch.setattr("weft.engines.elastic.ENDING", 1)
    ask(tmp_path, signal.SIGINT, signal.SIGINT)
    ending = launch("signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(60)")
    assert ending.stopped and ending.heard == signal.SIGINT


def test_a_sigterm_that_comes_twice_within_moments_is_one(launch, tmp_path):
    ask(tmp_path, signal.SIGTERM, signal.SIGTERM)
    ending = launch("""
        def stop(*_):
            time.sleep(1)
            leave(stopped=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        ready()
        time.sleep(60)
    """)
    assert ending == Ending(stopped=True, heard=signal.SIGTERM)


def test_empty_logs_are_not_left_behind(launch, tmp_path):
    launch("pass")
    left = list((tmp_path / "logs").glob("*")) if (tmp_path / "logs").is_dir() else []
    assert [file for file in left if file.name != "agent.log"] == []
