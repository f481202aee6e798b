"""The dashboard's addresses: what a page or a program may ask about the runs of one folder, and tell their trainers."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from weft.dashboard.live import Hub, ListNews, RunNews, Stream, encoded
from weft.dashboard.media import media
from weft.dashboard.report import write_report
from weft.dashboard.store import Store, UnknownRun
from weft.errors import RunError, WeftError
from weft.run.inbox import checked, post

STATIC = Path(__file__).parent / "static"
LONGEST_BODY = 16_000  # bytes of a command
PACKED = Middleware(GZipMiddleware, minimum_size=1000, compresslevel=4)  # through a tunnel it counts
MOST_POINTS = 10_000
MOST_NAMES = 200  # series asked for at once
MOST_COMPARED = 16
MOST_LINES = 5_000
OVER = ("finished", "stopped", "crashed")  # states in which nobody reads commands


class Refused(Exception):
    """A request that cannot be answered as it was asked. sentence: says why."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence
        super().__init__(sentence)


def answer(data: Mapping[str, Any], status: int = 200) -> Response:
    return Response(encoded(data), status, media_type="application/json")


class Api:
    """Answers about the runs of one folder. Each plain method runs in a thread, for it reads files."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self.store, self.hub = store, hub

    def routes(self) -> list[BaseRoute]:
        """What both ports serve."""
        one: Mapping[str, Callable[[Request], Any]] = {
            "": self.run, "/series": self.series, "/samples": self.samples, "/config": self.config,
            "/health": self.health, "/scores": self.scores, "/log": self.log, "/report": self.report,
        }  # fmt: skip
        return [
            Route("/api/runs", self.runs, methods=["GET"], middleware=[PACKED]),
            *(Route("/api/runs/{id}" + rest, f, methods=["GET"], middleware=[PACKED]) for rest, f in one.items()),
            Route("/api/runs/{id}/control", self.control, methods=["POST"]),
            Route("/api/compare", self.compare, methods=["GET"], middleware=[PACKED]),
            Route("/api/training/status", self.status, methods=["GET"], middleware=[PACKED]),
            Route("/api/live", self.live, methods=["GET"]),
        ]

    def media(self, request: Request) -> Response:
        return media(self.store, request)

    def runs(self, request: Request) -> Response:
        root = str(self.store.root)
        return answer({"time": time.time(), "root": root, "runs": self.store.summaries()})

    def run(self, request: Request) -> Response:
        return answer(self.store.run(asked_run(request)))

    def series(self, request: Request) -> Response:
        names = request.query_params.getlist("names")
        if len(names) > MOST_NAMES:
            raise Refused(400, f"names: {len(names)} series at once are more than {MOST_NAMES}.")
        smooth = number(request, "smooth", 0.0, 1.0) or 0.0
        if smooth == 1:
            raise Refused(400, "smooth: 1 forgets nothing and learns nothing. Choose a number below it.")
        return answer(
            self.store.series(
                asked_run(request), names, number(request, "from"), number(request, "to"),
                count(request, "points", 1500, 2, MOST_POINTS), smooth, count(request, "rank", 0, 0, 1_000_000),
            )
        )  # fmt: skip

    def samples(self, request: Request) -> Response:
        return answer({"samples": self.store.samples(asked_run(request))})

    def config(self, request: Request) -> Response:
        return answer(self.store.config(asked_run(request)))

    def health(self, request: Request) -> Response:
        return answer(self.store.health(asked_run(request)))

    def scores(self, request: Request) -> Response:
        return answer(self.store.scores(asked_run(request)))

    def log(self, request: Request) -> Response:
        lines = count(request, "lines", 200, 1, MOST_LINES)
        return answer({"lines": self.store.log(asked_run(request), lines)})

    def report(self, request: Request) -> Response:
        run = asked_run(request)
        self.store.folder(run)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip(".-") or "run"
        kept = {"content-disposition": f'attachment; filename="{name}.html"'}
        return Response(write_report(self.store, run), headers=kept, media_type="text/html")

    def compare(self, request: Request) -> Response:
        runs = request.query_params.getlist("runs")
        if not 1 <= len(runs) <= MOST_COMPARED:
            raise Refused(400, f"runs: from 1 to {MOST_COMPARED} can be compared at once, not {len(runs)}.")
        return answer(self.store.compare(runs))

    def status(self, request: Request) -> Response:
        return answer(self.store.status(request.query_params.get("run")))

    async def control(self, request: Request) -> Response:
        command, arguments = asked_command(await whole_body(request))
        return await run_in_threadpool(self._post, asked_run(request), command, arguments)

    def _post(self, run: str, command: str, arguments: Mapping[str, Any]) -> Response:
        folder = self.store.folder(run)
        checked(command, arguments)
        state = self.store.summary(run)["state"]
        if state in OVER:
            raise Refused(409, f"Nobody trains here, so nobody would hear it: this run is {state}.")
        try:
            return answer({"id": post(folder, command, arguments, by="dashboard")}, 202)
        except RunError as deaf:
            raise Refused(409, str(deaf)) from None

    async def live(self, request: Request) -> Any:
        """The stream of one run, or of the list; from where a client stopped hearing it, when it says so."""
        if self.hub.full:
            raise Refused(503, "Too many pages watch already. Close some, then load this one again.")
        run = request.query_params.get("run")
        if run is None:
            return Stream(ListNews(self.hub), self.hub)
        await run_in_threadpool(self.store.folder, run)
        heard = request.headers.get("last-event-id") or request.query_params.get("after")
        if heard is not None and not re.fullmatch(r"\d{1,18}", heard):
            raise Refused(400, f"after: expected a position as the stream gave it, got '{heard[:40]}'.")
        return Stream(RunNews(self.hub, run, None if heard is None else int(heard)), self.hub)


def asked_run(request: Request) -> str:
    return unquote(request.path_params["id"])


def number(request: Request, name: str, least: float = -math.inf, most: float = math.inf) -> float | None:
    """A number of the query within bounds; None where it is not given. Raises Refused."""
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and least <= value <= most):
        bounds = f" from {least:g} to {most:g}" if math.isfinite(most) else ""
        raise Refused(400, f"{name}: expected a number{bounds}, got '{text[:40]}'.")
    return value


def count(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number of the query within bounds. Raises Refused."""
    value = number(request, name, least, most)
    if value is None:
        return default
    if value != int(value):
        raise Refused(400, f"{name}: expected a whole number, got {value:g}.")
    return int(value)


