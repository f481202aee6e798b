"""The dashboard is killed and started again under an open page: nothing is lost, nothing is there twice."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.dashboard import folders
from tests.dashboard.browser.watching import Visit, entered
from tests.dashboard.serving import Dashboard
from tests.dashboard.written import RunWriter
from weft.run.listeners import read_events


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Dashboard]:
    (tmp_path / "runs").mkdir()
    folders.training(tmp_path / "runs", time.time())
    with Dashboard(tmp_path / "runs", tmp_path / "state") as dashboard:
        yield dashboard


def train(run: RunWriter, steps: range) -> None:
    """Steps that end now."""
    for step in steps:
        run.clock.now = time.time() - 1.5
        run.step(step)
        run.beats("training", step)


def assert_holds_the_log(visit: Visit, run: RunWriter) -> None:
    """The chart has each step of the log once, in order, with its loss (the server sends seven digits)."""
    told = [one for one in read_events(run.folder / "events.rank0.jsonl") if one["event"] == "step"]
    held = drawn(visit)
    assert [int(row["step"]) for row in held] == [one["step"] for one in told]
    losses = [one["metrics"]["train/loss"] for one in told]
    assert [float(row["value"]) for row in held] == pytest.approx(losses, rel=1e-6)


def drawn(visit: Visit) -> list[dict[str, str]]:
    return [row for row in visit.curve() if row["curve"] == "train"]


def smoothed(visit: Visit) -> list[float]:
    return [float(row["smoothed"]) for row in drawn(visit)]


def restart(served: Dashboard) -> None:
    """On the same two ports."""
    page, api = served.ports
    served.options = ("--port", str(page), "--api-port", str(api))
    served.start()


def test_a_killed_server_is_told_and_what_it_missed_is_drawn_once_when_it_is_back(browser: Browser, served: Dashboard):
    run = RunWriter.reopened(served.root / "training", time.time())
    visit = entered(browser, served)
    visit.run("training")
    sign, step = visit.page.get_by_test_id("connection"), visit.page.get_by_test_id("step")
    expect(sign).to_have_attribute("data-state", "live")
    train(run, range(82, 91))
    expect(step).to_contain_text("90")
    assert_holds_the_log(visit, run)

    served.kill()
    expect(sign).to_have_attribute("data-state", "away")
    expect(sign).to_contain_text("in")
    expect(visit.page.locator(".run-since")).to_contain_text("as of")
    train(run, range(91, 111))
    assert len(drawn(visit)) == 90  # what is drawn stays

    restart(served)
    expect(sign).to_have_attribute("data-state", "live", timeout=20_000)
    expect(step).to_contain_text("110")
    train(run, range(111, 121))
    expect(step).to_contain_text("120")
    assert_holds_the_log(visit, run)
    live = smoothed(visit)
    visit.page.reload()
    visit.run("training")
    assert_holds_the_log(visit, run)
    assert smoothed(visit) == pytest.approx(live, rel=1e-6)
    # While nobody serves, a browser writes of each refused connection; nothing else went wrong.
    assert [one for one in visit.wrong if "net::ERR_" not in one] == []
    visit.close()


def test_the_list_comes_back_by_itself_too(browser: Browser, served: Dashboard):
    visit = entered(browser, served)
    rows = visit.rows()
    expect(visit.page.get_by_test_id("connection")).to_have_attribute("data-state", "live")
    served.kill()
    expect(visit.page.get_by_test_id("connection")).to_have_attribute("data-state", "away")
    folders.stopped(served.root, time.time())
    restart(served)
    expect(rows).to_have_count(2, timeout=20_000)
    visit.close()
