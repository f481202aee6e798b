"""A real dashboard process, and a client that asks it as a browser, a program or a stranger would."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def cookie(self) -> str:
        """What a browser would send back."""
        return self.headers["set-cookie"].partition(";")[0]


@dataclass
class Place:
    """One port of a dashboard. token: sent as a program's, where a request does not say otherwise."""

    port: int
    token: str

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str | None) -> Reply:
        """One request; a header's name has _ for -, and None leaves out what is usual."""
        sent = {"Authorization": f"Bearer {self.token}", **{name.replace("_", "-"): v for name, v in headers.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in sent, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def position(self, run: str) -> int:
        """Of a run that may have begun in this moment."""
        while (reply := self.ask(f"/api/runs/{run}")).status == 404:
            time.sleep(0.1)
        return reply.json["position"]

    def tell(self, run: str, command: Any, **headers: str | None) -> Reply:
        """POST a command, as a program does."""
        body = command if isinstance(command, bytes) else json.dumps(command).encode()
        asked = {"Content_Type": "application/json", **headers}
        return self.ask(f"/api/runs/{run}/control", "POST", body, **asked)


@dataclass
class Heard:
    """A server-sent event as it came; a comment has no name. at: seconds of the monotonic clock."""

    name: str
    data: Any
    id: str | None
    at: float


class Listener:
    """An open stream."""

    def __init__(self, place: Place, path: str, **headers: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)
        sent = {"Authorization": f"Bearer {place.token}", **{name.replace("_", "-"): v for name, v in headers.items()}}
        self._connection.request("GET", path, headers=sent)
        self._reply = self._connection.getresponse()
        self.status = self._reply.status

    def __iter__(self) -> Iterator[Heard]:
        """Events until the server ends the stream, or dies."""
        fields: dict[str, str] = {}
        while line := self._line():
            if line == "\n":
                if "data" in fields:
                    yield Heard(fields["event"], json.loads(fields["data"]), fields.get("id"), time.monotonic())
                fields = {}
            elif line.startswith(":"):
                yield Heard("", None, None, time.monotonic())
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()

    def _line(self) -> str:
        try:
            return self._reply.readline().decode()
        except (OSError, http.client.HTTPException):
            return ""

    def until(self, name: str) -> Heard:
        return next(heard for heard in self if heard.name == name)

    def close(self) -> None:
        self._reply.close()
        self._connection.close()


@dataclass
class Dashboard:
    """A `weft dashboard` process. lines: what it printed until it served."""

    root: Path
    state: Path
    options: tuple[str, ...] = ("--port", "0")
    lines: list[str] = field(default_factory=list)

    def __enter__(self) -> "Dashboard":
        self.start()
        return self

    def start(self) -> None:
        command = [sys.executable, "-m", "weft", "dashboard", str(self.root), *self.options]
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment(self.state),
            )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        places = re.findall(r"http://[^:/]+:(\d+)/(?:\?token|api/training/status\n)", self.text)
        self.ports = [int(port) for port in dict.fromkeys(places)]  # the API's stands in its curl line too
        found = re.search(r"token=([\w-]+)", self.text)
        assert found, f"{self.text}\n{self.errors}"
        self.token = found[1]

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def errors(self) -> str:
        return (self.state / "stderr").read_text()

    @property
    def page(self) -> Place:
        return Place(self.ports[0], self.token)

    @property
    def api(self) -> Place:
        return Place(self.ports[1], self.token)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Exit code, and the seconds that the end took."""
        began = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(20)
        return code, time.monotonic() - began

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


def environment(state: Path) -> dict[str, str]:
    """This process's, with a memory of its own for the user's programs."""
    return {**os.environ, "XDG_STATE_HOME": str(state), "SSH_CONNECTION": ""}
