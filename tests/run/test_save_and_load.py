"""Save and load under FSDP2 on four processes: a two-layer Qwen3 that never is whole anywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.learners import NoMilestones
from tests.multi import spawn
from tests.small import config_of, make_qwen3
from weft.events import Event, StepEnded
from weft.run.assemble import assemble
from weft.run.checkpoint import CheckpointWriter, read_checkpoint, restore_learner
from weft.run.checks import check, settled
from weft.run.learner import Learner
from weft.run.retention import Retention
from weft.run.train import Course, train


def saved_and_loaded(plain: dict[str, Any], run: Path) -> dict[str, Any]:
    """Three steps with a snapshot after the first, and the two steps after it once more from what was loaded."""
    config = config_of(plain)
    engine = config.engine.open(config.parallel)
    survey = check(config, engine)
    config = settled(config, survey, engine.data_world)

    data = config.data.open(survey, lambda event: None, seed=config.seed, last_step=config.schedule.steps)

    def go(learner: Learner, stop: Callable[[], bool] = lambda: False) -> list[float]:
        heard: list[Event] = []
        train(learner, learner.stream, Course(config.schedule, NoMilestones(), heard.append, stop))
        return [event.metrics["train/loss"] for event in heard if isinstance(event, StepEnded)]

    def assembled() -> Learner:
        made = assemble(config, engine)
        # Sharded for certain: no process has a whole weight.
        assert all(isinstance(p, DTensor) for p in made.model.adapters.parameters("default").values())
        assert all(isinstance(p, DTensor) for p in made.model.network.parameters())
        made.stream = [data.train]
        return made

    learner = assembled()
    losses = go(learner, stop=lambda: learner.step == 0)  # after the first step
    saved: dict[str, Tensor] = learner.model.adapters.state_dict("default")
    writer = CheckpointWriter(run, Retention(), background=True)
    writer.save(learner, config.resolved())
    losses += go(learner)  # while it is being written
    writer.wait()
    writer.close()

    again = assembled()
    first = again.model.adapters.state_dict("default")
    restore_learner(again, read_checkpoint(run / "checkpoints" / "global_step_1"))
    loaded = again.model.adapters.state_dict("default")
    repeated = go(again)
    ended, other = learner.model.adapters.state_dict("default"), again.model.adapters.state_dict("default")
    engine.close()
    return {
        "losses": losses,
        "repeated": repeated,
        "differing": [name for name in saved if not torch.equal(saved[name], loaded[name])],
        "unlike_the_start": sum(not torch.equal(saved[name], first[name]) for name in saved),
        "differing_at_the_end": [name for name in ended if not torch.equal(ended[name], other[name])],
        "tensors": len(saved),
        "step": again.step,
    }


@pytest.mark.slow
def test_every_tensor_is_loaded_to_the_bit_and_the_next_losses_are_those_of_the_first_run(tmp_path) -> None:
    model = make_qwen3(tmp_path / "model", layers=2)
    chats = [[{"role": "user", "content": f"count to {n}"},
              {"role": "assistant", "content": " ".join(map(str, range(n)))}] for n in range(2, 50)]  # fmt: skip
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(rows)
    plain = {
        "name": "b9", "output": str(tmp_path / "runs"), "seed": 3,
        "family": {"kind": "causal-lm", "source": str(model)},
        "adapter": {"kind": "lora", "rank": 4, "targets": "all", "input_dropout": 0.1},
        "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "data": {"kind": "chat", "sources": [{"path": str(tmp_path / "chats.jsonl")}], "length": 192,
                 "cache_folder": str(tmp_path / "cache")},
        "engine": {"kind": "torch", "device": "cpu", "recompute": True},
        "parallel": {"shard": 4},
        "schedule": {"steps": 3, "global_batch": 4},
    }  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    ranks = spawn(4, saved_and_loaded, plain, run, timeout=280)
    found = ranks[0]
    assert all(rank == found for rank in ranks)
    assert found["tensors"] == 2 * 7 * 2  # two layers of seven projections, A and B
    assert found["unlike_the_start"] == found["tensors"]  # what was compared had really been trained
    assert found["differing"] == [] and found["differing_at_the_end"] == []
    assert len(found["losses"]) == 3 and found["repeated"] == found["losses"][1:]
    assert (found["step"], len(list((run / "checkpoints" / "global_step_1" / "tensors").glob("shard-*")))) == (3, 4)
