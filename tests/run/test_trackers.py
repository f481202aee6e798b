"""Trackers hear what the run's own log hears: read back with each program's own reader."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.multi import spawn
from weft import events
from weft.errors import ConfigError
from weft.events import Event, Notice
from weft.run.config import Tracking
from weft.run.trackers import Told, check_trackers, known_as, measured, trackers

STEPS = [
    events.RunStarted(name="r", step=0, total_steps=3, resumed_from=None, trainable=1, device="cpu"),
    *(
        events.StepEnded(step=step, experience="clips", metrics={"train/loss": 1 / step, "default/lr": 1e-4},
                         seconds={"total": 0.5})
        for step in (1, 2, 3)
    ),
    events.Evaluated(step=3, loss=0.25, baseline=0.5, by_time={"0.5": 0.25}, baseline_by_time={"0.5": 0.5}, items=2,
                     failed=0),
    events.RunEnded(step=3, outcome="finished"),
]  # fmt: skip


def told(plain, tmp_path: Path, to: str, heard: list[Event], run: list[Event] = STEPS, **track) -> Path:
    from tests.small import config_of

    config = config_of({**plain, "output": str(tmp_path), "track": {"to": [to], **track}})
    config.folder.mkdir(parents=True, exist_ok=True)
    for listener in trackers(config, heard.append):
        for event in run:
            listener(event)
    return config.folder


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {each.step: each.value for each in found.Scalars(name)}


def test_tensorboard_has_every_number_of_the_run(plain, tmp_path) -> None:
    heard: list[Event] = []
    folder = told(plain, tmp_path, "tensorboard", heard)
    assert heard == []
    assert scalars(folder, "train/loss") == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert scalars(folder, "validation/baseline") == {3: 0.5}
    assert scalars(folder, "seconds/total") == {1: 0.5, 2: 0.5, 3: 0.5}


def test_steps_beyond_the_checkpoint_leave_tensorboard_when_a_run_goes_on(plain, tmp_path) -> None:
    folder = told(plain, tmp_path, "tensorboard", [], STEPS[:4])  # killed after step 3, saved after step 1
    again = events.StepEnded(step=2, experience="clips", metrics={"train/loss": 7.0}, seconds={"total": 0.5})
    start = events.RunStarted(name="r", step=1, total_steps=3, resumed_from="x", trainable=1, device="cpu")
    told(plain, tmp_path, "tensorboard", [], [start, again, STEPS[-1]])
    assert scalars(folder, "train/loss") == {1: 1.0, 2: 7.0}


def test_a_wandb_run_without_a_network_is_kept_whole_and_keeps_its_name(plain, tmp_path) -> None:
    heard: list[Event] = []
    folder = told(plain, tmp_path, "wandb", heard, offline=True, project="looms")
    assert heard == []
    name = known_as(folder, "wandb")
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": name}
    (file,) = (folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    deadline = time.monotonic() + 30
    while not any(record.HasField("exit") for record in wandb_records(file)):
        assert time.monotonic() < deadline, "wandb's own process has not written the end of the run"
        time.sleep(0.1)
    records = list(wandb_records(file))
    history = [{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                for item in record.history.item} for record in records if record.HasField("history")]  # fmt: skip
    assert [row["train/loss"] for row in history if "train/loss" in row] == [1.0, 0.5, 1 / 3]
    assert [row["step"] for row in history] == [1, 2, 3, 3]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.project == "looms"
    assert {"family", "adapter"} <= {item.key for item in run.config.update}


def wandb_records(file: Path):
    """The records of a wandb log, which has LevelDB's form: after 7 bytes of head, blocks of 32 KiB in which each piece
    has a checksum (4 bytes), a length (2) and a type (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    data, at, pieces = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def tracked_by_trackio(plain: dict[str, Any], folder: Path) -> list[str]:
    """What a run says beside its numbers."""
    heard: list[Event] = []
    told(plain, folder, "trackio", heard, project="looms")
    return [str(event) for event in heard]


def test_trackio_has_every_number_of_the_run(plain, tmp_path, monkeypatch) -> None:
    # It looks for its folder once, when it is imported: hence a process of its own.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert spawn(1, tracked_by_trackio, plain, tmp_path) == [[]]
    (file,) = (tmp_path / "trackio").rglob("looms.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics order by step, id").fetchall()
    assert [(step, json.loads(text).get("train/loss")) for step, text in rows][:2] == [(1, 1.0), (2, 0.5)]


def test_a_tracker_that_fails_is_left_out_and_the_run_hears_why_once() -> None:
    class Full:
        def begin(self, step: int) -> None: ...
        def log(self, step: int, numbers: object) -> None:
            raise OSError(28, "No space left on device")

        def sample(self, event: events.Sampled) -> None: ...
        def end(self, finished: bool) -> None: ...

    heard: list[Event] = []
    listener = Told("wandb", Full(), heard.append)
    for event in STEPS:
        listener(event)
    (notice,) = heard
    assert isinstance(notice, Notice)
    assert notice.text == "wandb: no more is sent to it, OSError: [Errno 28] No space left on device"


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"track\.to: 'wandb' is not installed\. Run: pip install 'wandb'"):
        check_trackers(Tracking(to=("wandb",)))


def test_what_was_not_measured_is_no_number() -> None:
    nothing = events.Evaluated(step=1, loss=None, baseline=None, by_time={}, baseline_by_time={}, items=0, failed=2)
    assert measured(nothing) == {"validation/failed": 2.0}