async def whole_body(request: Request) -> bytes:
    """The request's body. Raises Refused for one that is too large."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > LONGEST_BODY:
                raise Refused(413, f"A command has at most {LONGEST_BODY} bytes.")
    except ClientDisconnect:
        raise Refused(400, "The command did not come whole.") from None
    return body


def asked_command(body: bytes) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of a command. Raises Refused for what is none."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "The command is no JSON.") from None
    if not isinstance(data, dict) or not isinstance(data.get("command"), str):
        raise Refused(400, 'A command looks like {"command": "pause", "arguments": {}}.')
    arguments = data.get("arguments") or {}
    if not isinstance(arguments, dict):
        raise Refused(400, "arguments: expected names with values.")
    return data["command"][:40], arguments


def api_app(api: Api) -> Starlette:
    """What programs ask: the API alone."""
    return application(api.routes())


def page_app(api: Api) -> Starlette:
    """The page, its files and samples, and the API that it asks."""
    return application(
        [
            *api.routes(),
            Route("/media/{id}/{path:path}", api.media, methods=["GET"]),
            Route("/", front, methods=["GET"]),
            Mount("/static", StaticFiles(directory=STATIC), middleware=[PACKED]),
        ]
    )


def front(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


def application(routes: list[BaseRoute]) -> Starlette:
    def fault(request: Request, error: Exception) -> Response:
        status, sentence = problem(error)
        return answer({"error": sentence}, status)

    known = (UnknownRun, Refused, WeftError, HTTPException)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(known, fault))
    app.router.redirect_slashes = False
    return app


def problem(error: Exception) -> tuple[int, str]:
    """Status and sentence of what a client, or the state of a run, is to blame for."""
    match error:
        case Refused():
            return error.status, error.sentence
        case UnknownRun():
            return 404, str(error)
        case HTTPException(status_code=404):
            return 404, "There is nothing at this address."
        case HTTPException():
            return error.status_code, f"{error.detail}."
    return 400, str(error)
