"""A page of a real dashboard in Chromium, with a record of all that should not happen on it."""

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from playwright.sync_api import Browser, Dialog, Locator, Page, sync_playwright

from tests.dashboard.serving import Dashboard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(__file__).parents[1] / "vendor" / "axe.min.js"
EVIL = "evil.test"  # a name that somebody else's server gives this machine's address
NAMES = f"MAP {EVIL} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
# A view is drawn when its curves are, or when it says why it has none.
DRAWN = """() => performance.getEntriesByName('weft-curves').length > 0
    || [...document.querySelectorAll('.chart-empty')].some(e => e.checkVisibility() && !/^Rea/.test(e.textContent))"""
Scheme = Literal["light", "dark"]
COUNT = "() => performance.getEntriesByName('weft-curves').length"
READY = {
    "": DRAWN,
    "samples": "() => document.querySelector('[data-testid=samples] .tile, [data-testid=samples-empty]:not([hidden])')",
    "config": "() => document.querySelector('[data-testid=config-resolved]')",
    "adapter": "() => !/^Reading/.test(document.querySelector('[data-testid=health-empty]')?.textContent ?? 'Reading')",
    "log": "() => document.querySelector('[data-testid=log] div') || /^The run has said nothing/.test("
    "document.querySelector('.tab-log .empty')?.textContent ?? '')",
}
TABS = tuple(READY)


def every(claim: str) -> str:
    """JavaScript: whether it holds for every video v of the grid."""
    return f"() => [...document.querySelectorAll('.tile video')].every(v => {claim})"


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for which no host has a name but this machine."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", f"--host-resolver-rules={NAMES}"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@dataclass
class Visit:
    """A page. base: the dashboard's address. wrong: requests to elsewhere, errors, refusals of the policy, dialogs."""

    page: Page
    base: str
    wrong: list[str]

    def rows(self) -> Locator:
        """Go to the list of runs."""
        self.page.goto(f"{self.base}/#/")
        rows = self.page.get_by_test_id("run-row")
        rows.first.wait_for()
        return rows

    def run(self, run: str, tab: str = "") -> None:
        """Go to a part of a run's page, and wait until it is drawn."""
        address = f"{self.base}/#/run/{quote(run, safe='')}{f'/{tab}' if tab else ''}"
        if self.page.url != address:
            self.page.evaluate("performance.clearMeasures()")
            self.page.goto(address)
        self.page.locator(f".tab-{tab or 'overview'}").wait_for()
        self.page.wait_for_function(READY[tab])

    def compare(self, *runs: str) -> None:
        self.page.goto(f"{self.base}/#/compare?{'&'.join(f'runs={quote(run)}' for run in runs)}")
        self.page.get_by_test_id("samples").wait_for()

    @contextmanager
    def redrawn(self) -> Iterator[None]:
        """Wait until the curves have been asked for and drawn once more."""
        before = self.page.evaluate(COUNT)
        yield
        self.page.wait_for_function(f"before => ({COUNT})() > before", arg=before)

    def curve(self, chart: str = "loss") -> list[dict[str, str]]:
        """What a chart holds, by its own download: rows of curve, step, value, smoothed."""
        figure = self.page.get_by_test_id(f"chart-{chart}")
        with self.page.expect_download() as download:
            figure.locator(".chart-csv").click()
        with download.value.path().open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def faults(self, *rules: str) -> list[Any]:
        """What axe finds wrong for readers who cannot see well, or use no mouse. rules: the only ones to apply."""
        self.page.evaluate(AXE.read_text("utf-8"))
        how = {"runOnly": rules} if rules else {}
        found = "how => axe.run(how).then(told => told.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
        return self.page.evaluate(found, how)

    def dismiss(self, dialog: Dialog) -> None:
        self.wrong.append(dialog.message)
        dialog.dismiss()

    def beside(self) -> "Visit":
        """A second page of the same browser, which has the cookie."""
        other = watched(self.page.context.new_page(), self.base)
        other.page.goto(self.base)
        return other

    def close(self) -> None:
        self.page.context.close()


def entered(browser: Browser, served: Dashboard, place: str = "#/", **options: Any) -> Visit:
    """A context of its own, whose page was opened by the printed URL."""
    page = browser.new_context(**options).new_page()
    visit = watched(page, f"http://127.0.0.1:{served.ports[0]}")
    page.goto(f"{visit.base}/?token={served.token}{place}")
    return visit


def watched(page: Page, base: str) -> Visit:
    visit = Visit(page, base, [])
    ours = (f"{base}/", f"blob:{base}/", "data:")
    page.on("request", lambda r: visit.wrong.append(r.url) if not r.url.startswith(ours) else None)
    page.on("console", lambda said: visit.wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.wrong.append(str(error)))
    page.on("dialog", visit.dismiss)
    return visit
