"""One process that serves the page on one port and the API on another, until it is told to end."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from weft.dashboard.live import Hub
from weft.dashboard.routes import OVER, Api, api_app, page_app
from weft.dashboard.security import LOOPBACK, App, Gate, Guard
from weft.dashboard.store import Store
from weft.dashboard.tokens import Token

LAST_WORDS = 1  # seconds for answers that are under way when it ends
GLANCE = 5.0  # seconds between two looks for whether anything still needs this server


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and to whom. root: the folder of runs. page, api: bound sockets. hosts: further names of this
    server. by_address: whether all of the machine's addresses were bound. idle: seconds without watchers and living
    runs after which it ends; None: never. say: where faults and refusals are told."""

    root: Path
    page: socket.socket
    api: socket.socket | None
    token: Token
    hosts: frozenset[str]
    by_address: bool
    idle: float | None
    say: Callable[[str], None]

    def gate(self) -> Gate:
        cookie = f"weft_{self.page.getsockname()[1]}"  # cookies know no ports, and another may serve on this host
        return Gate(self.token, cookie, LOOPBACK | self.hosts, self.by_address)


class Server(uvicorn.Server):
    """uvicorn's server, with the signals left to us: there are two, and streams to end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(serving: Serving, ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C, SIGTERM or idleness. ready: called once both ports answer."""
    asyncio.run(serve_both(serving, ready))


async def serve_both(serving: Serving, ready: Callable[[], None]) -> None:
    stop = asyncio.Event()
    hear(stop)
    store = Store(serving.root)
    hub = Hub(store, serving.say)
    api = Api(store, hub)
    servers = [(server_of(page_app(api), serving, hub), serving.page)]
    if serving.api is not None:
        servers.append((server_of(api_app(api), serving, hub), serving.api))
    serves = [asyncio.create_task(server.serve(sockets=[place])) for server, place in servers]
    looks = asyncio.create_task(hub.look())
    ends: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait())]
    if serving.idle is not None:
        ends.append(asyncio.create_task(idleness(hub, store, serving.idle)))
    try:
        while not all(server.started for server, _ in servers):
            await asyncio.sleep(0.01)
        ready()
        await asyncio.wait([*serves, looks, *ends], return_when=asyncio.FIRST_COMPLETED)
    finally:
        hub.close()
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*serves, looks)
        for task in ends:
            task.cancel()


def server_of(app: App, serving: Serving, hub: Hub) -> Server:
    """A server without a log of its own: what matters is told by the guard."""
    return Server(
        uvicorn.Config(
            Guard(app, serving.gate(), serving.say, hub.touch),
            http="h11",  # the one that comes with uvicorn: the same parser wherever it is installed
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
    )


def hear(stop: asyncio.Event) -> None:
    """End at Ctrl-C, SIGTERM and a closed terminal."""
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))


async def idleness(hub: Hub, store: Store, seconds: float) -> None:
    """Return when for so long nobody has watched or asked, and no run here has lived."""
    while True:
        await asyncio.sleep(min(GLANCE, seconds / 4))
        if hub.idle < seconds:
            continue
        summaries = await asyncio.to_thread(store.summaries)
        if any(summary["state"] not in OVER for summary in summaries):
            hub.touch()
        elif hub.idle >= seconds:
            return
