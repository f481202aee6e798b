"""News of runs as server-sent events: one task reads what somebody watches, and every watcher takes from there what it
has not had yet, so that nothing is kept for one who does not read."""

import asyncio
import json
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from weft.dashboard.security import Receive, Scope, Send
from weft.dashboard.store import Store, UnknownRun
from weft.run.listeners import finite

EVERY = 1.0  # seconds between two looks at the folders
READ_AHEAD = 0.3  # seconds of each look in which logs are read that may be opened next
HEARTBEAT = 5.0  # seconds after which a silent stream sends a comment
PATIENCE = 20.0  # seconds that a client may take to read what it was sent
MOST_WATCHERS = 64
MOST_MISSED = 5_000  # steps; one who has missed more loads the curves again
RETRY = b"retry: 1000\n\n"  # milliseconds


def encoded(data: Any) -> str:
    """JSON in one line; null for what is not finite."""
    return json.dumps(finite(data), allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def event(name: str, data: str, position: int | None = None) -> bytes:
    mark = "" if position is None else f"id: {position}\n"
    return f"event: {name}\n{mark}data: {data}\n\n".encode()


class Hub:
    """Looks at what is watched once a second, in a thread, and wakes the watchers. say: where faults are told."""

    def __init__(self, store: Store, say: Callable[[str], None], every: float = EVERY) -> None:
        self.store, self.every, self._say = store, every, say
        self.summaries: dict[str, tuple[str, Mapping[str, Any]]] | None = None  # id -> as text, and as data
        self.runs: dict[str, tuple[str, int] | None] = {}  # id -> as text, and the position; None: it is gone
        self.closed = False
        self._used = time.monotonic()  # when somebody last asked or watched
        self._watchers: Counter[str | None] = Counter()
        self._wanted = asyncio.Event()
        self._told: set[str] = set()
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done at the next look

    @property
    def full(self) -> bool:
        return self._watchers.total() >= MOST_WATCHERS

    @property
    def idle(self) -> float:
        """Seconds since somebody last asked or watched."""
        return 0.0 if self._watchers else time.monotonic() - self._used

    def touch(self) -> None:
        self._used = time.monotonic()

    @contextmanager
    def watched(self, what: str | None) -> Iterator[None]:
        """Count a watcher of a run, or of the list: None."""
        self._watchers[what] += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._watchers[what] -= 1
            if not self._watchers[what]:
                del self._watchers[what]
                self._forget(what)
            self.touch()

    def _forget(self, what: str | None) -> None:
        """What was last seen is no news for who comes later."""
        if what is None:
            self.summaries = None
        else:
            self.runs.pop(what, None)

    async def look(self) -> None:
        """Look for ever, at what is watched."""
        while not self.closed:
            self._wanted.clear()
            if self._watchers:
                await self._once()
                self._wake()
            await until(self._wanted, self.every if self._watchers else None)

    async def _once(self) -> None:
        watched = list(self._watchers)
        seen = await asyncio.to_thread(self._read, watched)
        for what, found in seen.items():
            if what not in self._watchers:  # the last one has left meanwhile
                continue
            if what is None:
                self.summaries = found
            else:
                self.runs[what] = found

    def _read(self, watched: Sequence[str | None]) -> dict[str | None, Any]:
        """In a thread: how what is watched stands now. What cannot be read stays as it was, and the fault is told."""
        seen: dict[str | None, Any] = {}
        for what in watched:
            try:
                seen[what] = self._summaries() if what is None else self._run(what)
            except UnknownRun:
                seen[what] = None
            except Exception:
                self._complain(traceback.format_exc())
        return seen

    def _summaries(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        self.store.warm(READ_AHEAD)
        return {summary["id"]: (encoded(summary), summary) for summary in self.store.summaries()}

    def _run(self, run: str) -> tuple[str, int]:
        found = self.store.run(run)
        return encoded(found), found["position"]

    def _complain(self, lines: str) -> None:
        if lines not in self._told:  # each fault once, not each second
            self._told.add(lines)
            self._say(lines)

    def _wake(self) -> None:
        over, self.turn = self.turn, asyncio.get_running_loop().create_future()
        over.set_result(None)

    def close(self) -> None:
        """End all streams."""
        self.closed = True
        self._wanted.set()
        self._wake()


async def until(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, but no longer than so many seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
    if seconds is not None:  # somebody new watches: look at once, but not for each of a hundred who come together
        await asyncio.sleep(min(0.05, seconds))


class RunNews:
    """What a watcher of one run has not had yet."""

    def __init__(self, hub: Hub, run: str, position: int | None) -> None:
        self.hub, self.what, self._position, self._had = hub, run, position, ""

    async def __call__(self) -> AsyncIterator[bytes]:
        found = self.hub.runs.get(self.what)
        if found is None:
            return
        text, position = found
        if self._position is None:
            self._position = position
        if text != self._had:
            self._had = text
            yield event("run", text)
        while self._position != position:
            before = self._position
            for chunk in await asyncio.to_thread(self._since):
                yield chunk
            if self._position == before:  # nothing whole has come, or a file was replaced under our eyes
                return

    @property
    def over(self) -> bool:
        """Whether the run's folder is gone."""
        return self.what in self.hub.runs and self.hub.runs[self.what] is None

    def _since(self) -> list[bytes]:
        """In a thread: the next events. The position stands on the last of them, so that one who loses the connection
        in between misses none."""
        assert self._position is not None
        try:
            news = self.hub.store.since(self.what, self._position)
        except UnknownRun:
            return []
        self._position = news.position
        if news.reset or len(news.records) > MOST_MISSED:
            return [event("reset", "{}", news.position)]
        entries = [event("entry", encoded(entry)) for entry in news.entries]
        if not entries and not news.records:
            return []
        points = [{key: record.get(key) for key in POINT} for record in news.records]
        return [*entries, event("points", encoded({"points": points}), news.position)]


# Of a step's record; which items it had is nobody's business.
POINT = ("step", "time", "metrics", "seconds", "items", "memory")


class ListNews:
    """What a watcher of the list has not had yet; first the whole list, marked so."""

    what = None  # the list, and no run
    over = False

    def __init__(self, hub: Hub) -> None:
        self.hub, self._had, self._first = hub, {}, True

    async def __call__(self) -> AsyncIterator[bytes]:
        found = self.hub.summaries
        if found is None:
            return
        changed = [summary for run, (text, summary) in found.items() if self._had.get(run) != text]
        gone = [run for run in self._had if run not in found]
        self._had = {run: text for run, (text, _) in found.items()}
        if changed or gone or self._first:
            whole = {"whole": True} if self._first else {}
            self._first = False
            yield event("runs", encoded({"runs": changed, "gone": gone, **whole}))


class Stream:
    """A response that lasts: news as they come, a comment when there are none, until one side leaves."""

    def __init__(
        self, news: RunNews | ListNews, hub: Hub, heartbeat: float = HEARTBEAT, patience: float = PATIENCE
    ) -> None:
        self.news, self.hub, self.heartbeat, self.patience = news, hub, heartbeat, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body"})
            return
        left = asyncio.ensure_future(departure(receive))
        try:
            with self.hub.watched(self.news.what):
                async with asyncio.timeout(None) as limit:
                    await self._run(send, left, limit)
        except TimeoutError:  # it does not read: it may come again and have what it missed
            return
        finally:
            left.cancel()

    async def _run(self, send: Send, left: asyncio.Future[None], limit: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()

        async def give(chunk: bytes, more: bool = True) -> None:
            limit.reschedule(loop.time() + self.patience)
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
            limit.reschedule(None)

        await give(RETRY)
        spoke = loop.time()
        while not (left.done() or self.hub.closed or self.news.over):
            turn = self.hub.turn
            async for chunk in self.news():
                await give(chunk)
                spoke = loop.time()
            if loop.time() - spoke >= self.heartbeat:
                await give(b": here\n\n")
                spoke = loop.time()
            wait = max(0.0, spoke + self.heartbeat - loop.time())
            await asyncio.wait({left, turn}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        if not left.done():
            await give(b"", more=False)


async def departure(receive: Receive) -> None:
    """Until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
