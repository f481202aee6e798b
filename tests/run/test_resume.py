"""A run that is killed and resumed is, bit for bit, the run that was not."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import config_of, plain_config
from weft.errors import RunError
from weft.run.checkpoint import read_checkpoint, whole_state
from weft.run.checkpoint_folders import list_checkpoints
from weft.run.config import RunConfig
from weft.run.listeners import read_steps
from weft.run.start import train_run

STEPS = 9
EXACT = {
    "schedule": {"steps": STEPS, "accumulate": 2, "curve": "cosine", "warmup": 2},
    "save": {"every": 1, "keep": 3},
    "adapter": {"input_dropout": 0.1, "rank_dropout": 0.1},
    "ema": {"decay": 0.8},
    "data": {"caption_dropout": 0.3},
    "validation": {"every": 0},
}


def silent(event: object) -> None:
    """Nobody listens."""


def flat(tree: Any, place: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint's tree under its path."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{place}/{key}").items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in flat(value, f"{place}/{i}").items()}
    return {place: tree}


def assert_same_run(one: Path, other: Path) -> None:
    """Same final state (adapters, optimizer, averages, chance, position), same losses, same data order."""
    first, second = (flat(whole_state(read_checkpoint(list_checkpoints(run)[-1]))) for run in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name
    steps, again = (read_steps(run / "events.rank0.jsonl") for run in (one, other))
    assert steps.keys() == again.keys() == set(range(1, STEPS + 1))
    for step, record in steps.items():
        assert record["metrics"] == again[step]["metrics"], step
        assert record["keys"] == again[step]["keys"], step
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert tensor_bytes(one / "adapter" / name) == tensor_bytes(other / "adapter" / name), name


def tensor_bytes(path: Path) -> bytes:
    """A safetensors file without its header, in which the run's folder is named."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def train_in_child(config: RunConfig, kill_after: float | None) -> bool:
    """Train in a forked process; True when it ended by itself, False when it was killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            train_run(config, silent)
            os._exit(0)
        except BaseException as failed:
            print(repr(failed), flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, float]:
    """The run that nothing happened to, and its seconds."""
    root = tmp_path_factory.mktemp("unbroken")
    plain = plain_config(root, world / "model", world / "clips")
    plain["data"]["cache_folder"] = str(world / "cache")
    config = config_of(plain, **EXACT)
    train_run(config, silent)  # warms the cache
    again = config_of(plain, **EXACT, name="again")
    began = time.monotonic()
    train_run(again, silent)
    assert_same_run(config.folder, again.folder)
    return config, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(4))
def test_random_kills_change_no_bit(unbroken, plain, attempt):
    """Killed after a random time again and again, within steps, within saves, within the start; a checkpoint is
    written at every step, so many kills fall into one."""
    whole, seconds = unbroken
    chance = random.Random(attempt)
    config = config_of(plain, **EXACT)
    kills = 0
    while not train_in_child(config, chance.uniform(0.05, 1.0) * seconds if kills < 6 else None):
        kills += 1
    assert_same_run(whole.folder, config.folder)


class Killed(BaseException):
    """Stands for the kill at an exact place."""


@pytest.mark.parametrize("step", [1, 4, STEPS - 1])
def test_a_kill_right_after_a_step_changes_no_bit(unbroken, plain, step):
    from weft.events import StepEnded

    def kill(event: object) -> None:
        if isinstance(event, StepEnded) and event.step == step:
            raise Killed

    config = config_of(plain, **EXACT)
    with pytest.raises(Killed):
        train_run(config, kill)
    train_run(config, silent)
    assert_same_run(unbroken[0].folder, config.folder)


def test_a_stopped_run_saves_and_goes_on_exactly(unbroken, plain):
    config = config_of(plain, **EXACT, name="stopped")
    seen: list[int] = []

    def stop() -> bool:
        seen.append(1)
        return len(seen) > 5

    result = train_run(config, silent, stop)
    assert (result.finished, result.step) == (False, 5)
    assert train_run(config, silent).finished
    assert_same_run(unbroken[0].folder, config.folder)


@pytest.fixture(scope="module")
def short(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished short run."""
    plain = plain_config(tmp_path_factory.mktemp("short"), world / "model", world / "clips")
    plain["data"]["cache_folder"] = str(world / "cache")
    config = config_of(plain)
    train_run(config, silent)
    return config.folder


@pytest.fixture
def started(short, plain) -> RunConfig:
    """A finished short run of the test's own."""
    config = config_of(plain)
    shutil.copytree(short, config.folder)
    return config


def test_a_wrong_path_lists_what_is_there(started, plain):
    with pytest.raises(RunError, match=r"global_step_5.*holds: global_step_4, global_step_6"):
        train_run(config_of(plain, resume="global_step_5"), silent)


