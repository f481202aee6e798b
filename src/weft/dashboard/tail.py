"""Reading a log that is still being written: whole lines only, from where the last reading ended, whatever it holds."""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from weft.dashboard.regular import opened

TURN = 8 << 20  # bytes that are read at one go
LONGEST = 4 << 20  # bytes of a line; a longer one is passed over, and never held as a whole
HEAD = 128  # bytes at a file's beginning by which it is known again: they hold the time of its first event
decode = json.JSONDecoder().decode
OFFSET_BITS = 48  # of a position; the five above are the file's mark, so that all fit into a number of JavaScript


@dataclass
class Lines:
    """What one turn has read. lines: without their ends. reset: the file is another one, and all before is void."""

    lines: list[bytes] = field(default_factory=list)
    reset: bool = False
    more: bool = False  # the turn's limit came before the end of the file


class Tail:
    """A place in a growing file. The half line at its end waits until its newline is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes; always behind a newline, or within a line that is being passed over
        self.overlong = 0  # lines that were passed over
        self._file: tuple[int, int] | None = None  # device and inode
        self._head = b""
        self._passing = False

    @property
    def position(self) -> int:
        """The place as one number that another process understands, too."""
        return position_of(self._head, self.offset)

    def read(self, limit: int = TURN) -> Lines:
        """The whole lines that have come since, of at most `limit` bytes. A file that is not there has none."""
        try:
            with opened(self.path) as file:
                return self._read(file, limit)
        except OSError:  # not there yet, or no longer, or out of reach for this moment
            return Lines()

    def skip_to(self, offset: int) -> None:
        """Go on at the first line that begins behind an offset."""
        if offset > self.offset:
            self.offset, self._passing = offset, True

    def _read(self, file: BinaryIO, limit: int) -> Lines:
        found = Lines(reset=self._replaced(file))
        if found.reset:
            self.offset, self._passing, self._head = 0, False, b""
        facts = os.fstat(file.fileno())
        self._file = (facts.st_dev, facts.st_ino)
        if len(self._head) < HEAD:
            self._head = file.read(HEAD)
        file.seek(self.offset)
        data = file.read(limit)
        found.more = len(data) == limit
        end = data.rfind(b"\n") + 1
        whole = data[:end]
        if self._passing and end:
            whole = whole[whole.find(b"\n") + 1 :]
            self._passing = False
        if not end and (self._passing or len(data) >= min(limit, LONGEST)):
            self.overlong += not self._passing
            self._passing, end = True, len(data)
        self.offset += end
        lines = whole.split(b"\n")[:-1]
        found.lines = [line for line in lines if len(line) <= LONGEST]
        self.overlong += len(lines) - len(found.lines)
        return found

    def _replaced(self, file: BinaryIO) -> bool:
        facts = os.fstat(file.fileno())
        if self._file is None:
            return False
        same = (facts.st_dev, facts.st_ino) == self._file and facts.st_size >= self.offset
        head = file.read(len(self._head))
        file.seek(0)
        return not same or head != self._head


def position_of(head: bytes, offset: int) -> int:
    """An offset together with a mark of the file that it counts in. A file without a whole first line has mark 0."""
    mark = 1 + zlib.crc32(head) % 31 if len(head) >= HEAD else 0
    return mark << OFFSET_BITS | offset


def lines_after(path: Path, position: int, limit: int = TURN // 2) -> tuple[int, list[bytes]] | None:
    """The new position and the whole lines after a position, which another process may have given out.

    None when the position is of another file, or when more than `limit` bytes came since.
    """
    offset = position & ((1 << OFFSET_BITS) - 1)
    try:
        with opened(path) as file:
            head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
            known = position >> OFFSET_BITS
            if size < offset or size - offset > limit or (known and position_of(head, offset) != position):
                return None
            file.seek(max(0, offset - 1))
            data = file.read(limit + 1)
    except OSError:
        return (0, []) if position == 0 else None
    if offset:
        if data[:1] != b"\n":
            return None
        data = data[1:]
    end = data.rfind(b"\n") + 1
    return position_of(head, offset + end), data[:end].split(b"\n")[:-1]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is none: torn, of other bytes than text, no object, without kind or time."""
    try:
        record = decode(line.decode())
    except (ValueError, RecursionError):
        return None
    if type(record) is not dict or type(record.get("event")) is not str or number(record.get("time")) is None:
        return None
    return record


def number(value: Any) -> float | None:
    """A finite number as it is, None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -1e308 < value < 1e308 else None
