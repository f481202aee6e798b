"""A stream of years on two processes: the same losses, scores and weights as on one, with and without an adapter."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.multi import spawn
from tests.run.test_document_adapters import KINDS
from tests.run.test_documents import of_kind
from tests.run.test_documents import plain as plain  # its world of three years
from tests.run.test_documents import world as world
from tests.run.test_many_processes import BOUND, apart
from tests.small import config_of, merged
from weft.events import Event, Scored, StepEnded

SHARDED, ZERO_2 = {"parallel": {"shard": 2}}, {"engine": {"kind": "deepspeed", "zero": 2, "device": "cpu"}}
NONE: dict[str, Any] = {"kind": "none"}
STORIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # learner, adapter, what joins two processes
    "replay, all weights": ("replay", NONE, {}),
    "traditional, all weights, sharded": ("traditional", NONE, SHARDED),
    "traditional, all weights, ZeRO-2": ("traditional", NONE, ZERO_2),
    "replay, lora": ("replay", KINDS["lora"], {}),
    "replay, lora, sharded": ("replay", KINDS["lora"], SHARDED),
    "lamaml, lora": ("lamaml", KINDS["lora"], {}),
    "traditional, ia3": ("traditional", KINDS["ia3"], {}),
    "agem, prefix": ("agem", KINDS["prefix"], {}),
}
# The softmax of attention is the same whatever is added to all keys: only rounding moves their biases, and Adam makes
# whole steps of it.
UNTOLD = "key.bias"


def trained(plain: dict[str, Any], steps: int | None = None) -> dict[str, Any]:
    """Train in this process, as its rank, to the end or for some steps; what was measured."""
    from weft.run.start import train_run

    heard: list[Event] = []
    asked = count(1)
    result = train_run(config_of(plain), heard.append, lambda: next(asked) == steps)
    return {
        "step": result.step,
        "losses": [e.metrics["train/loss"] for e in heard if isinstance(e, StepEnded)],
        "scores": [
            score for e in heard if isinstance(e, Scored) and e.metric == "brier" for score in e.scores.values()
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("story", STORIES)
def test_two_processes_learn_the_years_as_one_does(plain: dict[str, Any], story: str) -> None:
    learner, kind, joined = STORIES[story]
    change = merged(of_kind(learner), {"schedule": {"global_batch": 16}, "data": {"batch_size": 4}})
    common = merged({**plain, "adapter": kind}, change)
    (one,) = spawn(1, trained, {**common, "name": "one"})
    ranks = spawn(2, trained, {**common, "name": "two", **joined})
    assert ranks[0] == ranks[1] and ranks[0]["step"] == one["step"] > 3
    for own, both in zip([one["losses"], *one["scores"]], [ranks[0]["losses"], *ranks[0]["scores"]], strict=True):
        assert both == pytest.approx(own, rel=BOUND)
    expected, found = (weights(Path(plain["output"]) / name / "adapter") for name in ("one", "two"))
    assert len(expected) > 2 and apart(expected, found) < BOUND


@pytest.mark.slow
def test_all_weights_in_shards_go_on_to_the_bit(plain: dict[str, Any]) -> None:
    common = merged({**plain, "adapter": NONE}, merged(SHARDED, {"schedule": {"global_batch": 16}}))
    whole = spawn(2, trained, {**common, "name": "whole"})
    first = spawn(2, trained, {**common, "name": "parted"}, 2)
    second = spawn(2, trained, {**common, "name": "parted"})
    assert 0 < first[0]["step"] < second[0]["step"] == whole[0]["step"]
    assert [*first[0]["losses"], *second[0]["losses"]] == whole[0]["losses"]
    files = [Path(plain["output"]) / name / "adapter" / "model.safetensors" for name in ("whole", "parted")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def weights(folder: Path) -> dict[str, Tensor]:
    """Of an adapter, or of a whole model."""
    (file,) = folder.glob("*.safetensors")
    return {name: tensor for name, tensor in load_file(file).items() if not name.endswith(UNTOLD)}
