"""Whether the process that trains a run still lives: here by its number, elsewhere by its heart."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.dashboard.tail import number
from weft.durable import is_running
from weft.run.folder import is_alive

SILENCE = 60.0  # seconds without a new beat after which a process on another host counts as gone
GRACE = 10.0  # of these we watch ourselves: the other host's clock may be late
LONG_AGO = 3600.0  # no clock is so late
OLDER = 600.0  # the same as SILENCE for a trainer that has no heartbeat, only its GPU's file
AFTERLIFE = 3.0  # seconds; a beat so much later than a death is of a process that we cannot see, in another container


@dataclass
class _Sight:
    """What was seen of one process: its last sign, and since when that one stands."""

    sign: float
    since: float
    dead_since: float | None = None


class Watch:
    """Remembers signs of life between two looks. Times in seconds since 1970, as this host counts them."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], _Sight] = {}

    def lives(self, process: Mapping[str, Any], beat: Mapping[str, Any], updated: float | None, now: float) -> bool:
        """Whether a process lives. beat: its heartbeat, empty without one. updated: when its GPU's file was written."""
        sign = number(beat.get("time")) or updated or number(process.get("started")) or 0.0
        key = (process.get("host"), process.get("pid"), process.get("born"))
        sight = self._seen.setdefault(key, _Sight(sign, now))
        if sight.sign != sign:
            sight.sign, sight.since = sign, now
        pid = process.get("pid")
        if process.get("host") == platform.node() and (type(pid) is not int or is_known(pid)):
            return self._here(process, beat, sight, now)
        age, watched = now - sign, now - sight.since
        silence = SILENCE if beat else OLDER
        return not (watched >= silence or age > max(LONG_AGO, silence) or (age > silence and watched >= GRACE))

    def _here(self, process: Mapping[str, Any], beat: Mapping[str, Any], sight: _Sight, now: float) -> bool:
        pid = process.get("pid")
        if type(pid) is int and 0 < pid < 1 << 31 and is_alive(pid, process.get("born")):
            sight.dead_since = None
            return True
        if sight.dead_since is None:
            sight.dead_since = now
        # Containers may share a host's name, but not its numbers of processes.
        return bool(beat) and sight.sign > sight.dead_since + AFTERLIFE and now - sight.sign < SILENCE


def is_known(pid: int) -> bool:
    """Whether this system tells of a process by its number; Windows does not."""
    return not 0 < pid < 1 << 31 or is_running(pid) is not None
