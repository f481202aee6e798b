"""Run by torchrun on four processes: save a sharded learner after its first step, load it anew, and compare.

Usage: torchrun --nproc-per-node 4 -m tests.run.save_and_load CONFIG.json RUN_FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.learners import NoMilestones
from tests.small import config_of
from weft.events import Event, StepEnded
from weft.run.assemble import assemble
from weft.run.checkpoint import CheckpointWriter, read_checkpoint, restore_learner
from weft.run.checks import check, settled
from weft.run.learner import Learner
from weft.run.retention import Retention
from weft.run.train import Course, train


def main(config_file: Path, run: Path) -> dict[str, Any]:
    """Three steps with a snapshot after the first, and the two steps after it once more from what was loaded."""
    config = config_of(json.loads(config_file.read_text()))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = main(Path(sys.argv[1]), Path(sys.argv[2]))
    Path(sys.argv[2], f"found.{os.environ['RANK']}.json").write_text(json.dumps(found))
