"""What makes a step faster may be changed as a run goes on, and binds nobody who uses its adapter elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learners import learner_of, small_config
from tests.run.test_resume import silent, stop_after
from tests.small import config_of, make_wan, merged, plain_config
from weft.families.wan import Wan
from weft.math.sdpa import backend_of
from weft.run.apply import Applied, trained_family
from weft.run.listeners import read_steps
from weft.run.start import train_run

PLAIN = {"family": {"lean": False}, "adapter": {"fused": False}, "engine": {"compile": False}}
OTHER = {"engine": {"recompute": "selective", "graphs": "auto"}, "family": {"attention": "math"}}


@pytest.fixture
def plain(small_world: Path, tmp_path: Path) -> dict[str, Any]:
    made = plain_config(tmp_path, small_world / "model", small_world / "clips")
    made["data"]["cache_folder"] = str(small_world / "cache")
    return merged(made, {"validation": {"every": 0}, "schedule": {"steps": 4}, "save": {"every": 2}})


def losses(folder: Path) -> torch.Tensor:
    steps = read_steps(folder / "events.rank0.jsonl")
    return torch.tensor([v for n in sorted(steps) for k, v in steps[n]["metrics"].items() if k.endswith("/loss")])


def test_a_run_goes_on_under_other_options_of_speed_and_learns_the_same(plain):
    whole = config_of(plain, name="whole")
    train_run(whole, silent)
    for name, before, after in (("on", PLAIN, {}), ("off", {}, PLAIN), ("other", {}, OTHER)):
        assert not train_run(config_of(merged(plain, before), name=name), silent, stop_after(2)).finished
        resumed = train_run(config_of(merged(plain, after), name=name), silent)
        assert resumed.finished
        # The bound is a few roundings of fp32.
        torch.testing.assert_close(losses(resumed.folder), losses(whole.folder), rtol=3e-6, atol=0)


def test_kernels_of_the_machine_that_trained_are_not_asked_of_the_one_that_samples():
    facts = {"kind": "wan", "source": "tiny-wan", "attention": "cudnn", "compute": "fp8", "shift": 5.0}
    assert trained_family({"family": facts}, None) == Wan(source="tiny-wan", shift=5.0)


def test_a_finished_adapter_answers_with_the_attention_that_was_chosen(tmp_path):
    config = small_config(tmp_path, make_wan(tmp_path / "model"), family={"attention": "math"})
    learner = learner_of(config)
    applied = Applied(learner.model, learner.engine, {}, trained_here=True)
    q = torch.randn(1, 2, 9, 8)
    for adapter in (True, False):
        with applied.use(adapter):
            assert backend_of(q, q, q) == "math"
    assert backend_of(q, q, q) == "cpu-flash"
