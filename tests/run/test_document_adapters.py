"""Runs of encoders with each kind of adapter: killed and resumed, gone on from, and what their files answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.run.test_documents import plain as plain  # its world of three years
from tests.run.test_documents import run
from tests.run.test_documents import world as world
from tests.small import config_of, merged
from weft.contracts import Berth, Documents
from weft.errors import ConfigError
from weft.run.assemble import assemble, count_parameters
from weft.run.plan import plan
from weft.run.start import train_run

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "targets": "auto", "rank": 2},
    "lora with biases": {"kind": "lora", "targets": "auto", "rank": 2, "bias": "all"},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "tokens": 3},
    "p-tuning": {"kind": "p-tuning", "tokens": 3, "hidden": 8},
}


def with_adapter(plain: dict[str, Any], kind: str) -> dict[str, Any]:
    return {**plain, "adapter": KINDS[kind]}


def folder_of(plain: dict[str, Any], name: str) -> Path:
    return Path(plain["output"]) / name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(plain: dict[str, Any], kind: str) -> None:
    plain = with_adapter(plain, kind)
    run(plain, name="whole")
    done = iter([False] * 4 + [True])
    assert not train_run(config_of({**plain, "name": "parted"}), lambda event: None, lambda: next(done)).finished
    assert run(plain, name="parted")[0].finished
    one, other = (
        load_file(folder_of(plain, name) / "adapter/adapter_model.safetensors") for name in ("whole", "parted")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_years_run_with_an_adapter_goes_on_from_an_earlier_one(plain: dict[str, Any]) -> None:
    plain = with_adapter(plain, "lora with biases")
    first, _ = run(plain, name="first")
    start = {"start_from": str(first.folder / "adapter")}
    second, _ = run(plain, name="second", adapter=start)
    assert second.finished
    with pytest.raises(ConfigError, match=r"adapter\.bias=all"):
        run(plain, name="third", adapter={**start, "bias": "none"})


def test_an_adapter_run_begins_with_what_a_full_run_left(plain: dict[str, Any]) -> None:
    first, _ = run(plain, name="full")
    family = {"source": str(first.folder / "adapter")}
    second, _ = run(plain, name="adapted", family=family, adapter=KINDS["lora"])
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(first.folder / "adapter"), str(second.folder / "adapter")
    )
    ids, mask = torch.tensor([[6, 7, 8]]), torch.ones(1, 3, dtype=torch.bool)
    assert torch.isfinite(model(input_ids=ids, attention_mask=mask.long()).logits).all()
    config = config_of(merged(plain, {"family": family}))
    network = config.family.model_copy(update={"labels": ("high", "low")}).load("fp32", "default", Berth())
    assert config.family.forward(network, Documents(ids, mask)).shape == (1, 2)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_the_parameters_that_a_plan_counts_are_those_that_are_trained(plain: dict[str, Any], kind: str) -> None:
    config = config_of({**plain, "adapter": KINDS.get(kind, {"kind": "none"})})
    told = plan(config).parameters
    family = config.family.model_copy(update={"labels": ("high", "low"), "multi_label": False, "seed": 3})
    learner = assemble(config.model_copy(update={"family": family}), config.engine.open())
    assert told == count_parameters(learner)
    share = 100 * told.trainable / told.total
    assert told.line() == (
        f"Trainable params: {told.trainable:,} || All params: {told.total:,} || Trainable: {share:.4f}%"
    )


def test_blocks_are_not_recomputed_under_a_prefix(plain: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.recompute"):
        config_of(merged(with_adapter(plain, "prefix"), {"engine": {"recompute": True}}))


def test_adalora_is_refused_with_the_reason(plain: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="AdaLoRA adds a term to the loss"):
        config_of({**plain, "adapter": {"kind": "adalora"}})
