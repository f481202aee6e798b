"""Whole runs on several processes: the same losses, the same adapter, the same files as on one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.multi import spawn
from tests.small import config_of, merged
from weft.events import Evaluated, Event, StepEnded

# Each step takes four micro-batches of two clips, however many processes there are. With dropout of every kind: chance
# belongs to the draw, not to the process.
EVERYWHERE = {
    "schedule": {"steps": 4, "global_batch": 8},
    "data": {"caption_dropout": 0.3, "batch_size": 2},
    "adapter": {"input_dropout": 0.2},
    "save": {"every": 2, "keep": 5},
    "validation": {"every": 2},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp 2": (2, {"data": 2}),
    "ddp 4": (4, {"data": 4}),
    "fsdp 2": (2, {"shard": 2}),
    "hsdp 2x2": (4, {"data": 2, "shard": 2}),
    "sequence 2": (2, {"sequence": 2}),
    "shard 2 x sequence 2": (4, {"shard": 2, "sequence": 2}),
    "zero-2": (2, {}),
    "zero-3": (2, {}),
}
ZERO = {"zero-2": {"kind": "deepspeed", "zero": 2}, "zero-3": {"kind": "deepspeed", "zero": 3}}
# The processes of a sequence group drop other tokens than one process would, so they are compared without dropout.
UNDROPPED = {"adapter": {"input_dropout": 0.0}}
# Relative to the largest entry; sums in another order, and Adam's first steps divide by the size of tiny gradients.
BOUND = 2e-4


def trained(plain: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, as its rank; what was measured."""
    from weft.run.start import train_run

    heard: list[Event] = []
    result = train_run(config_of(plain), heard.append)
    return {
        "losses": [e.metrics["train/loss"] for e in heard if isinstance(e, StepEnded)],
        "norms": [e.metrics["default/grad_norm"] for e in heard if isinstance(e, StepEnded)],
        "validation": [e.loss for e in heard if isinstance(e, Evaluated)],
        "baseline": [e.baseline for e in heard if isinstance(e, Evaluated)],
        "step": result.step,
    }


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter_model.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-12)) for n in one)


def config(plain: dict[str, Any], name: str, layout: str = "one", **change: Any) -> dict[str, Any]:
    _, parallel = LAYOUTS.get(layout, (1, {}))
    spread = {"parallel": parallel, "engine": {"device": "cpu", **ZERO.get(layout, {"kind": "torch"})}}
    return merged(merged(merged({**plain, "name": name}, EVERYWHERE), spread), change)


@pytest.fixture
def alone(plain, tmp_path) -> tuple[dict[str, Any], Path]:
    """What one process measures, and its run."""
    (found,) = spawn(1, trained, config(plain, "alone"))
    return found, tmp_path / "runs" / "alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layouts", "change"),
    [
        (("ddp 2", "ddp 4", "fsdp 2", "hsdp 2x2", "zero-2", "zero-3"), {}),
        (("sequence 2", "shard 2 x sequence 2"), UNDROPPED),
    ],
)
def test_every_layout_trains_what_one_process_trains(plain, tmp_path, layouts, change) -> None:
    (expected,) = spawn(1, trained, config(plain, "alone", **change))
    run = tmp_path / "runs" / "alone"
    for name in layouts:
        processes, _ = LAYOUTS[name]
        folder = name.replace(" ", "-")
        ranks = spawn(processes, trained, config(plain, folder, name, **change))
        assert all(rank == ranks[0] for rank in ranks), name  # every rank knows the same numbers
        for what in ("losses", "norms", "validation", "baseline"):
            assert ranks[0][what] == pytest.approx(expected[what], rel=BOUND), (name, what)
        other = tmp_path / "runs" / folder
        assert apart(adapter(run / "adapter"), adapter(other / "adapter")) < BOUND, name
        assert apart(adapter(run / "global_step_2"), adapter(other / "global_step_2")) < BOUND, name
        folders = [sorted(p.name for p in each.iterdir() if p.is_dir()) for each in (run, other)]
        assert folders[0] == folders[1]
        assert len(list(other.glob("events.rank*.jsonl"))) == processes
        assert len(list(other.glob("training_gpu*.json"))) == processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("hsdp 2x2", "ddp 2"), ("zero-2", "hsdp 2x2"), ("fsdp 2", "one"), ("ddp 2", "zero-3")]
)
def test_a_run_goes_on_with_another_layout(plain, alone, tmp_path, before, after) -> None:
    expected, run = alone
    # The config of the whole run, stopped after two steps as SIGTERM would.
    (first, *_) = spawn(LAYOUTS[before][0], stopped_after, 2, config(plain, "moved", before))
    assert first["step"] == 2
    (second, *_) = spawn(LAYOUTS.get(after, (1,))[0], trained, config(plain, "moved", after))
    assert second["step"] == 4
    assert first["losses"] + second["losses"] == pytest.approx(expected["losses"], rel=BOUND)
    assert apart(adapter(run / "adapter"), adapter(tmp_path / "runs" / "moved" / "adapter")) < BOUND


def stopped_after(steps: int, plain: dict[str, Any]) -> dict[str, Any]:
    """Train until rank 1 alone is asked to stop, in the step before."""
    import os

    from weft.run.start import train_run

    heard: list[Event] = []

    def stop() -> bool:
        done = sum(isinstance(event, StepEnded) for event in heard)
        return os.environ["RANK"] == "1" and done == steps - 1

    result = train_run(config_of(plain), heard.append, stop)
    return {"losses": [e.metrics["train/loss"] for e in heard if isinstance(e, StepEnded)], "step": result.step}


@pytest.mark.slow
def test_a_resume_with_the_same_layout_is_exact_to_the_bit(plain, tmp_path) -> None:
    (whole, *_) = spawn(2, trained, config(plain, "whole", "fsdp 2"))
    (first, *_) = spawn(2, stopped_after, 2, config(plain, "parts", "fsdp 2"))
    (second, *_) = spawn(2, trained, config(plain, "parts", "fsdp 2"))
    assert first["losses"] + second["losses"] == whole["losses"]
    runs = tmp_path / "runs"
    one, other = adapter(runs / "whole" / "adapter"), adapter(runs / "parts" / "adapter")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_other_items_per_step_are_refused_on_every_rank_with_the_same_words(plain, tmp_path) -> None:
    spawn(2, stopped_after, 2, config(plain, "changed", "ddp 2"))
    ranks = spawn(2, refused, config(plain, "changed", "ddp 2", schedule={"global_batch": 4}))
    assert ranks[0] == ranks[1]
    assert "inputs.items_per_step: '8' -> '4'" in ranks[0]


def refused(plain: dict[str, Any]) -> str:
    from weft.errors import RunError

    with pytest.raises(RunError) as error:
        trained(plain)
    return str(error.value)


@pytest.mark.slow
def test_every_rank_has_a_log_of_its_own(plain, tmp_path) -> None:
    spawn(2, trained, config(plain, "logs", "ddp 2"))
    run = tmp_path / "runs" / "logs"
    for rank in (0, 1):
        facts = json.loads((run / f"training_gpu{rank}.json").read_text())
        assert (facts["gpu"]["number"], facts["state"], facts["step"]) == (rank, "finished", 4)
