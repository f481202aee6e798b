"""What kind deepspeed refuses, in words, before any process meets another."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Adafactor, AdamW

from tests.learners import small_config
from weft.engines.deepspeed import DeepSpeed
from weft.engines.parallel import Layout
from weft.engines.zero_optimizer import ZeroOptimizer
from weft.engines.zero_setup import Zero, library
from weft.errors import ConfigError

CPU = torch.device("cpu")


def test_a_config_names_the_kind_of_engine(tmp_path: Path):
    config = small_config(tmp_path, tmp_path, engine={"kind": "deepspeed", "zero": 3, "offload_parameters": True})
    assert config.engine == DeepSpeed(zero=3, offload_parameters=True, device="cpu")


@pytest.mark.parametrize(("name", "layout"), [("shard", Layout(shard=2)), ("sequence", Layout(sequence=2))])
def test_zero_spreads_over_all_processes_and_leaves_none_to_other_ways(name, layout):
    with pytest.raises(ConfigError, match=rf"parallel.{name}: 2 .*Leave parallel.{name} out, or .*engine.kind=torch"):
        DeepSpeed().check(layout)


def test_data_parallelism_of_any_size_goes_with_zero():
    DeepSpeed(zero=3).check(Layout(data=64))


@pytest.mark.parametrize("zero", [2, 3])
def test_several_roles_go_with_zero_and_fast_weights_do_not(zero):
    assert DeepSpeed(zero=zero).can(Layout(data=2)) == {"roles"}


def test_weights_that_are_not_spread_are_not_offloaded():
    with pytest.raises(ValueError, match="offload_parameters needs zero: 3"):
        DeepSpeed(zero=2, offload_parameters=True)


def test_an_optimizer_that_looks_at_whole_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"Adafactor is not for engine.kind 'deepspeed'.*optimizer.kind=adamw"):
        ZeroOptimizer(Adafactor([nn.Parameter(torch.zeros(3, 2))]))


def test_an_optimizer_keeps_the_groups_that_it_was_built_with():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))]
    given = AdamW([{"params": [p], "lr": 0.1 * i, "names": [str(i)]} for i, p in enumerate(parameters)], lr=1.0)
    found = ZeroOptimizer(given)
    assert [group["names"] for group in found.param_groups] == [["0"], ["1"]]
    assert all(one is other for one, other in zip(found.parameters, parameters, strict=True))
    found.param_groups[1]["lr"] = 0.5
    found.hand_on()
    assert [group["lr"] for group in given.param_groups] == [0.0, 0.5]


def test_gradients_travel_in_one_bucket_that_holds_the_largest_of_them():
    small, large = Zero(2).config([3, 5], CPU), Zero(3).config([3, 1 << 27], CPU)
    assert small["zero_optimization"]["reduce_bucket_size"] == 8
    assert large["zero_optimization"]["reduce_bucket_size"] == 1 << 27


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'weft\[deepspeed\]'"):
        library(CPU)
