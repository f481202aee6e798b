"""weft dashboard: serve a page about the runs of a folder, to whoever has the token."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError, RunError, did_you_mean

if TYPE_CHECKING:
    import socket

    from weft.dashboard.launch import Standing
    from weft.dashboard.tokens import Token

PORT = 7020
API_PORT = 7010
FREE = 0  # as a port: any that is free
IDLE = 600  # seconds without watchers and living runs after which a dashboard that a training started ends
PAGE = "page"  # how the line with the URL begins


def run(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C. Exit code 0 also when this user's dashboard of the folder stands at that port already."""
    arguments = parser().parse_args(argv)
    root = runs_folder(arguments.runs)
    require_ui()

    from weft.dashboard.tokens import kept_token

    state = state_folder(os.environ)
    token, notice = kept_token(state, arguments.new_token)
    if notice:
        say(notice)
    if (older := already(root, arguments, state, token)) is not None:
        print(f"This folder has its dashboard already (process {older.pid}).")
        tell(root, older, token, os.environ)
        if arguments.open:
            webbrowser.open(older.url(token))
        return 0
    page, api = sockets(arguments, state)
    serve_here(arguments, root, state, token, (page, api))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of weft dashboard."""
    parser = argparse.ArgumentParser(prog="weft dashboard", description="Watch the runs of a folder in a browser.")
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), metavar="RUNS_DIR",
                        help="a folder of runs, or one run's (%(default)s)")  # fmt: skip
    parser.add_argument("--port", type=port, default=PORT, help="of the page; 0: any free one (%(default)s)")
    parser.add_argument("--api-port", type=api_port, metavar="PORT|none",
                        help=f"of the API for programs ({API_PORT}, with --port 0 any free one)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: all (%(default)s)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="a further name under which browsers reach it, such as a proxy's")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    parser.add_argument("--new-token", action="store_true", help="make a new token: older URLs and pages are void")
    parser.add_argument("--idle-exit", type=seconds, metavar="SECONDS",
                        help="end when for so long nobody watches and no run here lives")  # fmt: skip
    return parser


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, got '{text}'")
    return int(text)


def api_port(text: str) -> int | None:
    return NONE if text == "none" else port(text)


NONE = -1  # --api-port none


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got '{text}'")
    return value


def runs_folder(path: Path) -> Path:
    """The folder of runs. Raises ConfigError with the nearest one for what is none."""
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"RUNS_DIR: {path} is a file. Give the folder that holds your runs, or one run's folder.")
    there = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, sorted(name for name in there if not name.startswith(".")))
    hint = near if there else f"There is no folder '{path.parent}' either."
    raise ConfigError(f"RUNS_DIR: there is no folder '{path}'. {hint} weft train makes one: output in its config.")


def require_ui() -> None:
    """Raises ModuleNotFoundError, which the command line answers with the extra's name."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)


