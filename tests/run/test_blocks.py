"""What auto means for a run's blocks: whether they are compiled, and under which memory budget."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learners import small_config
from tests.small import make_wan
from weft.data.buckets import Bucket
from weft.engines.parallel import Layout
from weft.engines.single_device import SingleEngine
from weft.engines.torch_engine import Torch
from weft.events import Notice
from weft.run import blocks
from weft.run.blocks import Choice, choice_of, compile_as_chosen, fitting, steps_to_pay
from weft.run.estimate import Card, Held

SMALL = Bucket(frames=9, height=64, width=96, tokens=3 * 4 * 6)
LARGE = Bucket(frames=17, height=128, width=192, tokens=5 * 8 * 12)
SHAPES = {SMALL: 4, LARGE: 4}
GPU, CPU = Card(True, 2**36), Card(False, None)
ON_GPU = {"device": "cuda", "compile": "auto"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("chosen") / "model")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "compiler_missing", lambda device: None)


def test_a_cpu_does_not_compile_by_itself_and_says_so(model, tmp_path):
    choice = choice_of(small_config(tmp_path, model, engine={"device": "cpu", "compile": "auto"}), SHAPES)
    assert choice == Choice(False, None, "auto: only on GPUs with Triton")
    assert choice.lines() == ["blocks: not compiled (auto: only on GPUs with Triton)"]


def test_a_gpu_compiles_when_the_run_is_long_enough_and_says_from_when_on(model, tmp_path):
    short = small_config(tmp_path, model, engine={**ON_GPU, "activation_budget": None}, schedule={"steps": 10})
    steps = steps_to_pay(short, SHAPES)
    assert steps > 10
    assert choice_of(short, SHAPES, GPU).why == f"auto: pays from about {steps:,} steps on, and there are 10"
    long = small_config(tmp_path, model, engine={**ON_GPU, "activation_budget": None}, schedule={"steps": steps})
    assert choice_of(long, SHAPES, GPU) == Choice(True, None, "auto: the run is long enough to win it back")


@pytest.mark.parametrize(("engine", "layout", "why"), [
    ({"compile": False}, Layout(), "engine.compile is false"),
    ({"compile": Torch().compile}, Layout(), "engine.compile is false"),
    ({"recompute": "selective"}, Layout(), "engine.recompute is selective"),
    ({}, Layout(1, 1, 2), "parallel.sequence: ranks exchange tokens inside blocks"),
])  # fmt: skip
def test_what_does_not_go_with_compiling_is_named(model, tmp_path, engine, layout, why):
    config = small_config(tmp_path, model, engine={**ON_GPU, **engine}, schedule={"steps": 10**7})
    assert choice_of(config, SHAPES, GPU, layout).why == why


def test_a_missing_compiler_is_named_where_auto_would_compile(model, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "compiler_missing", lambda device: "Triton is not installed")
    config = small_config(tmp_path, model, engine=ON_GPU, schedule={"steps": 10**7})
    assert choice_of(config, SHAPES, GPU).why == "auto: Triton is not installed"


class Known:
    """Activations of which a budget keeps its share."""

    def at(self, budget: float) -> Held:
        return Held(0, int(budget * 10 * 2**30))


def test_the_largest_budget_that_fits_is_taken_and_the_smallest_where_none_does(model, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "rehearsals", lambda *_: {"train": Known()})
    config = small_config(tmp_path, model, engine=ON_GPU)
    found = {memory: fitting(config, LARGE, Card(True, int(memory * 2**30)), Layout(), "why") for memory in (4, 7, 0.1)}
    assert [choice.budget for choice in found.values()] == [0.3, 0.5, 0.0]  # of 92 % of the card, less 0.6 GiB
    assert list(found[4].needs) == [1.0, 0.7, 0.5, 0.4, 0.3]
    (first, second) = found[4].lines()
    assert first == "blocks: compiled, memory budget 0.3 (why)"
    told = "1: 10.6 GiB, 0.7: 7.6 GiB, 0.5: 5.6 GiB, 0.4: 4.6 GiB, 0.3: 3.6 GiB"
    assert second.startswith(f"memory under each budget: {told}")
    applied = found[4].applied(config).engine
    assert isinstance(applied, Torch) and (applied.compile, applied.activation_budget) == (True, 0.3)


def test_an_engine_is_told_what_was_chosen_and_so_is_the_listener(model, tmp_path):
    told: list[Any] = []
    config = small_config(tmp_path, model, engine={"device": "cpu", "compile": True, "activation_budget": 0.3})
    engine = SingleEngine(torch.device("cpu"), "fp32")
    compile_as_chosen(config, SHAPES, engine, told.append)
    assert engine.compiler is not None and engine.compiler.budget == 0.3 and engine.compiler.strict
    assert told == [Notice(text="blocks: compiled, memory budget 0.3 (engine.compile is true)")]
    compile_as_chosen(small_config(tmp_path, model, engine={"device": "cpu"}), SHAPES, engine, told.append)
    assert engine.compiler is None and len(told) == 1
