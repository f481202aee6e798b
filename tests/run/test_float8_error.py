"""Runs in fp8: their error is measured on the first batch and said, and their loss follows that of half precision."""

from pathlib import Path
from statistics import mean

import pytest
import torch

from tests.learners import FixedStream, NoMilestones, batch_of, learner_of, small_config
from weft.errors import ConfigError
from weft.events import Event, Notice, StepEnded
from weft.run.computing import check_compute, compute_of
from weft.run.float8_error import FirstBatch, Float8Error
from weft.run.train import Course, train


def told(root: Path, compute: str, steps: int, recompute: bool = False) -> list[Event]:
    """The events of a run on the shipped small Wan, in bf16."""
    config = small_config(
        root, Path("tiny-wan"), family={"compute": compute}, schedule={"steps": steps}, optimizer={"lr": 3e-3},
        engine={"precision": "bf16", "recompute": recompute},
    )  # fmt: skip
    learner, heard = learner_of(config, shaken=False), list[Event]()
    stream = [FixedStream([batch_of(2, seed) for seed in range(4)], steps)]
    first = FirstBatch(config.family, heard.append)
    train(learner, stream, Course(config.schedule, NoMilestones(), heard.append, before=first))
    return heard


def losses(heard: list[Event]) -> list[float]:
    return [step.metrics["train/loss"] for step in heard if isinstance(step, StepEnded)]


def apart(root: Path, steps: int) -> list[float]:
    full, fp8 = (losses(told(root, compute, steps)) for compute in ("full", "fp8"))
    assert len(full) == steps
    return [abs(a - b) / a for a, b in zip(full, fp8, strict=True)]


def test_the_first_steps_of_fp8_are_those_of_half_precision_within_a_hundredth(tmp_path: Path) -> None:
    differences = apart(tmp_path, 5)
    assert 0 < max(differences) < 0.01  # bf16 against fp32 comes to .0015


@pytest.mark.slow
def test_a_hundred_steps_of_fp8_follow_half_precision_within_two_hundredths(tmp_path: Path) -> None:
    differences = apart(tmp_path, 100)
    assert max(differences) < 0.02 and mean(differences) < 0.005


@pytest.mark.parametrize("recompute", [False, True])
def test_the_error_is_said_once_before_the_first_step(tmp_path: Path, recompute: bool) -> None:
    heard = told(tmp_path, "fp8", 2, recompute)
    (notice,) = [event for event in heard if isinstance(event, Notice)]
    assert heard[0] is notice
    assert notice.text.startswith("fp8 compute, measured on the first batch: 20 layers, relative error of a product 3.")
    assert "outliers" not in notice.text


def test_nothing_is_measured_where_nothing_is_in_fp8(tmp_path: Path) -> None:
    assert not [event for event in told(tmp_path, "full", 2) if isinstance(event, Notice)]


def test_an_error_that_rounding_does_not_explain_is_a_warning() -> None:
    usual = Float8Error({"a": 0.03, "b": 0.02}, {"a": 0.03}, {"a": 0.026}, 0.99, {"a.lora_A": 0.98})
    assert usual.is_usual and "outliers" not in usual.sentence()
    assert usual.total == {"a": pytest.approx((0.03**2 + 0.026**2) ** 0.5), "b": 0.02}
    for found in (
        Float8Error({"a": 0.2}, {}, {}, 0.99, {"a": 0.9}),
        Float8Error({"a": 0.03}, {}, {}, 0.9, {"a": 0.9}),
    ):
        assert "outliers that fp8 does not hold" in found.sentence()


def test_a_device_or_an_objective_that_cannot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, Path("tiny-wan"), family={"compute": "fp8"})
    family = config.family
    assert compute_of(family) == "fp8"
    check_compute(family, frozenset(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"fp8 cannot be used here, for .*NVIDIA.*family\.compute=full"):
        check_compute(family, frozenset(), torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ConfigError, match=r"no fp8 arithmetic \(capability 7\.0"):
        check_compute(family, frozenset(), torch.device("cuda"))
    with pytest.raises(ConfigError, match="differentiates twice"):
        check_compute(family, frozenset({"functional"}), torch.device("cpu"))
    with pytest.raises(ConfigError, match="engine's precision is fp32 here"):
        learner_of(config)
