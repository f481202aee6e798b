"""Who encodes what, where several processes fill one cache: a small file beside an entry, for as long as it is made."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from weft.durable import is_running

BEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # without a beat; also bears clocks of two machines that differ by a minute


class Claims:
    """The entries that this process is making. Within the block they are kept fresh; at its end they are given up.

    A claim is advice: when two processes ever hold one, both make the same entry, and each writes it whole.
    """

    def __init__(self) -> None:
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        self._ended.clear()
        self._beats = threading.Thread(target=self._beat, name="weft-claims", daemon=True)
        self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        assert self._beats is not None
        self._beats.join()
        for entry in list(self._held):
            self.release(entry)

    def take(self, entry: Path) -> bool:
        """Whether the entry is now ours to make; False while anyone, this process too, is at it."""
        claim = claim_of(entry)
        with self._lock:
            if entry in self._held or not (_created(claim) or (_is_stale(claim) and _replaced(claim))):
                return False
            self._held.add(entry)
            return True

    def release(self, entry: Path) -> None:
        with self._lock:
            self._held.discard(entry)
            claim_of(entry).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                for entry in self._held:
                    if claim_of(entry).exists():  # unless somebody has deleted the cache
                        os.utime(claim_of(entry))


def claim_of(entry: Path) -> Path:
    """The file that says that an entry is being made."""
    return entry.with_suffix(".claim")


def _created(claim: Path) -> bool:
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
    return True


def _replaced(claim: Path) -> bool:
    """Take a claim over. Of several that try, the one that can move it away goes on."""
    away = claim.with_name(f"{claim.name}-{uuid4().hex[:8]}")
    try:
        claim.rename(away)
    except FileNotFoundError:
        return False
    away.unlink()
    return _created(claim)


def _is_stale(claim: Path) -> bool:
    """Whether the process that made a claim has ended, or given no sign for long."""
    try:
        age = time.time() - claim.stat().st_mtime
        maker = json.loads(claim.read_text() or "{}")
    except (FileNotFoundError, ValueError):
        return False  # released in this moment, or not yet written
    return age > STALE_SECONDS or (maker.get("host") == socket.gethostname() and is_running(maker["process"]) is False)
