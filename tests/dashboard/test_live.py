"""News of runs while they come: what is told, how soon, and that a killed server loses nothing of it."""

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboard.folders import corrupt, finished, training
from tests.dashboard.serving import Dashboard, Listener, Place
from tests.dashboard.written import RunWriter
from weft import events
from weft.dashboard.live import HEARTBEAT, Hub, ListNews, Stream
from weft.dashboard.security import Message
from weft.dashboard.store import Store
from weft.run.folder import born

CRASH_IS_SEEN = 3.0  # seconds


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live") / "runs"
    for builder in (finished, training, corrupt):
        builder(root, time.time())
    return root


@pytest.fixture(scope="module")
def place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Dashboard(root, tmp_path_factory.mktemp("state"), ("--port", "0", "--api-port", "none")) as served:
        yield served.page


def writing(root: Path, name: str) -> RunWriter:
    """A run that this process trains, as its folder says."""
    run = RunWriter(root / name, time.time() - 20, steps=1000)
    run.trains(alive=True)
    run.begin()
    run.beats("training", 0)
    return run


def test_a_list_begins_with_all_runs_and_then_tells_only_what_changed(root, place):
    stream = Listener(place, "/api/live")
    whole = stream.until("runs").data
    assert whole["whole"] and {run["id"] for run in whole["runs"]} >= {"finished", "training", "corrupt"}
    run = writing(root, "comes")
    told = stream.until("runs").data
    assert "comes" in {run["id"] for run in told["runs"]} and "whole" not in told
    assert "finished" not in {run["id"] for run in told["runs"]}
    (root / "comes").rename(root.parent / "went")
    while "comes" not in (told := stream.until("runs").data)["gone"]:
        pass
    assert told["gone"] == ["comes"]
    run.folder = root.parent / "went"
    stream.close()


def test_a_run_s_stream_tells_the_run_its_points_and_its_entries_as_they_come(root, place):
    run = writing(root, "told")
    position = place.position("told")
    stream = Listener(place, f"/api/live?run=told&after={position}")
    assert stream.until("run").data["state"] == "training"
    run.step(1)
    run.tell(events.Notice(text="look here"))
    entry = stream.until("entry").data
    assert (entry["kind"], entry["text"], entry["level"]) == ("notice", "look here", "info")
    points = stream.until("points")
    assert [point["step"] for point in points.data["points"]] == [1]
    fields = {"step", "time", "metrics", "seconds", "items", "memory"}  # and no names of items
    assert set(points.data["points"][0]) == fields
    assert int(points.id or "") > position
    stream.close()