def state_folder(environment: Mapping[str, str]) -> Path:
    """Where a user's programs keep what they remember, by the XDG base directory specification."""
    base = environment.get("XDG_STATE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "weft"


def already(root: Path, arguments: argparse.Namespace, state: Path, token: "Token") -> "Standing | None":
    """This user's dashboard of the same folder at the same port. Raises RunError when it has another token."""
    from weft.dashboard.launch import all_standing

    same = [one for one in all_standing(state) if one.port == arguments.port and one.root == str(root.resolve())]
    for one in same:
        refuse_older_token(one, token)
    return same[0] if same else None


def refuse_older_token(standing: "Standing", token: "Token") -> None:
    if standing.mark != token.mark:
        raise RunError(
            f"process {standing.pid} serves this folder at port {standing.port} with an older token. "
            f"End it, and start it again: kill {standing.pid}"
        )


def sockets(arguments: argparse.Namespace, state: Path) -> "tuple[socket.socket, socket.socket | None]":
    """The page's and the API's. Raises ConfigError when one cannot be had."""
    page = opened("--port", arguments.host, arguments.port, state)
    number = arguments.api_port
    if number is None:
        number = API_PORT if arguments.port else FREE
    if number == NONE:
        return page, None
    try:
        return page, opened("--api-port", arguments.host, number, state)
    except BaseException:
        page.close()
        raise


def opened(option: str, host: str, number: int, state: Path) -> "socket.socket":
    from weft.dashboard.launch import all_standing, bound, is_taken

    try:
        return bound(host, number, option)
    except OSError as error:
        if not is_taken(error):
            raise
        ours = [one for one in all_standing(state) if number in (one.port, one.api_port)]
        who = f"your dashboard of {ours[0].root} (process {ours[0].pid})" if ours else "another program"
        further = ", or none for no API" if option == "--api-port" else ""
        raise ConfigError(
            f"{option}: {number} is taken by {who}. Choose another, such as {option} {number + 1}; 0 takes any that is "
            f"free{further}."
        ) from None


def serve_here(
    arguments: argparse.Namespace, root: Path, state: Path, token: "Token",
    places: "tuple[socket.socket, socket.socket | None]",
) -> None:  # fmt: skip
    """Serve in this process until it is told to end, noted where others of this user find it."""
    from weft.dashboard.launch import WILDCARDS, is_loopback, noted, reachable, standing_here
    from weft.dashboard.server import Serving, serve

    page, api = places
    ports = page.getsockname()[1], api.getsockname()[1] if api else None
    standing = standing_here(root, arguments.host, ports, token)
    own = {reachable(arguments.host).lower(), *(name.lower() for name in arguments.allow_host)}
    serving = Serving(
        root=root, page=page, api=api, token=token, hosts=frozenset(own), by_address=arguments.host in WILDCARDS,
        idle=arguments.idle_exit, say=say,
    )  # fmt: skip

    def ready() -> None:
        tell(root, standing, token, os.environ)
        if not is_loopback(arguments.host):
            say(f"--host {arguments.host}: whoever is on the way can read this, for it is plain http. ssh -L is safer.")
        print("Ctrl-C ends the dashboard; runs go on without it.", flush=True)
        if arguments.open:
            webbrowser.open(standing.url(token))

    with noted(standing, state):
        serve(serving, ready)


def tell(root: Path, standing: "Standing", token: "Token", environment: Mapping[str, str]) -> None:
    """Say where the page and the API are, and how to come there from elsewhere."""
    print(f"dashboard of {root}")
    print(f"  {PAGE}  {standing.url(token)}")
    if standing.api_port is not None:
        from weft.dashboard.launch import reachable

        secret = f"$(cat {shlex.quote(str(token.file))})" if token.file else token.text
        place = f"http://{reachable(standing.host)}:{standing.api_port}/api/training/status"
        print(f"  API   {place}")
        print(f'        curl -H "Authorization: Bearer {secret}" {place}')
    if line := tunnel(standing.port, environment):
        print(f"  from your own machine first: {line}, then the page's URL there")
    sys.stdout.flush()


def tunnel(number: int, environment: Mapping[str, str]) -> str:
    """The command that brings the port to where the user sits; '' when that is here."""
    connection = environment.get("SSH_CONNECTION", "").split()
    if len(connection) != 4:
        return ""
    user = environment.get("USER") or environment.get("LOGNAME") or "USER"
    return f"ssh -N -L {number}:127.0.0.1:{number} {user}@{connection[2] or platform.node()}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- Beside a training ---------------------------------------------------------------------------------------------


USUAL = "usual"  # weft train --dashboard, without a port


def start_beside(place: str, root: Path) -> None:
    """See that the folder has a dashboard in a session of its own, and print its URL. place: a port, or USUAL for the
    usual one, and any where that is taken. Raises WeftError."""
    if place != USUAL and not (place.isdecimal() and int(place) <= 65535):
        raise ConfigError(f"--dashboard: expected a port from 0 to 65535, or nothing, got '{place}'.")
    asked = None if place == USUAL else int(place)
    require_ui()

    from weft.dashboard.launch import all_standing
    from weft.dashboard.tokens import kept_token

    root.mkdir(parents=True, exist_ok=True)
    state = state_folder(os.environ)
    token, _ = kept_token(state)
    here = [one for one in all_standing(state) if one.root == str(root.resolve())]
    for one in here:
        if asked in (None, FREE, one.port):
            refuse_older_token(one, token)
            print(f"dashboard: {one.url(token)}", flush=True)
            return
    first = ["--port", str(PORT if asked is None else asked)]
    # Where another folder's dashboard has the usual API port, or the usual page port too, any that is free does.
    ports = [first, ["--port", "0"] if asked is None else [*first, "--api-port", "0"]]
    print(f"dashboard: {started_beside(root, ports)}", flush=True)


def started_beside(root: Path, ports: Sequence[Sequence[str]]) -> str:
    """The URL of the first that could be started. Raises RunError with what the last one said."""
    said = ""
    for options in ports:
        process, url, said = spawned(root, options)
        if url:
            return url
        process.wait()
    silent = f"it did not start, and dashboard.log does not say why. To see why: weft dashboard {root}"
    raise RunError(f"--dashboard: {said.removeprefix('error: ') or silent}")


def spawned(root: Path, options: Sequence[str]) -> tuple["subprocess.Popen[str]", str, str]:
    """Start one in the background; the process, its URL or '', and what it said otherwise. What it says later stands
    in dashboard.log in the folder of runs, which never holds the token."""
    log = root / "dashboard.log"
    with log.open("a", encoding="utf-8") as errors:
        began = errors.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "weft.cli.main", "dashboard", str(root), "--idle-exit", str(IDLE), *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    url = ""
    for line in process.stdout:  # it says no more once it serves
        word, _, rest = line.strip().partition(" ")
        url = rest.strip() if word == PAGE else url
        if line.startswith("Ctrl-C"):
            break
    process.stdout.close()
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(began)
        return process, url, text.read().strip()
