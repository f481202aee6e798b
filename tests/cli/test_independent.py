"""`weft train --independent`: one process for each GPU, or for each of N on the processor."""

import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.program import Program
from weft.cli.independent import Children, Task, refuse_contradictions, shares_of
from weft.engines.visible import PROCESS_NUMBER
from weft.errors import ConfigError
from weft.run.config import load_config
from weft.run.folder import born
from weft.run.listeners import read_events, read_steps

IN_MEMORY = "data.cache=memory"  # with one on disk another process would be started first, to fill it


def events_of(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run / "events.rank0.jsonl") if event["event"] == kind]


def wait_for_steps(runs: list[Path], step: int, process: Program) -> None:
    logs = [run / "events.rank0.jsonl" for run in runs]
    for _ in range(1200):
        if all(log.is_file() and len(read_steps(log)) >= step for log in logs) or process.poll() is not None:
            return
        time.sleep(0.1)


# ---- Shares --------------------------------------------------------------------------------------------------------


def test_each_process_has_its_own_name_share_and_number_and_the_rest_in_common(run_yaml):
    shares, _ = shares_of(load_config(run_yaml, ["engine.device=cpu"]), 3)
    assert [share.run.name for share in shares] == ["run_gpu0", "run_gpu1", "run_gpu2"]
    assert [share.assignments[1] for share in shares] == ["data.share=[0,3]", "data.share=[1,3]", "data.share=[2,3]"]
    assert [share.environment[PROCESS_NUMBER] for share in shares] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engine.device=cuda:1", "'cuda:1' is one GPU"),
        ("engine.device=mps", "'mps' is one GPU"),
        ("resume=global_step_2", "one run's checkpoint"),
        ("data.share=[0,2]", "--independent gives each process its own share"),
    ],
)
def test_what_cannot_hold_for_several_processes_is_refused(run_yaml, override, told):
    with pytest.raises(ConfigError, match=told):
        refuse_contradictions(load_config(run_yaml, [override]))


def test_without_a_gpu_the_number_of_processes_must_be_told(run_yaml):
    with pytest.raises(ConfigError, match=r"engine\.device is cpu.*--processes 2"):
        shares_of(load_config(run_yaml), None)
    with pytest.raises(ConfigError, match="--processes: 0 is none"):
        shares_of(load_config(run_yaml), 0)


# ---- Processes -----------------------------------------------------------------------------------------------------


def shell(script: str, label: str = "x") -> Task:
    return Task(label, ["sh", "-c", script], dict(os.environ))


def test_lines_come_out_whole_under_their_labels(capsys):
    assert Children().run([shell("echo one; echo two >&2", "gpu 0"), shell("printf three", "gpu 1")]) == [0, 0]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "gpu 0" in line] == ["[gpu 0] one", "[gpu 0] two"]
    assert "[gpu 1] three" in said


def test_the_first_failure_is_the_exit_code_and_a_killing_signal_is_counted_as_a_shell_does():
    children = Children()
    codes = children.run([shell("exit 0"), shell("exit 3"), shell("kill -9 $$")])
    assert codes == [0, 3, 137] and children.exit_code(codes) == 3
    assert children.exit_code([0, 0]) == 0


def test_nothing_is_started_after_a_signal():
    children = Children(heard=signal.SIGTERM)
    assert children.run([shell("exit 0")]) == [143]


def test_children_are_read_to_their_end_when_the_terminal_is_gone(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    much = shell("i=0; while [ $i -lt 9000 ]; do echo a line that fills the pipe at some time; i=$((i+1)); done")
    assert Children().run([much, shell("exit 3")]) == [0, 3]


@pytest.mark.slow
def test_two_processes_train_two_adapters_on_two_halves_and_tell_how_to_merge_them(run_yaml, tmp_path, start):
    process = start("train", "--independent", "--processes", "2", str(run_yaml))
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.startswith("2 independent runs, not data-parallel training")
    runs = [tmp_path / "runs" / f"run_gpu{i}" for i in (0, 1)]
    assert all((run / "adapter" / "adapter_model.safetensors").is_file() for run in runs)
    first, second = ({key for step in events_of(run, "step") for key in step["keys"]} for run in runs)
    assert first and second and not first & second
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    for config in configs:
        del config["name"], config["data"]["share"]
    assert configs[0] == configs[1]
    assert [json.loads((run / f"training_gpu{i}.json").read_text())["gpu"]["number"] for i, run in enumerate(runs)] == [
        0, 1,
    ]  # fmt: skip
    # Encoded once, by the parent's first child: the runs themselves had nothing to encode.
    assert "[cache] cache: " in said and not any(e["phase"] == "caching" for r in runs for e in events_of(r, "phase"))
    assert f"weft merge --average {runs[0]}/adapter {runs[1]}/adapter --out {tmp_path}/runs/run_average" in said


@pytest.mark.slow
def test_ctrl_c_reaches_each_process_once_all_save_and_the_same_command_goes_on(
    run_yaml, tmp_path, start, quick_python
):
    runs = [tmp_path / "runs" / f"run_gpu{i}" for i in (0, 1)]
    command = ("train", "--independent", "--processes", "2", str(run_yaml), "schedule.steps=2000", "save.every=0",
               IN_MEMORY)  # fmt: skip
    process = start(*command, PYTHON_EXEC=quick_python)
    wait_for_steps(runs, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130, said
    assert "To go on, run the same command again:\n  weft train --independent" in said
    ends = [events_of(run, "run_ended")[-1] for run in runs]
    assert [end["outcome"] for end in ends] == ["stopped", "stopped"]
    assert all((run / "checkpoints" / f"global_step_{e['step']}").is_dir() for run, e in zip(runs, ends, strict=True))
    again = start(*command, PYTHON_EXEC=quick_python)
    wait_for_steps(runs, max(end["step"] for end in ends) + 1, again)
    again.send_signal(signal.SIGTERM)
    said, _ = again.communicate(timeout=100)
    assert again.returncode == 143, said
    assert [events_of(run, "run_started")[-1]["step"] for run in runs] == [end["step"] for end in ends]


@pytest.mark.slow
def test_one_that_fails_is_told_while_the_other_finishes(run_yaml, tmp_path, start, quick_python):
    taken = tmp_path / "runs" / "run_gpu1"
    taken.mkdir(parents=True)
    living = {"pid": os.getpid(), "born": born(os.getpid()), "host": platform.node(), "started": 0}
    (taken / "process.rank0.json").write_text(json.dumps(living))
    process = start("train", "--independent", "--processes", "2", str(run_yaml), IN_MEMORY, PYTHON_EXEC=quick_python)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2, said
    assert f"[gpu 1] error: {taken}: process {os.getpid()} trains in this run folder" in said
    assert f"[gpu 1] FAILED with exit code 2: {taken}" in said
    assert "[gpu 0] finished: " in said and "weft merge" not in said
