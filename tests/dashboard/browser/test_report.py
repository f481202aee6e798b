"""The page of a run in a real browser, from the disk: no request, no fault of access, no width too narrow."""

import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.dashboard import folders
from tests.dashboard.browser.watching import AXE
from weft.dashboard.report import write_report
from weft.dashboard.store import Store


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of three runs as files, by the name of the run."""
    root = tmp_path_factory.mktemp("pages")
    files = {}
    for build in (folders.finished, folders.hostile, folders.continual):
        store = Store(build(root, time.time()))
        files[build.__name__] = root / f"{build.__name__}.html"
        files[build.__name__].write_text(write_report(store, store.ids()[0]), "utf-8")
    return files


def opened(browser: Browser, file: Path, **options) -> tuple[Page, list[str]]:
    """The page, and what went wrong on it: requests to anywhere, dialogs, errors, refusals of its policy."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((file.as_uri(), "data:")) else None)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    return page, wrong


@pytest.mark.parametrize(
    ("name", "scheme"), [("finished", "light"), ("finished", "dark"), ("hostile", "light"), ("continual", "dark")]
)
def test_a_report_is_quiet_and_axe_finds_nothing(browser, pages: dict[str, Path], name: str, scheme: str):
    page, wrong = opened(browser, pages[name], color_scheme=scheme)
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("axe.run().then(told => told.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
    page.close()
    assert found == [] and wrong == []


def test_no_width_makes_the_page_scroll_sideways(browser, pages: dict[str, Path]):
    for file in pages.values():
        page, _ = opened(browser, file)
        for width in (360, 1280, 3840):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), (file.name, width)
        page.close()


def test_videos_play_from_the_page_itself_all_at_once(browser, pages: dict[str, Path]):
    page, wrong = opened(browser, pages["finished"])
    page.get_by_role("button", name="Play all").click()
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0)")
    assert page.locator("video").count() == 6 and wrong == []
    page.close()


def test_without_scripts_the_charts_and_words_are_all_there(browser, pages: dict[str, Path]):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["finished"].as_uri())
    assert page.locator("svg.plot").count() >= 5 and page.get_by_role("button").count() == 0
    context.close()
