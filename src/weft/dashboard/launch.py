"""Where a dashboard stands: the sockets that it opens, and the note by which its user finds it again."""

import errno
import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from weft.dashboard.tokens import Token
from weft.durable import write_whole
from weft.errors import ConfigError
from weft.run.folder import born, is_alive

NOTES = "dashboards"  # folder of the notes, in the user's state folder


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A dashboard that serves. root: the folder of its runs. host: as it was bound. mark: of its token."""

    pid: int
    born: str | None
    node: str
    root: str
    host: str
    port: int
    api_port: int | None
    mark: str

    @property
    def file(self) -> str:
        return f"{self.node}-{self.port}.json"

    def url(self, token: Token) -> str:
        """The page's address, which opens it."""
        return f"http://{reachable(self.host)}:{self.port}/?token={token.text}"

    def lives(self) -> bool:
        return self.node == platform.node() and is_alive(self.pid, self.born)


def standing_here(root: Path, host: str, ports: tuple[int, int | None], token: Token) -> Standing:
    """This process as the dashboard of a folder."""
    return Standing(
        pid=os.getpid(), born=born(os.getpid()), node=platform.node(), root=str(root.resolve()), host=host,
        port=ports[0], api_port=ports[1], mark=token.mark,
    )  # fmt: skip


def all_standing(state: Path) -> list[Standing]:
    """This user's dashboards on this machine."""
    found = []
    for path in sorted((state / NOTES).glob("*.json")):
        try:
            found.append(Standing(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):  # it ended meanwhile, or another version wrote it
            continue
    return [one for one in found if one.lives()]


@contextmanager
def noted(standing: Standing, state: Path) -> Iterator[None]:
    """Leave a note while it serves. Where none can be left, it serves all the same and is not found again."""
    note = state / NOTES / standing.file
    try:
        (state / NOTES).mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(note, json.dumps(asdict(standing)))
    except OSError:  # told already: the token could not be kept there either
        yield
        return
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def bound(host: str, port: int, option: str) -> socket.socket:
    """A socket at host and port, 0 for a free one. Raises ConfigError, but OSError where the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ConfigError(
            f"--host: '{host}' is no address of this machine. Write 127.0.0.1, or 0.0.0.0 for all."
        ) from None
    opened = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it lets two programs have the same port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        # The kernel refuses a second listener on the port here, and not later within the server.
        opened.listen(128)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"--host: '{host}' is no address of this machine. Write 127.0.0.1, or 0.0.0.0 for all."
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"{option}: {port} may not be opened by you. Write one above 1023, or 0 for a free one."
            ) from None
        raise
    return opened


def is_taken(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


def reachable(host: str) -> str:
    """The host in a URL: where all addresses were bound, this machine's name."""
    if host in WILDCARDS:
        return platform.node()
    return f"[{host}]" if ":" in host else host


WILDCARDS = ("0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
