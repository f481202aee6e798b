"""heartbeat.rank{N}.json: who is gone, who is stuck, and who only works on something long."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small import config_of
from weft.events import Event, PhaseStarted, Progress, RunStarted, Sampled, StepEnded
from weft.run import heartbeat
from weft.run.folder import born, is_alive
from weft.run.heartbeat import Heartbeat, read_heartbeats, remove_stale
from weft.run.start import open_run, train_run

QUICK = 0.05  # seconds between two beats


def silent(event: Event) -> None: ...


def beat_when(run: Path, seen: Callable[[dict[str, Any]], bool], rank: int = 0) -> dict[str, Any]:
    """The first beat of which something is true. Fails after half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        beat = read_heartbeats(run).get(rank)
        if beat is not None and seen(beat):
            return beat
        time.sleep(QUICK / 5)
    raise AssertionError(f"no such beat; the last: {read_heartbeats(run)}")


def began(step: int = 0) -> RunStarted:
    return RunStarted(name="run", step=step, total_steps=10, resumed_from=None, trainable=1, device="cpu")


def ended(step: int) -> StepEnded:
    return StepEnded(step=step, experience="clips", metrics={})


def sampled(step: int = 0) -> Sampled:
    return Sampled(step=step, prompt="a ring", seed=0, file="00.mp4", adapter=True)


def test_a_beat_says_who_lives_and_when_its_main_thread_last_moved(tmp_path):
    before = time.time()
    with Heartbeat(tmp_path, rank=3, world=8, every=QUICK) as beat:
        beat(began(step=4))
        beat(PhaseStarted(phase="validating"))
        found = beat_when(tmp_path, lambda beat: beat["phase"] == "validating", rank=3)
        later = beat_when(tmp_path, lambda beat: beat["time"] > found["time"] + 2 * QUICK, rank=3)
    assert (found["format"], found["rank"], found["world"], found["every"]) == (1, 3, 8, QUICK)
    assert (found["pid"], found["born"], found["host"]) == (os.getpid(), born(os.getpid()), platform.node())
    assert (found["phase"], found["total_steps"], found["done"], found["total"]) == ("validating", 10, None, None)
    assert before - 0.01 <= found["progress"] <= found["time"] <= time.time()
    assert later["progress"] == pytest.approx(found["progress"], abs=0.01)
    assert not list(tmp_path.iterdir())  # the end of a run takes it away


def doing(beat: Heartbeat) -> tuple[Any, ...]:
    record = beat.record()
    return record["phase"], record["done"], record["total"]


def test_the_phase_and_its_units_follow_the_events_and_a_micro_batch_is_training_again(tmp_path):
    beat = Heartbeat(tmp_path)
    told: list[tuple[Any, ...]] = []
    for event in (
        PhaseStarted(phase="caching", total=12), Progress(phase="caching", done=3, total=12), began(),
        PhaseStarted(phase="training", total=10), ended(1), PhaseStarted(phase="sampling", total=2), sampled(),
        sampled(), PhaseStarted(phase="saving"),
    ):  # fmt: skip
        beat(event)
        told.append(doing(beat))
    beat.micro_batch()
    assert told == [
        ("caching", 0, 12), ("caching", 3, 12), ("caching", 3, 12), ("training", None, None), ("training", None, None),
        ("sampling", 0, 2), ("sampling", 1, 2), ("sampling", 2, 2), ("saving", None, None),
    ]  # fmt: skip
    assert doing(beat) == ("training", None, None) and beat.record()["step"] == 1
    beat(PhaseStarted(phase="validating"))
    beat(ended(2))
    assert doing(beat)[0] == "training"


def test_no_item_of_the_training_data_is_named(tmp_path):
    beat = Heartbeat(tmp_path)
    beat(Progress(phase="caching", done=3, total=12, note="clips/somebody.mp4"))
    beat.write()
    assert "somebody" not in beat.path.read_text()


def test_the_longest_silence_is_that_of_the_phase_also_when_it_comes_again(tmp_path):
    beat = Heartbeat(tmp_path)
    beat(PhaseStarted(phase="validating"))
    time.sleep(0.2)
    beat.sign()
    beat.micro_batch()
    assert beat.record()["slowest"] < 0.2  # of training
    beat(PhaseStarted(phase="validating"))
    assert 0.2 <= beat.record()["slowest"] < 2


def test_before_anything_is_counted_work_is_a_sign_and_waiting_is_none(tmp_path):
    with Heartbeat(tmp_path, every=QUICK) as beat:
        beat(PhaseStarted(phase="caching", total=5))
        work(0.5)
        assert silence(read_heartbeats(tmp_path)[0]) < 0.3
        time.sleep(0.5)
        assert silence(read_heartbeats(tmp_path)[0]) > 0.3
        beat(Progress(phase="caching", done=1, total=5))
        work(0.5)  # from the first unit on, units alone count
        assert silence(read_heartbeats(tmp_path)[0]) > 0.3


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))


