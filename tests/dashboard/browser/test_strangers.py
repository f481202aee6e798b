"""Who has no token, a wrong name or another page in between reads nothing and commands nothing."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Browser, expect

from tests.dashboard import folders
from tests.dashboard.browser.watching import EVIL, Visit, entered, watched
from tests.dashboard.serving import Dashboard

BAIT = "<!doctype html><title>bait</title><form method=post enctype=text/plain><input name=a></form><iframe></iframe>"
READ = "url => fetch(url, {credentials: 'include'}).then(r => r.text(), () => 'nothing')"
WRITE = """([url, type]) => fetch(url, {method: 'POST', credentials: 'include', mode: type ? 'cors' : 'no-cors',
    headers: type ? {'Content-Type': type} : {}, body: '{"command": "stop", "arguments": {}}'})
    .then(answer => answer.type, () => 'refused')"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    root = tmp_path_factory.mktemp("strangers")
    folders.training(root / "runs", time.time())
    with Dashboard(root / "runs", root / "state") as dashboard:
        yield dashboard


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of another server on this machine: the same site for cookies, and another origin."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "index.html").write_text(BAIT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def stranger(browser: Browser, served: Dashboard) -> Visit:
    return watched(browser.new_context().new_page(), f"http://127.0.0.1:{served.ports[0]}")


def test_without_the_token_there_is_one_page_that_says_where_it_is(browser: Browser, served: Dashboard):
    visit = stranger(browser, served)
    for path in ("/", "/api/runs", "/static/app.js", "/media/training/samples/base/00.mp4"):
        reply = visit.page.goto(f"{visit.base}{path}")
        assert reply is not None and reply.status == 401, path
    visit.page.goto(f"{visit.base}/?token=wrong")
    expect(visit.page.locator("body")).to_contain_text("weft dashboard")
    visit.close()


def test_the_token_leaves_the_address_bar_and_the_place_stays(browser: Browser, served: Dashboard):
    visit = entered(browser, served, "#/run/training/config")
    expect(visit.page.get_by_test_id("config-resolved")).to_be_visible()
    assert visit.page.url == f"{visit.base}/#/run/training/config"
    (cookie,) = visit.page.context.cookies()
    assert cookie.get("httpOnly") and cookie.get("sameSite") == "Strict" and served.token not in str(cookie)
    assert served.token not in visit.page.content()
    visit.page.reload()
    expect(visit.page.get_by_test_id("config-resolved")).to_be_visible()
    assert visit.wrong == []
    visit.close()


def test_a_name_that_somebody_else_gave_this_machine_is_refused_even_with_the_token(browser, served: Dashboard):
    visit = stranger(browser, served)
    for path in ("/", f"/?token={served.token}", f"/api/runs?token={served.token}"):
        reply = visit.page.goto(f"http://{EVIL}:{served.ports[0]}{path}")
        assert reply is not None and reply.status == 403
    assert visit.page.context.cookies() == []
    visit.close()


def test_another_page_in_the_same_browser_reads_nothing_and_gives_no_command(browser, served: Dashboard, elsewhere):
    visit = entered(browser, served)
    visit.rows()
    page = visit.page.context.new_page()  # it has the cookie
    page.goto(elsewhere)
    runs, control = f"{visit.base}/api/runs", f"{visit.base}/api/runs/training/control"
    assert page.evaluate(READ, runs) == "nothing"
    for kind in ("application/json", "text/plain", ""):
        assert page.evaluate(WRITE, [control, kind]) == "refused"
    assert page.evaluate(STREAM, f"{visit.base}/api/live") == "error"
    page.evaluate("url => { const form = document.forms[0]; form.action = url; form.submit(); }", control)
    page.wait_for_url(control)
    expect(page.locator("body")).to_contain_text("may not ask here")
    assert not (served.root / "training" / "inbox").exists()
    visit.close()


STREAM = """url => new Promise(done => { const source = new EventSource(url, {withCredentials: true});
    source.onopen = () => done('open'); source.onerror = () => { source.close(); done('error'); }; })"""


def test_another_page_cannot_hold_the_dashboard_in_a_frame(browser: Browser, served: Dashboard, elsewhere: str):
    visit = entered(browser, served)
    visit.rows()
    page = visit.page.context.new_page()
    page.goto(elsewhere)
    page.evaluate("url => { document.querySelector('iframe').src = url; }", f"{visit.base}/")
    with page.expect_event("framenavigated"):
        pass
    assert page.frames[1].get_by_test_id("run-row").count() == 0
    visit.close()


def test_a_command_of_the_own_page_is_heard(browser: Browser, served: Dashboard):
    """The other side of it: what was refused above is not refused to everybody."""
    visit = entered(browser, served)
    visit.run("training")
    with visit.page.expect_response("**/control") as reply:
        visit.page.get_by_test_id("control-save").click()
    assert reply.value.status == 202 and visit.wrong == []
    assert len(list((served.root / "training" / "inbox").glob("*.json"))) == 1
    visit.close()
