"""A run's folder vanishes under its open page: the page says so, and does not accuse the server."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.dashboard import folders
from tests.dashboard.browser.watching import entered
from tests.dashboard.serving import Dashboard


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Dashboard]:
    (tmp_path / "runs").mkdir()
    folders.paused(tmp_path / "runs", time.time())
    with Dashboard(tmp_path / "runs", tmp_path / "state") as dashboard:
        yield dashboard


def test_a_run_whose_folder_was_deleted_is_told_as_gone_and_comes_back_with_it(browser: Browser, served: Dashboard):
    visit = entered(browser, served)
    visit.run("paused")
    sign = visit.page.locator(".sign")
    expect(sign).to_contain_text("Live")
    shutil.move(served.root / "paused", served.root.parent / "elsewhere")
    expect(sign).to_contain_text("No such run any more", timeout=10_000)
    expect(visit.page.get_by_test_id("state").first).to_contain_text("Paused")
    shutil.move(served.root.parent / "elsewhere", served.root / "paused")
    expect(sign).to_contain_text("Live", timeout=15_000)
