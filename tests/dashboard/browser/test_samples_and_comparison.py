"""Samples play in step, large and small; two runs are compared at an address that can be sent."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import yaml
from playwright.sync_api import Browser, expect

from tests.dashboard import folders
from tests.dashboard.browser.watching import Visit, entered, every
from tests.dashboard.serving import Dashboard

FRAME = 1 / 8  # s, of the gallery's videos
# For a second: the widest difference of two videos' times, wherever none of them is on its way to another place.
APART = """() => new Promise(done => {
    const all = [...document.querySelectorAll('.tile video')], seen = [], begin = performance.now();
    const look = () => {
        const times = all.map(v => v.currentTime);
        if (all.every(v => !v.seeking && !v.paused)) seen.push(Math.max(...times) - Math.min(...times));
        performance.now() - begin < 1000 || seen.length < 3 ? requestAnimationFrame(look) : done(seen);
    };
    look(); })"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    root = tmp_path_factory.mktemp("samples")
    for name in ("one", "two"):
        folders.finished(root / "runs", time.time(), name)
    change(root / "runs" / "two" / "config.yaml")
    with Dashboard(root / "runs", root / "state") as dashboard:
        yield dashboard


def change(file: Path) -> None:
    """Another rate and another rank."""
    config = yaml.safe_load(file.read_text())
    config["optimizer"]["lr"] = 3e-4
    config["adapter"]["rank"] = 32
    file.write_text(yaml.safe_dump(config))


@pytest.fixture
def visit(browser: Browser, served: Dashboard) -> Iterator[Visit]:
    here = entered(browser, served, viewport={"width": 1280, "height": 900})
    yield here
    here.close()
    assert here.wrong == []


def test_all_videos_of_the_grid_play_in_step(visit: Visit):
    visit.run("one", "samples")
    expect(visit.page.locator(".tile video")).to_have_count(6)
    visit.page.wait_for_function(every("v.readyState > 1"))
    visit.page.wait_for_function(every("!v.paused && v.currentTime > 0"))
    assert median(visit.page.evaluate(APART)) < FRAME
    visit.page.get_by_test_id("play").click()
    visit.page.wait_for_function(every("v.paused && !v.seeking"))
    visit.page.get_by_test_id("scrubber").fill("0.5")
    visit.page.wait_for_function(every(f"Math.abs(v.currentTime - 0.5) < {FRAME / 2}"))


def test_a_sample_opens_large_beside_the_base_and_is_walked_by_keyboard(visit: Visit):
    visit.run("one", "samples")
    visit.page.get_by_test_id("sample").nth(2).click()
    viewer, place = visit.page.get_by_test_id("viewer"), visit.page.get_by_test_id("viewer-place")
    expect(place).to_contain_text("step 200")
    visit.page.keyboard.press("ArrowLeft")
    expect(place).to_contain_text("step 100")
    visit.page.keyboard.press("ArrowDown")
    expect(place).to_contain_text("prompt 2 of 2")
    for mode, shots in (("beside", 2), ("wipe", 2), ("one", 1)):
        viewer.locator(f"[data-mode={mode}]").click()
        expect(viewer.locator("figure:visible")).to_have_count(shots)
    assert visit.faults() == []
    visit.page.keyboard.press("Escape")
    expect(viewer).to_have_count(0)


def test_two_runs_chosen_in_the_list_are_compared_at_an_address_that_can_be_sent(visit: Visit, served: Dashboard):
    visit.rows()
    for name in ("one", "two"):
        visit.page.get_by_label(f"Choose {name} for comparison").check()
    visit.page.get_by_test_id("compare").click()
    expect(visit.page.get_by_test_id("compare-run")).to_have_text(["one", "two"])
    visit.page.get_by_test_id("samples").wait_for()
    assert {row["curve"] for row in visit.curve("train-loss")} == {"one", "two"}
    keys = visit.page.locator("[data-testid=compare-config] tbody th")
    told = [one["key"] for one in served.page.ask("/api/compare?runs=one&runs=two").json["differing"]]
    expect(keys).to_have_text(told)
    assert {"optimizer.lr", "adapter.rank"} <= set(told) <= {"optimizer.lr", "adapter.rank", "name"}
    made = visit.page.locator("[data-testid=compare-samples] td .muted")
    expect(made).to_have_text(["step 200"] * 4)
    expect(visit.page.locator("[data-testid=compare-samples] .tile video")).to_have_count(4)
    visit.page.get_by_test_id("compare-step").press("Home")
    expect(made).to_have_text(["step 100"] * 4)
    visit.page.get_by_test_id("compare-log").check()
    address = visit.page.url
    visit.page.goto("about:blank")
    visit.page.goto(address)
    expect(visit.page.get_by_test_id("compare-run")).to_have_text(["one", "two"])
    expect(made).to_have_text(["step 100"] * 4)
    expect(visit.page.get_by_test_id("compare-log")).to_be_checked()


def test_the_config_page_shows_what_differs_from_another_run(visit: Visit):
    visit.run("one", "config")
    visit.page.get_by_test_id("config-against").select_option("two")
    expect(visit.page.get_by_test_id("config-only")).to_be_visible()
    rows = visit.page.locator("[data-testid=config-resolved] tbody tr")
    for key, *values in (("adapter.rank", "16", "32"), ("optimizer.lr", "0.0001", "0.0003")):
        row = rows.filter(has=visit.page.get_by_text(key, exact=True))
        expect(row.locator("th, td")).to_have_text([key, *values])  # once the other run's config has come


def test_where_motion_is_unwelcome_nothing_plays_by_itself(browser: Browser, served: Dashboard):
    visit = entered(browser, served, reduced_motion="reduce")
    visit.run("one", "samples")
    visit.page.wait_for_function(every("v.readyState > 1"))
    assert visit.page.evaluate(every("v.paused"))
    visit.close()
