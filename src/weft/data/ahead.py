"""What an iterator gives, made in advance by a thread, so that slow reading and slow computing go on at once."""

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Generic, TypeVar

OFFER_SECONDS = 0.1
CLOSE_SECONDS = 5.0  # patience with an item in the making; the thread is a daemon and ends after it

T = TypeVar("T")


class Ahead(Generic[T]):
    """A running thread that keeps up to `depth` items ready; what fails in it is raised where they are taken."""

    def __init__(self, source: Iterator[T], depth: int) -> None:
        # One-tuples are items, None is the end.
        self._ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(source,), name="weft-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]

    def close(self) -> None:
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _work(self, source: Iterator[T]) -> None:
        try:
            for item in source:
                if not self._offer((item,)):
                    return
            self._offer(None)
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: tuple[T] | BaseException | None) -> bool:
        while not self._closed.is_set():  # never waits for ever on a consumer that has gone
            try:
                self._ready.put(item, timeout=OFFER_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them made in advance by one thread, whose errors are raised here."""
    with closing(Ahead(items, depth)) as made:
        yield from made


def ahead_in_each(streams: Iterable[Iterator[T]], workers: int, depth: int) -> Generator[T, None, None]:
    """The items of all streams, one stream after the other, while the next ones are read by a thread each.

    At most `workers` streams are open, with `depth` items ready in each; the order does not depend on their speed.
    """
    waiting, running = iter(streams), deque[Ahead[T]]()
    try:
        running.extend(Ahead(stream, depth) for stream in islice(waiting, workers))
        while running:
            yield from running[0]
            running.popleft().close()
            running.extend(Ahead(stream, depth) for stream in islice(waiting, 1))
    finally:
        for stream in running:
            stream.close()
