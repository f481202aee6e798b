"""Every page, of every kind of run: it opens, obeys no words of a run, fits each width, and can be read by all."""

import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.dashboard import folders
from tests.dashboard.browser.watching import TABS, Scheme, Visit, entered, watched
from tests.dashboard.serving import Dashboard

SCHEMES: tuple[Scheme, ...] = ("light", "dark")
PAGES = [*(("finished", tab) for tab in TABS), ("text", ""), ("text", "samples"), ("continual", ""), ("crashed", "")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """The gallery, but for the long run."""
    root = tmp_path_factory.mktemp("gallery")
    for name, build in folders.GALLERY.items():
        if name != "long":
            build(root / "runs", time.time())
    with Dashboard(root / "runs", root / "state") as dashboard:
        yield dashboard


@pytest.fixture
def visit(browser: Browser, served: Dashboard) -> Iterator[Visit]:
    """Of a page that must have been quiet."""
    here = entered(browser, served)
    yield here
    here.close()
    assert here.wrong == []


def names(visit: Visit) -> list[str]:
    return [row.get_attribute("data-id") or "" for row in visit.rows().all()]


def test_every_run_of_the_gallery_opens_and_says_its_state(visit: Visit, served: Dashboard):
    told = {run["id"]: run["state"] for run in served.page.ask("/api/runs").json["runs"]}
    assert sorted(names(visit)) == sorted(told) and len(told) == len(folders.GALLERY) - 1
    for run, state in told.items():
        visit.run(run)
        expect(visit.page.locator(".run-head").get_by_test_id("state")).to_have_attribute("data-state", state)


@pytest.mark.parametrize("tab", TABS[1:])
def test_a_run_with_nothing_yet_or_with_garbage_says_so_on_each_tab(visit: Visit, tab: str):
    for run in ("no-points", "one-point", "corrupt", "eight-gpus"):
        visit.run(run, tab)
        expect(visit.page.locator(".tab-body")).not_to_be_empty()


def test_words_of_a_run_are_shown_and_not_obeyed(visit: Visit):
    (name,) = (run for run in names(visit) if run.startswith("odd"))
    expect(visit.page.locator(f'[data-id="{name}"] a')).to_have_text(name)
    expect(visit.page.locator(f'[data-id="{name}"] .row-reason')).to_contain_text(folders.HOSTILE)
    for tab in TABS:
        visit.run(name, tab)
        expect(visit.page.get_by_test_id("run-name")).to_have_text(name)
        expect(visit.page.get_by_test_id("reason")).to_contain_text(folders.HOSTILE)
        if tab != "adapter":  # it has none of a run's words
            expect(visit.page.locator(".tab-body")).to_contain_text(folders.HOSTILE)
    visit.run(name)
    visit.page.get_by_test_id("more").click()
    expect(visit.page.get_by_role("heading", name="<script>")).to_be_visible()
    for part in ("entries", "matrix"):
        expect(visit.page.get_by_test_id(part)).to_contain_text(folders.HOSTILE)
    visit.run(name, "samples")
    visit.page.get_by_test_id("sample").first.click()
    expect(visit.page.get_by_test_id("viewer")).to_contain_text(folders.HOSTILE)
    visit.page.keyboard.press("Escape")
    visit.compare(name, "text")
    expect(visit.page.get_by_test_id("compare-config")).to_contain_text(folders.HOSTILE)
    assert visit.page.locator("main script, main img").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_on_any_page(browser: Browser, served: Dashboard, scheme: Scheme):
    visit = entered(browser, served, color_scheme=scheme)
    rules = ("color-contrast",) if scheme == "dark" else ()  # by which alone the two differ
    found = {}
    visit.rows()
    found["list"] = visit.faults(*rules)
    for run, tab in PAGES:
        visit.run(run, tab)
        found[f"{run} {tab}"] = visit.faults(*rules)
    visit.compare("finished", "stopped")
    found["compare"] = visit.faults(*rules)
    visit.close()
    assert {page: faults for page, faults in found.items() if faults} == {} and visit.wrong == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_where_nobody_may_enter(browser: Browser, served: Dashboard, scheme: Scheme):
    page = browser.new_context(color_scheme=scheme).new_page()
    visit = watched(page, f"http://127.0.0.1:{served.ports[0]}")
    page.goto(visit.base)
    assert visit.faults() == []
    visit.close()


def test_no_width_makes_a_page_scroll_sideways(visit: Visit):
    def too_wide(where: str) -> list[tuple[str, int]]:
        found = []
        for width in (360, 768, 1280, 3840):
            visit.page.set_viewport_size({"width": width, "height": 900})
            if not visit.page.evaluate("document.scrollingElement.scrollWidth <= document.documentElement.clientWidth"):
                found.append((where, width))
        return found

    (odd,) = (run for run in names(visit) if run.startswith("odd"))
    wide = too_wide("list")
    for run, tab in [*PAGES, ("eight-gpus", ""), (odd, ""), (odd, "samples"), (odd, "config"), (odd, "log")]:
        visit.run(run, tab)
        wide += too_wide(f"{run} {tab}")
    visit.compare("finished", "text", odd)
    assert wide + too_wide("compare") == []


SHIFTS = """window.shifted = 0;
new PerformanceObserver(list => { for (const one of list.getEntries()) window.shifted += one.value; })
    .observe({type: 'layout-shift', buffered: true});"""


@pytest.mark.parametrize("tab", ["", "samples"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_jumps_while_a_run_s_page_is_loaded(visit: Visit, width: int, tab: str):
    visit.page.set_viewport_size({"width": width, "height": 900})
    visit.page.add_init_script(SHIFTS)
    visit.run("finished", tab)
    visit.page.reload()
    visit.run("finished", tab)
    visit.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert visit.page.evaluate("shifted") < 0.02


def test_the_server_said_nothing_of_a_fault(visit: Visit, served: Dashboard):
    visit.rows()
    assert served.errors == ""
