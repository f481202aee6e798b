"""The dashboard as a process: every address is locked, both ports answer, and it bears whatever a folder holds."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.routing import Mount, Route

from tests.dashboard.folders import corrupt, crashed, eight_gpus, hostile, text, training
from tests.dashboard.serving import Dashboard
from weft.dashboard.live import Hub
from weft.dashboard.routes import STATIC, Api, api_app, page_app
from weft.dashboard.store import Store

BUILDERS = (training, crashed, corrupt, hostile, text, eight_gpus)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server") / "runs"
    for builder in BUILDERS:
        builder(root, time.time())
    (root / "empty").mkdir()
    (root / "garbage").mkdir()
    (root / "garbage" / "config.yaml").write_bytes(b"\xff\x00: [")
    (root / "garbage" / "events.rank0.jsonl").write_bytes(b"\x00" * 100)
    (root / "garbage" / "process.rank0.json").write_text('{"pid": "x"')
    return root


@pytest.fixture(scope="module")
def served(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with Dashboard(root, tmp_path_factory.mktemp("state")) as dashboard:
        yield dashboard


def addresses() -> list[tuple[bool, str, str]]:
    """(on the page's port alone, method, path) of every route there is, so that a new one cannot be forgotten."""

    async def made() -> tuple[list, list]:
        store = Store(Path(__file__).parent)
        api = Api(store, Hub(store, print))
        return page_app(api).routes, api_app(api).routes

    page, own = asyncio.run(made())
    found = []
    for route in page:
        assert isinstance(route, Mount | Route)
        shared = route.path in [other.path for other in own]
        path = route.path.replace("{id}", "training").replace("{path:path}", "samples/step_000000/00.mp4")
        methods = ["GET"] if isinstance(route, Mount) else sorted(route.methods or ())
        found += [(not shared, m, path + ("/app.js" if isinstance(route, Mount) else "")) for m in methods]
    return found


ADDRESSES = addresses()
PAGE_HEADERS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}  # fmt: skip


