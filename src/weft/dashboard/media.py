"""Samples of a run as files for the browser: nothing else of the folder, and nothing outside of it."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from weft.dashboard.store import Store, UnknownRun

KINDS: Mapping[str, str] = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
FORBIDDEN = ("/", "\\", "\0")


class Absent(Exception):
    """There is no such sample, or it may not be shown: both look the same from outside."""


def sample_file(run: Path, path: str) -> Path:
    """The file below the run's samples that an undecoded path names. Raises Absent."""
    parts = [unquote(part) for part in path.split("/")]
    if parts[0] != "samples" or any(is_odd(part) for part in parts):
        raise Absent(path)
    inside = run.resolve() / "samples"
    try:
        found = inside.joinpath(*parts[1:]).resolve()
        whole = found.is_relative_to(inside) and found.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a circle of links
        raise Absent(path) from None
    if not whole or found.suffix.lower() not in KINDS:
        raise Absent(path)
    return found


def is_odd(part: str) -> bool:
    return part in ("", ".", "..") or any(letter in part for letter in FORBIDDEN)


def media(store: Store, request: Request) -> Response:
    """GET /media/{id}/samples/...: a part of the file where the browser asks for one, as it does to seek."""
    try:
        found = sample_file(store.folder(unquote(request.path_params["id"])), request.path_params["path"])
    except (UnknownRun, Absent):
        return Response('{"error": "There is no such sample."}', 404, media_type="application/json")
    if "," in request.headers.get("range", ""):  # many parts at once cost more than they are worth: it gets the whole
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    return FileResponse(found, media_type=KINDS[found.suffix.lower()])
