"""The wait for data: measured in every step, and told once when it is too long."""

import io

from rich.console import Console

from tests.small import config_of
from weft.events import RunStarted, StepEnded
from weft.run.listeners import DataWait, Losses, Terminal
from weft.run.start import train_run


def step_of(number: int, data: float, total: float = 1.0) -> StepEnded:
    return StepEnded(step=number, experience="x", metrics={"train/loss": 1.0}, seconds={"data": data, "total": total})


def said_of(waits: list[float]) -> str:
    text = io.StringIO()
    terminal = Terminal(Console(file=text))
    terminal(RunStarted(name="r", step=0, total_steps=500, resumed_from=None, trainable=1, device="cpu"))
    for number, wait in enumerate(waits, start=1):
        terminal(step_of(number, wait))
    return text.getvalue()


def test_a_long_wait_is_told_once_with_its_share_of_the_last_50_steps():
    said = said_of([0.0] * 60 + [0.23] * 200)
    assert said.count("the loop waits for data") == 1
    # The first share over a tenth: 22 steps of 0.23 s among 50 of 1 s are 5.06 s.
    assert "waits for data 10% of the time: the last 50 steps waited 5.1 s" in said


def test_a_tenth_is_no_long_wait_and_fewer_than_50_steps_are_no_proof():
    assert "waits for data" not in said_of([0.1 - 1e-9] * 200)
    assert "waits for data" not in said_of([0.9] * 49)
    assert "waits for data 90% of the time" in said_of([0.9] * 50)


def test_the_share_is_of_time_and_not_of_steps():
    wait = DataWait()
    wait.step({"data": 1.0, "total": 1.0})
    wait.step({"data": 0.0, "total": 9.0})
    assert wait.share == 0.1


def test_every_step_says_how_long_it_waited_for_its_data(plain):
    told = []
    train_run(config_of(plain, schedule={"steps": 3}), told.append)
    steps = [event for event in told if isinstance(event, StepEnded)]
    assert len(steps) == 3 and all(0 <= step.seconds["data"] <= step.seconds["total"] for step in steps)


def test_losses_of_two_experts_are_named_on_the_line():
    losses = Losses()
    assert losses.line() == "--"
    losses.step({"high/loss": 2.0, "high/unweighted_loss": 9.0})
    assert losses.line() == "2.0000"
    losses.step({"low/loss": 1.0})
    losses.step({"high/loss": float("nan")})
    assert losses.line() == "high 2.0000  low 1.0000"
