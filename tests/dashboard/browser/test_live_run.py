"""Real trainings under an open page: one begins, counts, obeys; one is killed; one ends."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.dashboard.browser.trainers import Trainers, trainers
from tests.dashboard.browser.watching import Visit, entered, every
from tests.dashboard.serving import Dashboard
from weft.run.listeners import read_events

pytestmark = pytest.mark.slow
LOADED = 240_000  # ms that torch, a model and clips may take on a machine with other work
SOON = 20_000
ENDLESS = 1_000_000  # steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    with trainers(tmp_path_factory.mktemp("live") / "training") as started:
        yield started


@pytest.fixture(scope="module")
def served(trained: Trainers) -> Iterator[Dashboard]:
    runs = trained.root / "runs"
    runs.mkdir()
    with Dashboard(runs, trained.root / "state") as dashboard:
        yield dashboard


@pytest.fixture(scope="module")
def visit(browser: Browser, served: Dashboard) -> Iterator[Visit]:
    """One page for all: it is never loaded a second time."""
    here = entered(browser, served)
    yield here
    loads = here.page.evaluate("performance.getEntriesByType('navigation').length")
    here.close()
    assert here.wrong == [] and loads == 1


@pytest.fixture(scope="module")
def training(visit: Visit, trained: Trainers) -> str:
    """A run that goes on until it is told to stop."""
    expect(visit.page.get_by_test_id("no-runs")).to_be_visible()
    trained.start("endless", ENDLESS)
    expect(row(visit, "endless").get_by_test_id("state")).to_have_attribute("data-state", "training", timeout=LOADED)
    return "endless"


def row(visit: Visit, run: str) -> Locator:
    return visit.page.locator(f'[data-testid=run-row][data-id="{run}"]')


def state(visit: Visit) -> Locator:
    return visit.page.locator(".run-head").get_by_test_id("state")


STEP = r"() => Number(document.querySelector('[data-testid=step] .fact-value').textContent.replace(/\D/g, ''))"


def steps(visit: Visit) -> int:
    """As the run's page says."""
    return visit.page.evaluate(STEP)


def grows(visit: Visit) -> None:
    visit.page.wait_for_function(f"before => ({STEP})() > before", arg=steps(visit))


def test_a_run_that_begins_appears_in_the_open_list_and_counts_its_steps(visit: Visit, training: str):
    progress = row(visit, training).locator(".row-steps span").first
    first = progress.inner_text()
    expect(progress).not_to_have_text(first)
    assert progress.inner_text().endswith("/ 1\u202f000\u202f000")


def test_its_curve_goes_on_by_itself(visit: Visit, training: str):
    visit.run(training)
    before = visit.curve()
    grows(visit)
    after = visit.curve()
    assert int(after[-1]["step"]) > int(before[-1]["step"])
    assert float(after[-1]["value"]) > 0


def test_pause_resume_save_and_rate_are_done_and_told(visit: Visit, training: str, served: Dashboard):
    visit.run(training)
    press, asked = visit.page.get_by_test_id, visit.page.get_by_test_id("asked")
    press("control-pause").click()
    expect(state(visit)).to_have_attribute("data-state", "paused", timeout=SOON)
    expect(press("control-pause")).to_have_text("Resume")
    at = logged(served, training, "step")[-1]["step"]
    visit.page.wait_for_function(f"at => ({STEP})() === at", arg=at)
    press("control-save").click()
    expect(asked).to_contain_text("checkpoint", timeout=SOON)
    assert (served.root / training / "checkpoints" / f"global_step_{at}").is_dir()
    press("control-rate").click()
    visit.page.locator("#rate-value").fill("5e-4")
    press("rate-send").click()
    expect(asked).to_contain_text("0.0005", timeout=SOON)
    press("control-pause").click()
    expect(state(visit)).to_have_attribute("data-state", "training", timeout=SOON)
    grows(visit)
    controls = visit.page.locator("[data-testid=entry][data-kind=control]")
    expect(controls.filter(has_text="0.0005")).to_have_count(1)
    done = [(one["command"], one["done"]) for one in logged(served, training, "control")]
    assert done == [("pause", True), ("save", True), ("rate", True), ("resume", True)]


def test_a_sample_that_is_asked_for_comes_into_the_open_grid(visit: Visit, training: str):
    visit.run(training, "samples")
    tiles = visit.page.get_by_test_id("sample")
    before = tiles.count()
    visit.page.get_by_test_id("control-sample").click()
    expect(tiles).to_have_count(before + 1, timeout=SOON)
    visit.page.wait_for_function(every("v.readyState > 1"))


def test_stop_asks_once_more_and_then_saves_and_ends(visit: Visit, training: str, served: Dashboard):
    visit.run(training)
    press = visit.page.get_by_test_id
    press("control-stop").click()
    visit.page.get_by_role("button", name="Keep training").click()
    expect(press("stop-dialog")).to_have_count(0)
    grows(visit)
    press("control-stop").click()
    press("stop-sure").click()
    expect(state(visit)).to_have_attribute("data-state", "stopped", timeout=SOON)
    expect(press("control-pause")).to_have_attribute("aria-disabled", "true")
    assert logged(served, training, "run_ended")[-1]["outcome"] == "stopped"


def test_a_killed_training_is_shown_as_crashed_within_ten_seconds_with_its_reason(visit: Visit, trained: Trainers):
    visit.page.goto(f"{visit.base}/#/")
    pid = trained.start("doomed", ENDLESS)
    listed = row(visit, "doomed").get_by_test_id("state")
    expect(listed).to_have_attribute("data-state", "training", timeout=LOADED)
    own = visit.beside()  # its own page, as open as the list
    own.run("doomed")
    expect(state(own)).to_have_attribute("data-state", "training")

    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    for sign in (listed, state(own)):
        left = 10 - (time.monotonic() - killed)
        expect(sign).to_have_attribute("data-state", "crashed", timeout=1000 * max(0.1, left))
    print(f"shown as crashed after {time.monotonic() - killed:.1f} s")
    expect(row(visit, "doomed").locator(".row-reason")).to_contain_text("killed")
    expect(own.page.get_by_test_id("reason")).to_contain_text("killed")
    expect(own.page.get_by_test_id("reason-log")).to_be_visible()
    assert own.wrong == []
    own.page.close()


def test_a_training_that_ends_is_shown_as_finished(visit: Visit, trained: Trainers):
    visit.page.goto(f"{visit.base}/#/")
    trained.start("short", 3)
    expect(row(visit, "short").get_by_test_id("state")).to_have_attribute("data-state", "finished", timeout=LOADED)
    visit.run("short")
    expect(visit.page.get_by_test_id("share")).to_contain_text("100")
    assert [int(one["step"]) for one in visit.curve() if one["curve"] == "train"] == [1, 2, 3]


def logged(served: Dashboard, run: str, kind: str) -> list[dict]:
    return [one for one in read_events(served.root / run / "events.rank0.jsonl") if one["event"] == kind]
