"""Checkpoints of several ranks: moved between engines to the bit, and whole whichever rank is killed whenever."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.equality import BOUND, Case, distance, learner_of, taught
from tests.learners import batch_of, parts
from tests.multi import Ranks, spawn
from tests.small import make_wan
from weft.math.sharded import whole
from weft.run.checkpoint import CheckpointWriter, read_checkpoint, restore_learner, whole_state
from weft.run.checkpoint_folders import damage, find_checkpoint, list_checkpoints, step_of
from weft.run.checkpoint_tree import learner_state, pack
from weft.run.learner import Learner
from weft.run.moving_average import MovingAverage
from weft.run.retention import Retention

ENGINES = {
    "FSDP2": {"shard": 4},
    "HSDP": {"data": 2, "shard": 2},
    "DDP": {"data": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("small") / "model", layers=1)


def made(model: Path, parallel: dict[str, int]) -> Learner:
    """A learner of so many ranks, of an adapter whose matrices they cannot share evenly."""
    learner = learner_of(model, Case(parallel=parallel, adapter={"rank": 3}))
    learner.ema = {"default": MovingAverage(0.5, 0)}
    return learner


def step(learner: Learner) -> float:
    """One step on batches that its number decides; the loss."""
    loss = taught(learner, parts(batch_of(4, seed=learner.step), *[1] * 4))
    (optimizer,) = learner.optimizers.values()
    learner.engine.step(optimizer, 1.0)
    learner.step += 1
    learner.drawn += 4
    learner.ema["default"].update(learner.step, learner.model.adapters.parameters("default"))
    return float(loss)


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    """Everything that is trained or kept of it, whole."""
    tensors: dict[str, Tensor] = {}
    pack(learner_state(learner), tensors)
    return {name: whole(tensor).clone() for name, tensor in tensors.items() if not name.startswith("chance")}


def saved(learner: Learner, run: Path, background: bool = False) -> Path:
    writer = CheckpointWriter(run, Retention(), background)
    writer.save(learner, {}, loss=0.25)
    writer.wait()
    (folder,) = writer.done()
    return folder


def on_four(model: Path, root: Path) -> dict[str, Any]:
    """Two steps under FSDP2; saved, and restored under each engine; each saves it again and goes on for a step."""
    first = made(model, ENGINES["FSDP2"])
    step(first), step(first)
    folder = saved(first, root / "first", background=True)
    found: dict[str, Any] = {"first": tensors_of(first)}
    found["next"] = (step(first), tensors_of(first))
    for name, parallel in ENGINES.items():
        again = made(model, parallel)
        restore_learner(again, read_checkpoint(folder))
        found[name] = tensors_of(again)
        saved(again, root / name)
        found[f"{name} next"] = (step(again), tensors_of(again))
    return found


def on_three(model: Path, root: Path, names: list[str]) -> dict[str, Any]:
    """What three ranks, among whom no matrix divides, make of several checkpoints."""
    found = {}
    for name in names:
        again = made(model, {"shard": 3})
        restore_learner(again, read_checkpoint(root / name / "checkpoints" / "global_step_2"))
        found[name] = tensors_of(again)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_a_checkpoint_moves_between_engines_and_numbers_of_ranks_to_the_bit(model, tmp_path):
    four = spawn(4, on_four, model, tmp_path)
    expected, (loss, following) = four[0]["first"], four[0]["next"]
    assert len(expected) == 5 * 2 * 10  # weight, average, two moments and their step, of A and B on ten layers
    for rank in four:
        for name in ENGINES:
            assert_same(rank[name], expected)
            again, tensors = rank[f"{name} next"]
            assert again == pytest.approx(loss, rel=BOUND)
            adapters = [key for key in following if key.startswith("adapters/")]
            assert distance({k: tensors[k] for k in adapters}, {k: following[k] for k in adapters}) < BOUND
    for name in ENGINES:
        folder = tmp_path / name / "checkpoints" / "global_step_2"
        assert damage(folder) is None
        alone = made(model, {})
        restore_learner(alone, read_checkpoint(folder))
        assert_same(tensors_of(alone), expected)
        assert whole_state(read_checkpoint(folder))["drawn"] == 8
    saved(alone, tmp_path / "one process")
    for rank in spawn(3, on_three, model, tmp_path, [*ENGINES, "one process"]):
        for tensors in rank.values():
            assert_same(tensors, expected)


# ---- Kills ----------------------------------------------------------------------------------------------------------

STEPS = 10


def train_on(model: Path, run: Path) -> dict[str, Tensor]:
    """Go on from the newest checkpoint to the last step, with a checkpoint after each."""
    learner = made(model, {"shard": 2})
    engine = learner.engine
    found = engine.agreed(str(find_checkpoint(run, "auto")[0] or "") if engine.rank == 0 else "")
    if found:
        restore_learner(learner, read_checkpoint(Path(found)))
    writer = CheckpointWriter(run, Retention(newest=2), background=True)
    while learner.step < STEPS:
        step(learner)
        writer.save(learner, {})
        writer.done()
    writer.wait()
    return tensors_of(learner)


def killed(model: Path, run: Path, chance: random.Random) -> None:
    """Kill one of two ranks at a moment around a save; the launcher would end the other."""
    ranks = Ranks(2, train_on, model, run)
    before = len(list_checkpoints(run)) and step_of(list_checkpoints(run)[-1])
    deadline = time.monotonic() + 60
    while (now := list_checkpoints(run)) == [] or step_of(now[-1]) < before + 1:
        assert time.monotonic() < deadline and any(process.is_alive() for process in ranks.processes)
    time.sleep(chance.uniform(0, 0.15))
    ranks.kill(chance.randrange(2))
    time.sleep(chance.uniform(0, 0.05))
    ranks.stop()


def unbroken(model: Path, root: Path) -> dict[str, Tensor]:
    return spawn(2, train_on, model, root / "unbroken")[0]


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_whichever_rank_is_killed_the_newest_checkpoint_is_whole_and_the_run_ends_as_if_it_were_not(
    model, tmp_path, kills
):
    chance, run, newest = random.Random(kills), tmp_path / "run", 0
    for _ in range(kills):
        killed(model, run, chance)
        folder, passed = find_checkpoint(run, "latest")
        assert folder is not None and passed == [] and step_of(folder) >= newest
        newest = step_of(folder)
        if newest == STEPS:
            break
    assert_same(spawn(2, train_on, model, run)[0], unbroken(model, tmp_path))
