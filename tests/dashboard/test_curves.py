"""Curves of a run: the steps that are the run's, smoothed over all of them, thinned so that nothing extreme is lost."""

import json
import math
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import events
from weft.dashboard.curves import Curves, forward
from weft.dashboard.run_log import RunLog
from weft.dashboard.thinning import kept, smoothed
from weft.run.listeners import EventLog, read_steps

VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300)


def record(step: int, **metrics: float | None) -> dict:
    return {"time": 1000.0 + step, "event": "step", "step": step, "metrics": metrics, "seconds": {"total": 0.5}}


@given(VALUES, st.integers(4, 40))
def test_thinning_keeps_the_ends_the_extremes_and_the_order(values, points) -> None:
    given_values = numpy.array(values)
    chosen = kept(given_values, points)
    assert len(chosen) <= max(points, 4)
    assert list(chosen) == sorted(set(chosen.tolist()))
    assert (chosen[0], chosen[-1]) == (0, len(values) - 1)
    if not numpy.isnan(given_values).all():
        assert numpy.nanmax(given_values[chosen]) == numpy.nanmax(given_values)
        assert numpy.nanmin(given_values[chosen]) == numpy.nanmin(given_values)


def test_one_spike_in_100000_steps_is_never_lost() -> None:
    values = numpy.full(100_000, 0.1)
    for place in (0, 1, 49_999, 99_998, 99_999):
        spiked = values.copy()
        spiked[place] = 9.0
        assert place in kept(spiked, 1000)


@given(VALUES, st.floats(0.01, 0.9999))
def test_smoothing_is_the_debiased_moving_mean_and_carries_over_gaps(values, beta) -> None:
    expected, mean, weight = [], 0.0, 1.0
    for value in values:
        if not math.isnan(value):
            mean, weight = beta * mean + (1 - beta) * value, beta * weight
        expected.append(mean / (1 - weight) if weight < 1 else math.nan)
    numpy.testing.assert_allclose(smoothed(numpy.array(values), beta), expected, rtol=1e-6, atol=1e-6)


def test_a_smoothing_of_zero_changes_nothing() -> None:
    numpy.testing.assert_array_equal(smoothed(numpy.array([1.0, math.nan, 3.0]), 0.0), [1.0, math.nan, 3.0])


STEPS = st.lists(st.tuples(st.sampled_from(["step", "step", "step", "run_started"]), st.integers(0, 30)), max_size=60)


@settings(max_examples=80, deadline=None)
@given(STEPS)
def test_curves_hold_the_same_steps_as_the_trainers_own_reader(tmp_path_factory, told) -> None:
    """Also of logs in which steps come twice, or backwards, without a resume."""
    path = tmp_path_factory.mktemp("log") / "events.rank0.jsonl"
    log = EventLog(path)
    for number, (kind, step) in enumerate(told):
        if kind == "step":
            metrics = {"train/loss": float(number)} | ({"odd": 1.0} if number % 2 else {})
            log(events.StepEnded(step=step, experience="all", metrics=metrics))
        else:
            log(events.RunStarted(name="run", step=step, total_steps=30, resumed_from=None, trainable=1, device="cpu"))
    log.close()
    expected = dict(sorted(read_steps(path).items()))
    curves = reading(path).curves
    for name in ("train/loss", "odd"):
        steps, _, values = curves.column(name)
        with_it = {step: r["metrics"][name] for step, r in expected.items() if name in r["metrics"]}
        assert dict(zip(steps, values, strict=True)) == with_it and list(steps) == list(with_it)


def reading(path) -> RunLog:
    log = RunLog(path)
    while log.update():
        pass
    return log


def test_a_number_that_was_not_finite_is_a_gap() -> None:
    curves = Curves()
    for step, loss in enumerate([1.0, None, math.inf, "high", True, 2], start=1):
        curves.add(record(step, loss=loss))
    drawn = curves.drawn("loss", None, None, 100, 0.5)
    assert drawn["values"] == [1.0, None, None, None, None, 2.0]
    assert drawn["smoothed"] == [1.0, 1.0, 1.0, 1.0, 1.0, pytest.approx((0.5 * 0.5 + 0.5 * 2) / 0.75)]
    json.dumps(drawn, allow_nan=False)


@pytest.mark.parametrize("bad", [
    {}, {"step": -1}, {"step": 1.5}, {"step": True}, {"step": 1 << 60}, {"metrics": []}, {"metrics": None},
    {"time": "x"},
])  # fmt: skip
def test_a_record_that_is_no_step_is_refused(bad) -> None:
    curves = Curves()
    sound = record(1, loss=1.0)
    assert curves.add(sound) and curves.add({**sound, "seconds": [1]})
    assert not curves.add({**sound, **bad} if bad else {})


def test_a_range_is_of_steps_or_of_seconds_since_1970() -> None:
    curves = Curves()
    for step in range(1, 101):
        curves.add({**record(step, loss=float(step)), "time": 1.7e9 + 10 * step})
    assert curves.drawn("loss", 20, 22, 100, 0.0)["steps"] == [20, 21, 22]
    assert curves.drawn("loss", 1.7e9 + 200, 1.7e9 + 225, 100, 0.0)["steps"] == [20, 21, 22]
    assert curves.drawn("loss", 98, None, 100, 0.0)["values"] == [98.0, 99.0, 100.0]
    assert curves.drawn("none", None, None, 100, 0.9) == {"steps": [], "times": [], "values": [], "smoothed": []}


def test_smoothing_is_over_all_points_also_of_a_range() -> None:
    curves = Curves()
    for step in range(1, 1001):
        curves.add(record(step, loss=float(step % 10)))
    whole = dict(zip(*(curves.drawn("loss", None, None, 2000, 0.9)[k] for k in ("steps", "smoothed")), strict=True))
    part = curves.drawn("loss", 500, 900, 50, 0.9)
    assert part["smoothed"] == [whole[step] for step in part["steps"]]


def test_a_series_of_100000_points_is_answered_in_a_blink() -> None:
    curves = Curves()
    for step in range(1, 100_001):
        curves.add(record(step, loss=math.sin(step / 100)))
    took = []
    for _ in range(3):
        began = time.process_time()
        assert len(curves.drawn("loss", None, None, 1500, 0.99)["steps"]) <= 1500
        took.append(time.process_time() - began)
    assert min(took) < 0.2, "0.02 s on an idle core"


def test_a_clock_that_was_set_back_folds_no_curve() -> None:
    """An hour back between the third step and the fourth: what was before lies an hour earlier, all else is as told."""
    told = numpy.array([7200.0, 7201.0, 7202.0, 3602.0, 3603.0])
    assert forward(told).tolist() == [3600.0, 3601.0, 3602.0, 3602.0, 3603.0]
    assert forward(told[:3]).tolist() == told[:3].tolist()
