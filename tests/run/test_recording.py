"""Which runs are recorded as CUDA graphs: what is refused by name, and where it would pay."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.learners import small_config
from weft.data.buckets import Bucket
from weft.errors import ConfigError
from weft.run.checks import check_recording
from weft.run.recording import check_graphs, obstacles, pays

GPU = torch.device("cuda")


@pytest.fixture
def configured(world, tmp_path):
    return lambda **change: small_config(tmp_path, world / "model", **change)


def test_a_plain_run_on_one_gpu_can_be_recorded(configured):
    assert list(obstacles(configured(), GPU, 1, "bf16")) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"engine": {"recompute": True}}, "engine.recompute"),
        ({"adapter": {"rank_dropout": 0.1}}, "adapter.rank_dropout draws from torch's global generator"),
        ({"optimizer": {"kind": "custom", "path": "torch.optim.SGD"}}, "optimizer 'custom' reads numbers on the host"),
        ({"objective": {"kind": "dmd"}}, "objective 'dmd' decides on the way what it asks"),
    ],
)
def test_what_speaks_against_it_is_said_and_refused_where_it_was_asked_for(configured, change, reason):
    config = configured(**change)
    assert any(reason in each for each in obstacles(config, GPU, 1, "bf16"))
    check_graphs(config, GPU, 1, "bf16")  # auto resolves to off
    asked = configured(**{**change, "engine": {**change.get("engine", {}), "graphs": True}})
    with pytest.raises(ConfigError, match=r"engine\.graphs: steps cannot be recorded"):
        check_graphs(asked, GPU, 1, "bf16")


def test_a_cpu_several_processes_and_fp16_are_refused_by_name(configured):
    config = configured(engine={"graphs": True})
    with pytest.raises(ConfigError, match="the device is cpu, and graphs are CUDA's"):
        check_recording(config, None)
    for world, precision, reason in ((2, "bf16", "2 processes"), (1, "fp16", "fp16's loss scale")):
        with pytest.raises(ConfigError, match=reason):
            check_graphs(config, GPU, world, precision)


def survey(*tokens: int) -> Any:
    return SimpleNamespace(buckets=lambda: {Bucket(1, 64, 64 + i, n): 1 for i, n in enumerate(tokens)})


def test_it_pays_for_few_small_shapes(configured):
    assert pays(configured(data={"batch_size": 2}), survey(4096, 1560))
    assert not pays(configured(data={"batch_size": 2}), survey(4097))
    assert not pays(configured(), survey())
    # Two micro-batches of each of five shapes would be 25 recordings.
    assert pays(configured(schedule={"accumulate": 2}), survey(*[100] * 4))
    assert not pays(configured(schedule={"accumulate": 2}), survey(*[100] * 5))