def test_a_silent_stream_says_that_it_is_there_every_five_seconds(tmp_path):
    assert HEARTBEAT == 5.0
    sent: list[bytes] = []

    async def heard(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def leaves() -> Message:
        await asyncio.sleep(1.0)
        return {"type": "http.disconnect"}

    async def served() -> None:
        hub = Hub(Store(tmp_path), print)
        await Stream(ListNews(hub), hub, heartbeat=0.2)({"method": "GET"}, leaves, heard)

    asyncio.run(served())
    assert 3 <= sent.count(b": here\n\n") <= 5


def test_after_a_kill_and_a_restart_a_page_has_each_point_once(tmp_path):
    root, state = tmp_path / "runs", tmp_path / "state"
    run = writing(root, "live")
    had: list[int] = []
    with Dashboard(root, state) as served:
        options = ("--port", str(served.ports[0]), "--api-port", str(served.ports[1]))
        position = served.page.position("live")
        stream, last = Listener(served.page, f"/api/live?run=live&after={position}"), str(position)
        steps = iter(range(1, 1000))
        for _ in range(20):
            run.step(next(steps))
        for heard in stream:
            last = heard.id or last
            had += [point["step"] for point in heard.data["points"]] if heard.name == "points" else []
            if len(had) >= 20:
                break
        run.step(next(steps))
        served.kill()
        had += [p["step"] for heard in stream if heard.name == "points" for p in heard.data["points"]]
        for _ in range(30):
            run.step(next(steps))
        served.options = options
        token = served.token
        served.start()
        assert served.token == token
        run.step(next(steps))
        # The page asks again with its old address, and the browser says what it heard last.
        stream = Listener(served.page, f"/api/live?run=live&after={position}", Last_Event_ID=last)
        for heard in stream:
            had += [point["step"] for point in heard.data["points"]] if heard.name == "points" else []
            if had and had[-1] == 52:
                break
        assert had == list(range(1, 53))
        stream.close()


def test_a_resume_that_cut_the_curves_is_told_as_a_reset(root, place):
    run = writing(root, "cut")
    for step in range(1, 11):
        run.step(step)
    stream = Listener(place, f"/api/live?run=cut&after={place.position('cut')}")
    stream.until("run")
    run.begin(step=5)
    run.step(6)
    assert stream.until("reset").data == {}
    stream.close()


def test_a_crash_is_seen_within_three_seconds_though_no_file_changes(root, place):
    run = writing(root, "dies")
    with subprocess.Popen(["sleep", "60"]) as child:
        for path in (run.folder / "process.rank0.json", run.folder / "heartbeat.rank0.json"):
            kept = json.loads(path.read_text())
            path.write_text(json.dumps({**kept, "pid": child.pid, "born": born(child.pid)}))
        stream = Listener(place, f"/api/live?run=dies&after={place.position('dies')}")
        assert stream.until("run").data["state"] == "training"
        child.kill()
        killed = time.monotonic()
        while (heard := stream.until("run")).data["state"] == "training":
            pass
        assert heard.data["state"] == "crashed" and heard.at - killed < CRASH_IS_SEEN
        stream.close()


def test_garbage_in_a_log_delays_nothing_behind_it(root, place):
    position = place.position("corrupt")
    stream = Listener(place, f"/api/live?run=corrupt&after={position}")
    with (root / "corrupt" / "events.rank0.jsonl").open("ab") as log:
        log.write(b"\n\x00\xff\n" + b'{"event": []}\n[]\n')
    run = RunWriter.reopened(root / "corrupt", time.time())
    run.step(101)
    assert [point["step"] for point in stream.until("points").data["points"]] == [101]
    stream.close()


def test_one_who_has_missed_too_much_is_told_to_load_again(place):
    stream = Listener(place, "/api/live?run=corrupt&after=0")  # there are five MB of garbage in it
    assert stream.until("reset").data == {}
    stream.close()


@pytest.mark.parametrize(("query", "status"), [("run=absent", 404), ("run=..", 404), ("run=finished&after=x", 400)])
def test_a_stream_of_nothing_is_refused(place, query, status):
    assert Listener(place, f"/api/live?{query}").status == status


def test_a_stream_s_head_ends(place):
    reply = place.ask("/api/live", "HEAD")
    assert (reply.status, reply.body) == (200, b"") and reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"


def test_sixty_four_may_watch_and_the_next_is_told_so(tmp_path):
    (tmp_path / "runs").mkdir()
    with Dashboard(tmp_path / "runs", tmp_path / "state") as served:
        streams = [Listener(served.page, "/api/live") for _ in range(64)]
        for stream in streams:
            stream.until("runs")
        assert served.page.ask("/api/live").status == 503
        streams.pop().close()
        deadline = time.monotonic() + 5
        while Listener(served.page, "/api/live").status == 503 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.monotonic() < deadline
        code, seconds = served.end()  # with all of them open
        assert code == 0 and seconds < 3
        for stream in streams:
            stream.close()


def test_one_who_does_not_read_delays_nobody_else(root, place):
    deaf = socket.create_connection(("127.0.0.1", place.port))
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    asked = f"GET /api/live?run=loud&after=0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {place.token}\r\n\r\n"
    run = writing(root, "loud")
    deaf.sendall(asked.encode())
    for step in range(1, 4001):
        run.step(step)
    stream = Listener(place, "/api/live?run=loud&after=0")
    seen = 0
    while seen < 4000:
        seen = stream.until("points").data["points"][-1]["step"]
    began = time.monotonic()
    assert place.ask("/api/runs/finished").status == 200 and time.monotonic() - began < 2
    stream.close()
    deaf.close()


def test_one_who_does_not_read_is_dropped_and_makes_room(tmp_path):
    async def deaf(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn's, when the client's window stays full

    async def silence() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def served() -> float:
        hub = Hub(Store(tmp_path), print)
        began = time.monotonic()
        streams = [Stream(ListNews(hub), hub, patience=0.2) for _ in range(64)]
        all_of_them = asyncio.gather(*(stream({"method": "GET"}, silence, deaf) for stream in streams))
        await asyncio.sleep(0.05)
        assert hub.full
        await all_of_them
        assert not hub.full
        return time.monotonic() - began

    assert asyncio.run(served()) < 5
