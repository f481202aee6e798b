"""Where a source's tokens are kept: made by the first process that asks, waited for by the others."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from weft.data.claims import Claims
from weft.data.tokens import Corpus, Text, Unreadable, collected, read_corpus, write_corpus
from weft.events import Listener, Notice, PhaseStarted, Progress

CODE_VERSION = 1  # raise it when the same rows would give other tokens
WAIT_SECONDS = 0.3
PHASE = "caching"

Made = Iterable[Sequence[Text | Unreadable]]


class TokenCache:
    """Corpora by what they are made of. folder: None keeps them in memory, for this process alone."""

    def __init__(self, folder: Path | None, tell: Listener) -> None:
        self._folder, self._tell = folder, tell

    def corpus(self, name: str, made_of: Sequence[str], make: Callable[[], Made], rows: int | None) -> Corpus:
        """The corpus of a source. made_of: all that its tokens depend on. rows: how many it has, where that is known"""
        if self._folder is None:
            return collected(self._told(name, make(), rows))
        entry = entry_of(self._folder, made_of)
        found, waited = read_corpus(entry), False
        if found is not None:
            return found
        with Claims() as claims:
            while (found := read_corpus(entry)) is None:
                if claims.take(entry):
                    if read_corpus(entry) is None:  # not made between the look and the claim
                        write_corpus(entry, self._told(name, make(), rows))
                    claims.release(entry)
                    continue
                if not waited:
                    self._tell(Notice(text=f"{name} is being tokenised by another process: waiting"))
                    waited = True
                time.sleep(WAIT_SECONDS)
        return found

    def _told(self, name: str, made: Made, rows: int | None) -> Iterator[Sequence[Text | Unreadable]]:
        """The same, with progress. Several texts can come of a row, so that the count stops at the rows."""
        self._tell(PhaseStarted(phase=PHASE, total=rows))
        done = 0
        for some in made:
            yield some
            done += len(some)
            if rows:
                self._tell(Progress(phase=PHASE, done=min(done, rows), total=rows, note=name))


def entry_of(folder: Path, made_of: Sequence[str]) -> Path:
    """Where a corpus lies: tokens/ab/abcdef..."""
    name = hashlib.sha256(json.dumps([CODE_VERSION, *made_of]).encode()).hexdigest()
    return folder / "tokens" / name[:2] / name
