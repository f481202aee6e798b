"""Few-step distillation on several processes: what student and critic learn on one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multi import spawn as spawn_within
from tests.run.test_distillation import CAPTIONS, distilling, state
from tests.run.test_many_processes import BOUND, apart
from tests.small import config_of, merged
from weft.events import StepEnded

EPS = 1e-5  # a student's gradient is a difference of estimates, some below 1e-9: AdamW would make steps of its rounding
# Each phase takes four captions, on each process in another shape, however many processes there are; the student moves
# at every second step. With dropout in both parts.
EVERYWHERE = {
    "optimizer": {"eps": EPS},
    "schedule": {"steps": 4, "global_batch": 4, "warmup": 0},
    "objective": {"student_every": 2},
    "data": {"caption_dropout": 0.3},
    "adapter": {"input_dropout": 0.2},
    "ema": {"decay": 0.5},
    "save": {"every": 1, "keep": 5},
}
SHAPES = CAPTIONS | {"buckets": {"sizes": [[64, 64], [96, 64]], "frames": [9]}}
CRITICS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "backend": "native", "rank": 2, "targets": "attention", "input_dropout": 0.1},
    "full": {"kind": "full", "targets": "attention"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp 2": (2, {"data": 2}),
    "fsdp 2": (2, {"shard": 2}),
    "hsdp 2x2": (4, {"data": 2, "shard": 2}),
}


def spawn(world: int, *what: Any) -> list[Any]:
    """With time for machines that have other things to do."""
    return spawn_within(world, *what, timeout=300)


def config(root: Path, world: Path, name: str, layout: str, **options: Any) -> dict[str, Any]:
    """A run on a layout. critic: its adapter. clips: train on them in place of captions."""
    critic = {
        "adapter": CRITICS[options.get("critic", "lora")],
        "optimizer": {"kind": "adamw", "lr": 2e-3, "eps": 1e-5},
    }
    plain = merged(distilling(root, world, None if options.get("clips") else SHAPES), EVERYWHERE)
    spread = {"roles": {"critic": critic}, "parallel": LAYOUTS[layout][1]}
    return merged({**plain, "name": name}, spread)


def trained(plain: dict[str, Any], stop_in: int | None = None) -> list[dict[str, float]]:
    """Train in this process, as its rank; what each step logged. stop_in: the step in which one is told to stop."""
    from weft.run.start import train_run

    heard: list[dict[str, float]] = []

    def tell(event: object) -> None:
        if isinstance(event, StepEnded):
            heard.append(dict(event.metrics))

    train_run(config_of(plain), tell, lambda: stop_in is not None and len(heard) == stop_in - 1)
    return heard


def parts(plain: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors of both parts, and the average of the student, by part."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state(config_of(plain)).items():
        kind, _, name = key[1:].partition("/")
        if kind in ("adapters", "ema") and isinstance(value, Tensor):
            found.setdefault(f"{kind} {name.split('/')[0]}", {})[name] = value
    return found


def assert_close_runs(one: dict[str, Any], other: dict[str, Any]) -> None:
    ours, theirs = parts(one), parts(other)
    assert ours.keys() == theirs.keys() == {"adapters student", "adapters critic", "ema student"}
    for name, tensors in ours.items():
        assert apart(tensors, theirs[name]) < BOUND, (other["name"], name)


def assert_close_logs(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for row, known in zip(found, expected, strict=True):
        assert row == pytest.approx(known, rel=BOUND)


@pytest.fixture(scope="module")
def sharded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """A run on captions with a full-rank critic, all of it sharded over two processes, and what it logged."""
    plain = config(tmp_path_factory.mktemp("sharded"), world, "whole", "fsdp 2", critic="full")
    ranks = spawn(2, trained, plain)
    assert ranks[0] == ranks[1]
    return plain, ranks[0]


@pytest.mark.slow
def test_two_processes_distill_with_a_full_critic_what_one_distills(world, tmp_path, sharded):
    alone = config(tmp_path, world, "alone", "one", critic="full")
    (expected,) = spawn(1, trained, alone)
    assert [sorted({key.split("/")[0] for key in row}) for row in expected] == [["critic"], ["critic", "student"]] * 2
    replicated = config(tmp_path, world, "replicated", "ddp 2", critic="full")
    ranks = spawn(2, trained, replicated)
    assert ranks[0] == ranks[1]
    for plain, logged in (sharded, (replicated, ranks[0])):
        assert_close_logs(logged, expected)
        assert_close_runs(alone, plain)


@pytest.mark.slow
def test_four_processes_distill_on_clips_what_one_distills(world, tmp_path):
    """Two copies of a base that is sharded over two."""
    found = []
    for layout in ("one", "hsdp 2x2"):
        plain = config(tmp_path, world, layout.replace(" ", "-"), layout, clips=True)
        ranks = spawn(LAYOUTS[layout][0], trained, merged(plain, {"data": {"batch_size": 1}}))
        assert all(rank == ranks[0] for rank in ranks)
        found.append((plain, ranks[0]))
    (alone, expected), (spread, logged) = found
    assert_close_logs(logged, expected)
    assert_close_runs(alone, spread)


@pytest.mark.slow
def test_a_run_that_stops_within_a_cycle_goes_on_to_the_bit_and_on_another_layout_to_rounding(world, tmp_path, sharded):
    """Stopped after the third of four steps, one critic's step before the student's second."""
    whole, expected = sharded
    same, moved = (config(tmp_path, world, name, "fsdp 2", critic="full") for name in ("same", "moved"))
    first, *_ = spawn(2, trained, same, 3)
    assert first == expected[:3]
    shutil.copytree(tmp_path / "runs" / "same", tmp_path / "runs" / "moved")
    second, *_ = spawn(2, trained, same)
    assert second == expected[3:]
    ours, theirs = parts(whole), parts(same)
    assert all(torch.equal(t, theirs[part][name]) for part, tensors in ours.items() for name, t in tensors.items())
    alone = merged(moved, {"parallel": {"shard": 1}})
    (third,) = spawn(1, trained, alone)
    assert_close_logs(third, expected[3:])
    assert_close_runs(whole, alone)