def test_a_changed_config_is_refused_with_its_differences(started, plain):
    with pytest.raises(RunError, match=r"optimizer\.lr: 0\.001 -> 0\.002") as refused:
        train_run(config_of(plain, optimizer={"lr": 2e-3}, data={"batch_size": 1}), silent)
    assert "data.batch_size: 2 -> 1" in str(refused.value)
    assert "resume_allow=[data.batch_size,inputs.items_per_step,optimizer.lr]" in str(refused.value)


def test_a_change_that_no_state_fits_is_not_offered(started, plain):
    with pytest.raises(RunError, match=r"adapter\.rank: 4 -> 8") as refused:
        train_run(config_of(plain, adapter={"rank": 8}), silent)
    assert "resume_allow" not in str(refused.value)


def test_other_clips_or_another_model_are_a_change_too(started, plain, tmp_path):
    from tests.small import make_clips, make_wan

    make_clips(tmp_path / "clips")
    for number in (0, 1):  # one of the two may be held out
        (tmp_path / "clips" / f"{number}.txt").write_text("another caption")
    with pytest.raises(RunError, match=r"inputs\.data"):
        others = {"sources": [{"path": str(tmp_path / "clips")}]}
        train_run(config_of(plain, data=others, resume_allow=["data"]), silent)
    make_wan(tmp_path / "model", layers=1)
    with pytest.raises(RunError, match=r"inputs\.network"):
        train_run(config_of(plain, family={"source": str(tmp_path / "model")}, resume_allow=["family"]), silent)


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(plain):
    train_run(config_of(plain, save={"every": 1, "keep": 6}), silent)
    again = config_of(plain, save={"every": 1, "keep": 2}, resume="global_step_2")
    train_run(again, silent, stop_after(1))
    folder = again.folder / "checkpoints"
    assert [p.name for p in list_checkpoints(again.folder)] == ["global_step_2", "global_step_3"]
    assert {p.name for p in folder.glob("set_aside_*")} == {f"set_aside_global_step_{n}" for n in (3, 4, 5, 6)}


def test_a_change_may_be_allowed_by_name(plain):
    train_run(config_of(plain), silent, stop_after(2))
    changed = config_of(plain, optimizer={"lr": 2e-3}, resume_allow=["optimizer.lr"])
    assert train_run(changed, silent).finished
    rates = [record["metrics"]["default/lr"] for record in read_steps(changed.folder / "events.rank0.jsonl").values()]
    assert rates[1] <= 1e-3 < rates[2]


def stop_after(steps: int) -> Any:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > steps

    return stop


def test_how_often_to_save_may_change_without_being_asked(plain):
    train_run(config_of(plain), silent, stop_after(3))
    assert train_run(config_of(plain, save={"every": 1}), silent).finished


@pytest.mark.parametrize("name", ["tensors/*", "state.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(started, plain, name):
    newest = list_checkpoints(started.folder)[-1]
    (damaged,) = newest.glob(name)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    (started.folder / "adapter" / "adapter_config.json").unlink()
    before = read_steps(started.folder / "events.rank0.jsonl")
    assert train_run(started, silent).finished
    after = read_steps(started.folder / "events.rank0.jsonl")
    assert {s: r["metrics"] for s, r in before.items()} == {s: r["metrics"] for s, r in after.items()}


def test_when_every_checkpoint_is_damaged_the_run_says_so_and_does_not_start_over(started):
    for folder in list_checkpoints(started.folder):
        (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match="no whole checkpoint"):
        train_run(started, silent)


def test_latest_without_a_checkpoint_is_an_error_and_auto_is_a_new_run(plain):
    with pytest.raises(RunError, match="no whole checkpoint"):
        train_run(config_of(plain, resume="latest"), silent)
    assert train_run(config_of(plain, resume="auto"), silent).finished


def test_never_refuses_a_folder_with_checkpoints(started, plain):
    with pytest.raises(RunError, match="resume: never"):
        train_run(config_of(plain, resume="never"), silent)


def test_only_the_newest_checkpoints_are_kept(started):
    assert [p.name for p in list_checkpoints(started.folder)] == ["global_step_4", "global_step_6"]


def test_a_second_process_may_not_train_in_the_same_folder(plain):
    config = config_of(plain)
    child = os.fork()
    if child == 0:
        from weft.run.folder import claim

        config.folder.mkdir(parents=True)
        claim(config.folder)
        time.sleep(60)
        os._exit(0)
    try:
        for _ in range(100):
            if (config.folder / "process.rank0.json").is_file():
                break
            time.sleep(0.05)
        with pytest.raises(RunError, match=f"process {child} trains in this run folder"):
            train_run(config, silent)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert train_run(config, silent).finished
