"""Checkpoints of one process: what is kept, what is refused, and what becomes of writing in the background."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.learners import FixedStream, NoMilestones, batch_of, frozen, learner_of, small_config, trained, weights
from tests.small import make_wan
from weft.errors import ModelError, RunError
from weft.run.checkpoint import CheckpointWriter, read_checkpoint, restore_learner, whole_state
from weft.run.checkpoint_folders import damage, find_checkpoint, list_checkpoints, loss_of, seal_of, step_of
from weft.run.folder import is_disk_full, remove_leftovers
from weft.run.learner import Learner
from weft.run.retention import Retention, due_by_epoch
from weft.run.train import Course, train

aten: Any = torch.ops.aten


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def learner(model: Path, tmp_path: Path) -> Learner:
    """A learner after two steps, with moments and a moving average."""
    config = small_config(tmp_path, model, schedule={"steps": 2}, ema={"decay": 0.5})
    learner = learner_of(config)
    trained(learner, config, [batch_of(2)])
    return learner


def writer_of(run: Path, background: bool = False, **kept: Any) -> CheckpointWriter:
    return CheckpointWriter(run, Retention(**kept), background)


def fresh(model: Path, root: Path, **change: Any) -> Learner:
    return learner_of(small_config(root, model, schedule={"steps": 2}, **({"ema": {"decay": 0.5}} | change)), False)


@pytest.mark.parametrize("background", [False, True])
def test_a_fresh_learner_becomes_the_one_that_was_saved(learner, model, tmp_path, background):
    writer = writer_of(tmp_path / "run", background)
    writer.save(learner, {"seed": 5})
    writer.wait()
    (folder,) = writer.done()
    again = fresh(model, tmp_path)
    saved = read_checkpoint(folder)
    restore_learner(again, saved)
    assert (again.step, again.drawn, saved.step, saved.config) == (2, learner.drawn, 2, {"seed": 5})
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(learner).items())
    assert all(torch.equal(t, again.ema["default"].tensors[name]) for name, t in learner.ema["default"].tensors.items())
    for optimizer, other in zip(learner.optimizers.values(), again.optimizers.values(), strict=True):
        old, new = optimizer.state_dict()["state"], other.state_dict()["state"]
        assert old.keys() == new.keys()
        assert all(torch.equal(value, new[k][name]) for k, entry in old.items() for name, value in entry.items())


def test_what_is_written_in_the_background_is_the_state_at_the_time_of_the_call(learner, tmp_path):
    before = frozen(weights(learner))
    writer = writer_of(tmp_path, background=True)
    writer.save(learner, {})
    learner.hold()
    with torch.no_grad():
        for parameter in weights(learner).values():
            parameter.zero_()
    writer.wait()
    saved = whole_state(read_checkpoint(writer.done()[0]))["adapters"]["default"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_what_belongs_beside_a_checkpoint_is_written_before_it(learner, tmp_path):
    writer = writer_of(tmp_path, background=True)
    seen: list[bool] = []
    writer.save(learner, {}, beside=lambda tensors: seen.append(bool(list_checkpoints(tmp_path))))
    writer.wait()
    assert seen == [False] and len(list_checkpoints(tmp_path)) == 1


def test_a_failure_in_the_background_is_raised_at_the_next_step(learner, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = writer_of(tmp_path, background=True)
    writer.save(learner, {})
    deadline = time.monotonic() + 20
    with pytest.raises(RunError, match="a checkpoint could not be written"):
        while time.monotonic() < deadline:
            writer.done()
    (tmp_path / "checkpoints").unlink()
    writer.save(learner, {})
    writer.wait()
    assert len(writer.done()) == 1


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_known_for_one_and_leaves_no_half_checkpoint(learner, tmp_path, monkeypatch, background):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weft.run.checkpoint.complete", full)
    writer = writer_of(tmp_path, background)
    with pytest.raises(RunError) as failed:
        writer.save(learner, {})
        writer.wait()
    assert is_disk_full(failed.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_another_optimizer_or_adapter_is_refused_before_anything_is_restored(learner, model, tmp_path):
    writer = writer_of(tmp_path / "run")
    writer.save(learner, {})
    saved = read_checkpoint(writer.done()[0])
    with pytest.raises(RunError, match="other optimizers or averages"):
        restore_learner(fresh(model, tmp_path, ema=None), saved)
    with pytest.raises(ModelError, match=r"40 tensors differ, first 'default/.*\(4, 24\) in place of \(2, "):
        restore_learner(fresh(model, tmp_path, adapter={"rank": 2}), saved)
    with pytest.raises(RunError, match="moves other parameters"):
        restore_learner(fresh(model, tmp_path, adapter={"targets": "attention"}), saved)


def test_a_checkpoint_of_the_first_format_is_named_as_such(learner, tmp_path):
    writer = writer_of(tmp_path)
    writer.save(learner, {})
    (folder,) = writer.done()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    manifest["format"] = 1
    (folder / "manifest.json").write_text(json.dumps({**manifest, "seal": seal_of(manifest)}))
    assert "its format is 1, this Weft reads format 2: Weft wrote it before" in (damage(folder) or "")
    with pytest.raises(RunError, match=r"no whole checkpoint.*adapter\.start_from"):
        find_checkpoint(tmp_path, "auto")


@pytest.mark.parametrize("name", ["tensors/*", "state.safetensors"])
def test_a_file_that_is_gone_is_missed(learner, tmp_path, name):
    writer = writer_of(tmp_path)
    writer.save(learner, {})
    (folder,) = writer.done()
    (path,) = folder.glob(name)
    path.unlink()
    assert damage(folder) == f"{path.relative_to(folder)} is missing"


LOSSES = {1: 0.9, 2: 0.4, 3: None, 4: 0.5, 5: 0.4, 6: float("nan"), 7: 0.8}


@pytest.mark.parametrize(
    ("newest", "best", "kept"), [(3, 0, {5, 6, 7}), (1, 1, {2, 7}), (1, 2, {2, 5, 7}), (2, 9, {1, 2, 4, 5, 6, 7})]
)
def test_the_newest_and_the_best_are_kept(newest, best, kept):
    assert LOSSES.keys() - set(Retention(newest, best).surplus(LOSSES)) == kept


@pytest.mark.parametrize("adapters", [False, True])
def test_checkpoints_go_once_the_next_is_whole_and_adapters_when_asked(learner, tmp_path, adapters):
    writer = writer_of(tmp_path, newest=1, best=1, adapters=adapters)
    there: dict[int, list[int]] = {}

    def note(tensors: Any) -> None:
        there[learner.step] = [step_of(folder) for folder in list_checkpoints(tmp_path)]

    for learner.step, loss in ((10, 0.3), (20, 0.5), (30, None)):
        for expert in ("", "_high", "0"):
            (tmp_path / f"global_step_{learner.step}{expert}").mkdir()
        writer.save(learner, {}, loss, beside=note)
    assert there == {10: [], 20: [10], 30: [10, 20]}
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [10, 30]
    assert loss_of(tmp_path / "checkpoints" / "global_step_10") == 0.3
    gone = {"global_step_20", "global_step_20_high"}
    assert {name for name in gone if (tmp_path / name).is_dir()} == (set() if adapters else gone)
    assert (tmp_path / "global_step_200").is_dir()


def test_a_checkpoint_that_is_written_again_takes_the_others_place(learner, tmp_path):
    writer = writer_of(tmp_path)
    writer.save(learner, {"number": 1})
    writer.save(learner, {"number": 2})
    assert [read_checkpoint(folder).config["number"] for folder in list_checkpoints(tmp_path)] == [2]
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["global_step_2"]


def test_what_a_kill_left_of_a_save_is_no_checkpoint(learner, tmp_path):
    writer = writer_of(tmp_path)
    writer.save(learner, {})
    (folder,) = writer.done()
    shutil.copytree(folder, folder.with_name(".tmp-0123abcd-global_step_4"))
    assert find_checkpoint(tmp_path, "auto") == (folder, [])
    remove_leftovers(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == ["global_step_2"]


def test_saves_by_passes_over_the_data_come_at_every_multiple_and_once():
    """30 draws of an epoch and a save at each tenth of it: at 3, 6, 9, ... draws, whatever the draws of a step."""
    assert [n for n in range(1, 31) if due_by_epoch(n - 1, n, 30, 0.1)] == list(range(3, 31, 3))
    assert [n for n in range(4, 31, 4) if due_by_epoch(n - 4, n, 30, 0.1)] == list(range(4, 31, 4))
    assert [n for n in range(4, 101, 4) if due_by_epoch(n - 4, n, 30, 1.5)] == [48, 92]
    assert not due_by_epoch(0, 100, None, 1.0) and not due_by_epoch(0, 100, 30, 0)


class Slow(dict[str, Tensor]):
    """Tensors beside a checkpoint that nobody can read before a word is given."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.word = Event()

    def items(self) -> Any:
        assert self.word.wait(60)
        return super().items()