def test_every_address_is_locked_without_the_token_and_for_strangers(served):
    strangers = [
        (401, {"Authorization": None}),
        (401, {"Authorization": "Bearer wrong"}),
        (403, {"Host": "evil.example"}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"}),
    ]
    assert len(ADDRESSES) > 25
    for only_page, method, path in ADDRESSES:
        for place in [served.page] + [served.api] * (not only_page):
            for status, headers in strangers:
                body = b"{}" if method == "POST" else None
                reply = place.ask(path, method, body, **{"Content_Type": "application/json", **headers})
                expected = 403 if method == "POST" and headers == {"Authorization": None} else status
                expected = 403 if method == "POST" and status == 401 else expected
                assert reply.status == expected, (method, path, headers)
                assert PAGE_HEADERS.items() <= dict(reply.headers).items(), path
                assert reply.headers["cache-control"] == "no-store"


def test_every_address_that_is_read_answers_who_has_the_token(served):
    for only_page, method, path in ADDRESSES:
        if method != "HEAD" or "compare" in path:
            continue
        for place in [served.page] + [served.api] * (not only_page):
            reply = place.ask(path, method)
            assert reply.status == 200, (path, reply.body)
            assert "default-src 'self'" in reply.headers["content-security-policy"]
            assert "unsafe" not in reply.headers["content-security-policy"]
            assert PAGE_HEADERS.items() <= dict(reply.headers).items()


def test_the_api_s_port_has_no_page_no_files_and_no_samples(served):
    for only_page, method, path in ADDRESSES:
        if only_page:
            assert served.api.ask(path, method).status == 404


def test_the_url_s_token_becomes_a_cookie_and_leaves_the_address(served):
    first = served.page.ask(f"/?x=1&token={served.token}", Authorization=None)
    assert (first.status, first.headers["location"]) == (303, "/?x=1")
    assert re.fullmatch(rf"weft_{served.ports[0]}=[0-9a-f]{{64}}; Path=/; HttpOnly; SameSite=Strict",
                        first.headers["set-cookie"])  # fmt: skip
    assert served.token not in first.headers["set-cookie"]
    assert served.page.ask("/", Authorization=None, Cookie=first.cookie).status == 200
    assert served.page.ask("/api/runs", Authorization=None, Cookie=f"a=b; {first.cookie}").status == 200
    assert served.page.ask("/?token=wrong", Authorization=None).status == 401


def test_a_link_on_another_page_opens_it_though_browsers_hold_strict_cookies_back_on_redirects(served):
    visit = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Authorization": None}
    first = served.page.ask(f"/?token={served.token}", **visit)
    assert first.status == 200 and b'content="0;url=/"' in first.body and "set-cookie" in first.headers


def test_people_without_the_token_are_told_where_it_stands_and_programs_too(served):
    person = served.page.ask("/", Authorization=None, Accept="text/html,*/*")
    assert b"weft dashboard" in person.body and person.headers["content-type"].startswith("text/html")
    assert "weft dashboard" in served.page.ask("/api/runs", Authorization=None).json["error"]


def test_page_and_files_are_asked_for_again_and_sent_only_when_they_changed(served):
    for path in ("/", "/static/app.js"):
        first = served.page.ask(path)
        assert first.headers["cache-control"] == "no-cache"
    again = served.page.ask("/static/app.js", If_None_Match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")


def test_the_whole_front_end_comes_in_less_than_200_kilobytes(served):
    files = [path for path in STATIC.rglob("*") if path.suffix in (".html", ".css", ".js", ".svg")]
    places = [f"/static/{path.relative_to(STATIC).as_posix()}" for path in files if path.name != "report.css"]
    assert len(places) > 20
    assert sum(len(served.page.ask(place, Accept_Encoding="gzip").body) for place in places) < 200_000


def test_the_runs_are_all_there_whatever_their_folders_hold(served):
    listed = served.page.ask("/api/runs").json
    states = {run["id"]: run["state"] for run in listed["runs"]}
    assert states["training"] == "training" and states["crashed"] == "crashed" and "garbage" in states
    assert "empty" not in states and listed["root"] == str(served.root)


def test_every_run_answers_every_question_without_a_fault(served):
    for run in [run["id"] for run in served.page.ask("/api/runs").json["runs"]]:
        for part in ("", "/series?names=train/loss", "/samples", "/config", "/health", "/scores", "/log", "/report"):
            reply = served.page.ask(f"/api/runs/{quote(run, safe='')}{part}")
            assert reply.status == 200, (run, part, reply.body)
    assert served.page.ask("/api/compare?runs=training&runs=corrupt").status == 200
    assert "Traceback" not in served.errors


def test_the_status_of_c6_lists_every_gpu_on_both_ports(served):
    on_page, on_api = (place.ask("/api/training/status").json for place in (served.page, served.api))
    assert on_page["format"] == 1 and len(on_page["gpus"]) >= 8
    assert {gpu["run"] for gpu in on_api["gpus"]} == {gpu["run"] for gpu in on_page["gpus"]}
    one = served.api.ask("/api/training/status?run=eight-gpus").json["gpus"]
    assert [gpu["number"] for gpu in one] == list(range(8))


@pytest.mark.parametrize(
    "path",
    ["/api/runs/absent", "/api/runs/..%2F..", "/api/runs/%2e%2e", "/api/runs/a/b", "/api/none", "/none",
     "/api/runs/%00", "/api/runs/training/none", "/api/training/status?run=absent", "/api/compare?runs=absent"],
)  # fmt: skip
def test_what_is_not_there_is_404_with_a_sentence(served, path):
    reply = served.page.ask(path)
    assert reply.status == 404 and reply.json["error"].endswith((".", "?"))


@pytest.mark.parametrize(
    "query",
    ["points=10001", "points=1", "points=x", "points=10.5", "smooth=1", "smooth=-1", "from=nan", "to=inf", "rank=-1",
     "&".join(["names=a"] * 201)],
)  # fmt: skip
def test_odd_questions_are_400_with_a_sentence(served, query):
    reply = served.page.ask(f"/api/runs/training/series?names=train/loss&{query}")
    assert reply.status == 400 and reply.json["error"].endswith(".")


def test_a_report_is_a_file_to_keep(served):
    reply = served.page.ask(f"/api/runs/{quote('training')}/report")
    assert reply.headers["content-disposition"] == 'attachment; filename="training.html"'
    assert reply.body.startswith(b"<!doctype html>")


def test_a_command_reaches_the_trainer_s_inbox(served, root):
    reply = served.page.tell("training", {"command": "rate", "arguments": {"lr": 5e-5}})
    assert reply.status == 202
    letter = json.loads((root / "training" / "inbox" / f"{reply.json['id']}.json").read_text())
    assert (letter["command"], letter["arguments"]["lr"], letter["by"]) == ("rate", 5e-5, "dashboard")


def test_a_page_commands_with_its_cookie_and_no_other_page_does(served):
    cookie = served.page.ask(f"/?token={served.token}", Authorization=None).cookie
    own = {"Authorization": None, "Cookie": cookie, "Origin": f"http://127.0.0.1:{served.ports[0]}"}
    assert served.page.tell("training", {"command": "save"}, **own).status == 202
    assert served.page.tell("training", {"command": "save"}, **{**own, "Origin": "http://evil.example"}).status == 403
    assert served.page.tell("training", {"command": "save"}, **{**own, "Origin": None}).status == 403
    assert served.page.tell("training", {"command": "save"}, **own, Content_Type="text/plain").status == 415


@pytest.mark.parametrize(
    ("run", "command", "status"),
    [
        ("crashed", {"command": "pause"}, 409), ("training", {"command": "pauze"}, 400), ("training", b"{", 400),
        ("training", {"command": "rate", "arguments": {"lr": -1}}, 400), ("training", [], 400),
        ("training", {"command": "pause", "arguments": [1]}, 400), ("absent", {"command": "pause"}, 404),
        ("training", b"[" * 10_000, 400), ("training", b" " * 20_000, 413),
    ],
)  # fmt: skip
def test_what_no_trainer_would_hear_or_understand_is_refused_with_a_sentence(served, run, command, status):
    reply = served.page.tell(run, command)
    assert reply.status == status and reply.json["error"].endswith((".", "?"))


def test_other_methods_and_very_long_addresses_are_refused(served):
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert served.page.ask("/api/runs", method, b"{}", Content_Type="application/json").status == 405
    assert served.page.ask("/" + "a" * 5_000).status == 414


def test_nonsense_on_the_wire_ends_nobody(served):
    for words in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.ports[0]), timeout=5) as wire:
            wire.sendall(words)
            first = wire.recv(200).split(b"\r\n")[0]
            assert first.split()[1] in (b"400", b"403")
    assert served.page.ask("/").status == 200


def test_nothing_was_said_of_faults(served):
    assert "Traceback" not in served.errors and served.token not in served.errors
