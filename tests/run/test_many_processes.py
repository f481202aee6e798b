"""Whole runs on several processes: the same losses, the same adapter, the same files as on one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.multi import spawn
from tests.small import config_of, merged, plain_config
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
    "one": (1, {}),
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
    _, parallel = LAYOUTS[layout]
    spread = {"parallel": parallel, "engine": {"device": "cpu", **ZERO.get(layout, {"kind": "torch"})}}
    return merged(merged(merged({**plain, "name": name}, EVERYWHERE), spread), change)


Whole = Callable[[str], tuple[list[dict[str, Any]], Path]]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """By the layout: what each rank of an unbroken run has measured, and the run's folder. Each is trained once."""
    root = tmp_path_factory.mktemp("whole")
    plain = plain_config(root, world / "model", world / "clips")
    plain["data"]["cache_folder"] = str(world / "cache")
    found: dict[str, tuple[list[dict[str, Any]], Path]] = {}

    def trained_on(layout: str) -> tuple[list[dict[str, Any]], Path]:
        if layout not in found:
            name = layout.replace(" ", "-")
            ranks = spawn(LAYOUTS[layout][0], trained, config(plain, name, layout))
            found[layout] = ranks, root / "runs" / name
        return found[layout]

    return trained_on


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp 2", "ddp 4", "fsdp 2", "hsdp 2x2", "zero-2", "zero-3"])
def test_every_layout_trains_what_one_process_trains(whole, layout) -> None:
    assert_same_training(whole("one"), whole(layout))


@pytest.mark.slow
def test_every_layout_with_sequences_trains_what_one_process_trains(plain, tmp_path) -> None:
    found = []
    for layout in ("one", "sequence 2", "shard 2 x sequence 2"):
        name = layout.replace(" ", "-")
        ranks = spawn(LAYOUTS[layout][0], trained, config(plain, name, layout, **UNDROPPED))
        found.append((ranks, tmp_path / "runs" / name))
    for one in found[1:]:
        assert_same_training(found[0], one)


def assert_same_training(one: tuple[list[dict[str, Any]], Path], other: tuple[list[dict[str, Any]], Path]) -> None:
    """The numbers, the adapters and the files of a run on several processes are those of a run on one."""
    ((expected,), run), (ranks, spread) = one, other
    assert all(rank == ranks[0] for rank in ranks)  # every rank knows the same numbers
    for what in ("losses", "norms", "validation", "baseline"):
        assert ranks[0][what] == pytest.approx(expected[what], rel=BOUND), what
    for name in ("adapter", "global_step_2"):
        assert apart(adapter(run / name), adapter(spread / name)) < BOUND, name
    folders = [sorted(p.name for p in each.iterdir() if p.is_dir()) for each in (run, spread)]
    assert folders[0] == folders[1]
    assert len(list(spread.glob("events.rank*.jsonl"))) == len(ranks)
    assert len(list(spread.glob("training_gpu*.json"))) == len(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("hsdp 2x2", "ddp 2"), ("zero-2", "hsdp 2x2"), ("fsdp 2", "one"), ("ddp 2", "zero-3")]
)
def test_a_run_goes_on_with_another_layout(plain, whole, tmp_path, before, after) -> None:
    """From the checkpoint after its second step, as if it had been killed after that."""
    (expected,), run = whole("one")
    moved = tmp_path / "runs" / "moved"
    shutil.copytree(whole(before)[1], moved)
    for later in ("checkpoints/global_step_4", "adapter"):
        shutil.rmtree(moved / later)
    (second, *_) = spawn(LAYOUTS[after][0], trained, config(plain, "moved", after))
    assert second["step"] == 4
    assert second["losses"] == pytest.approx(expected["losses"][2:], rel=BOUND)
    assert apart(adapter(run / "adapter"), adapter(moved / "adapter")) < BOUND


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
def test_a_resume_with_the_same_layout_is_exact_to_the_bit(plain, whole, tmp_path) -> None:
    (expected, _), run = whole("fsdp 2")
    (first, *_) = spawn(2, stopped_after, 2, config(plain, "parts", "fsdp 2"))
    (second, *_) = spawn(2, trained, config(plain, "parts", "fsdp 2"))
    assert (first["step"], second["step"]) == (2, 4)
    assert first["losses"] + second["losses"] == expected["losses"]
    one, other = adapter(run / "adapter"), adapter(tmp_path / "runs" / "parts" / "adapter")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_other_items_per_step_are_refused_on_every_rank_with_the_same_words(plain, whole, tmp_path) -> None:
    shutil.copytree(whole("ddp 2")[1], tmp_path / "runs" / "changed")
    ranks = spawn(2, refused, config(plain, "changed", "ddp 2", schedule={"global_batch": 4}))
    assert ranks[0] == ranks[1]
    assert "inputs.items_per_step: '8' -> '4'" in ranks[0]


def refused(plain: dict[str, Any]) -> str:
    from weft.errors import RunError

    with pytest.raises(RunError) as error:
        trained(plain)
    return str(error.value)


@pytest.mark.slow
def test_every_rank_has_a_log_of_its_own(whole) -> None:
    _, run = whole("ddp 2")
    for rank in (0, 1):
        facts = json.loads((run / f"training_gpu{rank}.json").read_text())
        assert (facts["gpu"]["number"], facts["state"], facts["step"]) == (rank, "finished", 4)
