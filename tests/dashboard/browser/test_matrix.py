"""The continual matrix in a real browser: a metric to choose, the untrained row apart, and experiments on a page."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.dashboard import folders
from tests.dashboard.browser.watching import AXE, Visit, entered
from tests.dashboard.serving import Dashboard
from tests.dashboard.streams import scored_stream
from tests.dashboard.test_continual import BETTER, WORSE
from weft.cli.main import main


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    """Of a page that must have been quiet."""
    folders.continual(tmp_path / "runs", time.time())
    with Dashboard(tmp_path / "runs", tmp_path / "state") as served:
        here = entered(browser, served)
        yield here
        here.close()
        assert here.wrong == []


def test_each_metric_can_be_chosen_and_the_untrained_row_is_of_nothing_learned(visit: Visit):
    visit.run("continual")
    table, choice = visit.page.get_by_test_id("matrix-table"), visit.page.get_by_test_id("matrix-metric")
    expect(table.locator("tbody tr")).to_have_count(5)
    expect(table.locator("tr.untrained td.future")).to_have_count(4)
    expect(table.locator("td.now")).to_have_count(4)
    expect(choice.locator("option")).to_have_text(["accuracy", "ece"])
    expect(table.locator("td.now").first).to_contain_text("0.900")
    choice.select_option("ece")
    expect(table.locator("td.now").first).to_contain_text("0.050")
    expect(choice).to_have_value("ece")
    expect(visit.page.get_by_test_id("matrix")).to_contain_text("ece: columns say")
    assert visit.faults() == []


def test_a_page_of_experiments_is_quiet_fits_a_phone_and_axe_finds_nothing(browser: Browser, tmp_path: Path):
    for seed in range(2):
        scored_stream(tmp_path / f"plain-seed{seed}", WORSE[seed], seed)
        scored_stream(tmp_path / f"er-seed{seed}", BETTER[seed], seed, data={"replay": {"size": 9, "batch": 4}})
    file, wrong = tmp_path / "all.html", list[str]()
    assert main(["compare", str(tmp_path), "--html", str(file)]) == 0
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.on("console", lambda message: wrong.append(message.text))
    page.goto(file.as_uri())
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("axe.run().then(told => told.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    page.close()
    assert found == [] and wrong == []
