"""`weft train` as a process of its own: stopped, killed, resumed, and asked for nonsense."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.program import Program
from tests.small import merged
from weft.run.listeners import read_events, read_steps

STEPS = 400  # more than a process makes before it is stopped


def start(*arguments: str) -> Program:
    return Program(arguments)


def wait_for_step(run: Path, step: int, process: Program) -> None:
    """Until the log tells a step, or the process ended, or two minutes are over."""
    wait_until(lambda log: len(read_steps(log)) >= step, run, process)


def wait_for_checkpoint(run: Path, process: Program) -> None:
    """Until the log tells that a checkpoint is whole: it is written while training goes on."""
    wait_until(lambda log: any(event["event"] == "saved" for event in read_events(log)), run, process)


def wait_until(seen: Callable[[Path], bool], run: Path, process: Program) -> None:
    log = run / "events.rank0.jsonl"
    for _ in range(1200):
        if (log.is_file() and seen(log)) or process.poll() is not None:
            return
        time.sleep(0.1)


@pytest.fixture
def config(plain: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    change = {"schedule": {"steps": STEPS}, "validation": {"every": 0}, "save": {"every": 5, "keep": 2}}
    path.write_text(yaml.safe_dump(merged(plain, change)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(config, tmp_path, number, code):
    process = start("train", str(config))
    wait_for_step(tmp_path / "runs" / "run", 3, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    steps = read_steps(tmp_path / "runs" / "run" / "events.rank0.jsonl")
    assert process.returncode == code, said
    assert f"saved at step {max(steps)}. To go on, run the same command again:\n  weft train {config}" in said
    saved = sorted((tmp_path / "runs" / "run" / "checkpoints").glob("global_step_*"), key=lambda p: p.stat().st_mtime)
    assert saved[-1].name == f"global_step_{max(steps)}"
    end = json.loads((tmp_path / "runs" / "run" / "events.rank0.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["outcome"]) == ("run_ended", "stopped")


@pytest.mark.slow
def test_a_killed_command_goes_on_from_its_newest_checkpoint(config, tmp_path):
    run = tmp_path / "runs" / "run"
    process = start("train", str(config))
    wait_for_checkpoint(run, process)
    process.kill()
    process.communicate()
    done = max(read_steps(run / "events.rank0.jsonl"))
    again = start("train", str(config), f"schedule.steps={STEPS}")
    wait_for_step(run, done + 2, again)
    again.send_signal(signal.SIGINT)
    said, _ = again.communicate(timeout=60)
    assert "resumed from" in said
    starts = [json.loads(line) for line in (run / "events.rank0.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in starts if event["event"] == "run_started"]
    assert resumed[0] == 0 and 5 <= resumed[1] <= done


def test_every_fault_of_a_config_is_told_at_once_without_torch(config):
    config.write_text(config.read_text().replace("rank: 4", "rnak: 4").replace("lr: 0.001", "lr: much"))
    began = time.monotonic()
    command = [sys.executable, "-c", "from weft.cli.main import main; raise SystemExit(main())"]
    ended = subprocess.run(
        [*command, "train", str(config), "shedule.steps=5"], capture_output=True, text=True, timeout=60, check=False
    )
    said = ended.stderr
    assert ended.returncode == 2
    assert "adapter.rnak: unknown key. Did you mean 'rank'?" in said
    assert "optimizer.lr: expected a number above 0, got 'much'" in said
    assert "(command line): shedule" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 20  # on loaded cores; torch alone would take longer than the rest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"family": {"source": "no-such-model"}}, "there is no folder or file 'no-such-model'"),
        ({"data": {"sources": [{"path": "no-such-clips"}]}}, "no-such-clips"),
        ({"adapter": {"targets": ["to_qq"]}}, "'to_qq' matches no linear layer"),
        ({"data": {"buckets": {"frames": [10]}}}, "10 frames"),
        ({"samples": {"prompts": ["x"], "frames": 10, "width": 60, "height": 64}}, "samples.width: 60"),
    ],
)
def test_what_a_plan_can_know_is_refused_before_weights_are_read(plain, change, told):
    from tests.small import config_of
    from weft.errors import WeftError
    from weft.run.checks import check

    with pytest.raises(WeftError, match=told):
        check(config_of(plain, **change))