def test_a_beat_that_cannot_be_written_ends_nothing_and_the_next_one_comes(tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    with Heartbeat(run, every=QUICK) as beat:
        beat_when(run, lambda beat: True)
        run.rename(away)  # as a file server that is restarted
        time.sleep(4 * QUICK)
        away.rename(run)
        beat(began(step=7))
        assert beat_when(run, lambda beat: beat["step"] == 7)


def test_half_a_file_and_a_foreign_one_are_no_beats(tmp_path):
    beats = [Heartbeat(tmp_path, rank) for rank in (0, 1, 10)]
    for beat in beats:
        beat.write()
    beats[1].path.write_text(beats[1].path.read_text()[:40])
    for rank, text in ((2, ""), (3, "[]"), (4, '{"pid": 3}'), (5, "\x00\x00")):
        (tmp_path / f"heartbeat.rank{rank}.json").write_text(text)
    assert list(read_heartbeats(tmp_path)) == [0, 10]


def test_the_beats_of_an_earlier_start_go_but_that_of_a_process_that_lives(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    for rank, change in ((0, {}), (1, {"pid": killed.pid}), (2, {"host": "elsewhere"}), (3, {"born": "1"})):
        beat = Heartbeat(tmp_path, rank)
        beat.path.write_text(json.dumps({**beat.record(), **change}))
    (tmp_path / "heartbeat.rank4.json").write_text('{"pid"')
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.rank0.json"]


def test_a_run_beats_from_its_opening_to_its_end_also_when_it_fails(plain, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", QUICK)
    config = config_of(plain)
    (config.folder).mkdir(parents=True)
    (config.folder / "heartbeat.rank5.json").write_text("{}")
    with pytest.raises(ValueError), open_run(config, config.engine.open(), silent, ""):
        assert beat_when(config.folder, lambda beat: True)["phase"] == "starting"
        assert list(read_heartbeats(config.folder)) == [0] and not (config.folder / "heartbeat.rank5.json").exists()
        raise ValueError
    assert not list(config.folder.glob("heartbeat*")) and not list(config.folder.glob("process*"))


def test_each_micro_batch_and_each_question_of_a_validation_is_a_sign(plain, monkeypatch):
    told: list[Event | None] = []  # None: a sign
    own = Heartbeat.sign
    monkeypatch.setattr(Heartbeat, "sign", lambda beat: (told.append(None), own(beat))[1])
    change = {"schedule": {"steps": 1, "warmup": 0, "accumulate": 3}, "validation": {"every": 1}, "save": {"every": 0}}
    train_run(config_of(plain, **change, objective={"validation_times": [0.25, 0.75]}), told.append)
    kinds = [event.kind if event else None for event in told]
    learned = kinds[told.index(PhaseStarted(phase="training", total=1)) : kinds.index("step")]
    # Of a micro-batch its question and its end; the step's own event, and what is told once of the attention.
    assert learned.count(None) == 3 * 2 + 1 + learned.count("notice")
    measured = kinds[told.index(PhaseStarted(phase="validating")) : kinds.index("evaluated")]
    assert measured.count(None) == 2 * 2 + 1  # at two times with the adapter and without it; the event


def test_a_run_that_waits_for_its_data_beats_on_and_a_killed_one_leaves_its_last_beat(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", QUICK)
    clips = Path(shutil.copytree(plain["data"]["sources"][0]["path"], tmp_path / "clips"))
    data = {"sources": [{"path": str(clips)}], "cache_folder": str(tmp_path / "own-cache")}
    config = config_of(plain, data=data)
    child = os.fork()
    if child == 0:
        train_run(config, lambda event: becomes_a_pipe(clips / "3.mp4", event))
        os._exit(1)
    try:
        stuck = beat_when(config.folder, lambda beat: beat["phase"] == "caching" and silence(beat) > 1)
        later = beat_when(config.folder, lambda beat: beat["time"] > stuck["time"] + 0.5)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert later["progress"] == pytest.approx(stuck["progress"], abs=0.01)
    left = read_heartbeats(config.folder)[0]
    claim = json.loads((config.folder / "process.rank0.json").read_text())
    assert (left["pid"], left["born"]) == (child, claim["born"]) and claim["pid"] == child
    assert not is_alive(left["pid"], left["born"])


def becomes_a_pipe(clip: Path, event: Event) -> None:
    """Before the clips are decoded put a pipe in the place of one, to which nobody writes."""
    if isinstance(event, PhaseStarted) and event.phase == "caching":
        clip.unlink()
        os.mkfifo(clip)


def silence(beat: dict[str, Any]) -> float:
    """Seconds from the main thread's last sign to the beat."""
    return beat["time"] - beat["progress"]