class Made(TorchDispatchMode):
    """The numbers of fp32 that this thread copies."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.clone, aten._to_copy, aten.copy_) and out.dtype == torch.float32:
            self.numbers += out.numel()
        return out


def test_the_loop_itself_copies_nothing_at_a_save_and_does_not_wait_for_it(learner, tmp_path):
    writer, slow = writer_of(tmp_path, background=True), Slow({"x": torch.ones(2)})
    with Made() as made:
        writer.save(learner, {}, tensors=slow)
        assert made.numbers == 0
        torch.ones(2).clone()
        assert made.numbers == 2
    assert writer.done() == [] and learner.copying is not None
    slow.word.set()
    writer.wait()
    assert len(writer.done()) == 1


def test_a_step_that_begins_while_the_copy_is_made_waits_and_the_old_numbers_are_saved(model, tmp_path):
    config = small_config(tmp_path, model, schedule={"steps": 3}, ema={"decay": 0.5})
    learner = learner_of(config)
    course = Course(config.schedule, NoMilestones(), lambda event: None)
    streams: list[Any] = [FixedStream([batch_of(2)], last) for last in (2, 3)]
    train(learner, streams[:1], course)
    before, averages = frozen(weights(learner)), frozen(learner.ema["default"].tensors)
    writer, slow = writer_of(tmp_path, background=True), Slow({"x": torch.ones(2)})
    writer.save(learner, {}, tensors=slow)
    step = Thread(target=train, args=(learner, streams[1:], course))
    step.start()
    step.join(0.5)
    assert step.is_alive() and all(torch.equal(t, before[name]) for name, t in weights(learner).items())
    slow.word.set()
    step.join(60)
    writer.wait()
    assert learner.step == 3 and not any(torch.equal(t, before[name]) for name, t in weights(learner).items())
    saved = whole_state(read_checkpoint(writer.done()[0]))
    assert saved["step"] == 2 and saved["optimizers"]["default"]["state"].keys() == before.keys()
    assert all(entry["step"] == 2 for entry in saved["optimizers"]["default"]["state"].values())
    assert all(torch.equal(saved["adapters"]["default"][name], tensor) for name, tensor in before.items())
    assert all(torch.equal(saved["ema"]["default"][name], tensor) for name, tensor in averages.items())


def test_a_copy_that_fails_holds_no_step_back_and_is_told(learner, tmp_path):
    writer = writer_of(tmp_path, background=True)
    tensors: Any = {"x": "no tensor"}
    writer.save(learner, {}, tensors=tensors)
    learner.hold()
    with pytest.raises(RunError, match="a checkpoint could not be written"):
        writer.wait()
