"""Batches brought to a GPU while the step before is at work: a thread copies on a stream of its own."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from weft.contracts import Batch

OFFER_SECONDS = 0.1
CLOSE_SECONDS = 5.0  # patience with a batch that is still being made; the thread is a daemon and ends after it

Put = Callable[[Batch], Batch]
Count = Callable[[Batch], int]


@dataclass(frozen=True)
class Arrival:
    """A batch on the device, whole once the event has passed. count: of its items, as it was on the host."""

    batch: Batch
    count: int
    arrived: torch.cuda.Event


class Courier:
    """A thread that keeps one batch ready on a GPU. What fails in it is raised where the batch is taken.

    It holds a batch's host memory until its copy is made, and only then asks for the next: so no slot is written while
    it is still being read, without the loop ever waiting for a copy. It waits for an event of its own stream, which a
    capture of CUDA graphs forbids to other threads unless its capture_error_mode is "thread_local".
    """

    def __init__(self, feed: Iterator[Batch], count: Count, put: Put, device: torch.device) -> None:
        self._feed, self._count, self._put, self._device = feed, count, put, device
        self._ready: queue.Queue[Arrival | BaseException | None] = queue.Queue(1)  # None is the end
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="weft-courier", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield self._handed_over(item), item.count

    def close(self) -> None:
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _handed_over(self, item: Arrival) -> Batch:
        """The batch, for the stream that computes. Its memory is the copying stream's, which would take it back as soon
        as the tensors are dropped here; and a batch of an incident lives on, so two fixed buffers would not do."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(item.arrived)
        for tensor in item.batch.tensors.values():
            tensor.record_stream(current)
        return item.batch

    def _work(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)
            for batch in self._feed:
                arrival = self._carried(batch, stream)
                if not self._offer(arrival):
                    return
                arrival.arrived.synchronize()  # from here on the host's tensors may be written again
                del batch
            self._offer(None)
        except BaseException as error:
            self._offer(error)

    def _carried(self, batch: Batch, stream: torch.cuda.Stream) -> Arrival:
        with torch.cuda.stream(stream):
            on_device = self._put(batch)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return Arrival(on_device, self._count(batch), arrived)

    def _offer(self, item: Arrival | BaseException | None) -> bool:
        while not self._closed.is_set():  # never waits for ever on a consumer that has gone
            try:
                self._ready.put(item, timeout=OFFER_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def carried(feed: Iterator[Batch], count: Count, put: Put, device: torch.device) -> Iterator[tuple[Batch, int]]:
    """The batches of a feed on the device, in order, each with its count, which is made while it is on the host. On a
    GPU the next one is on its way while one is computed with; elsewhere nothing is done before it is asked for."""
    if device.type != "cuda":
        for batch in feed:
            yield put(batch), count(batch)
        return
    with closing(Courier(feed, count, put, device)) as courier:
        yield from courier


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision, as a cache may keep it, in the fp32 that objectives compute in: every value stays what it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def host_memory(size: int, device: torch.device, pinned: bool) -> torch.Tensor:
    """So many bytes for batches to lie in, (n,) uint8: locked where a GPU copies from them."""
    if device.type != "cuda" or not pinned:
        return torch.empty(size, dtype=torch.uint8)
    with torch.cuda.device(
        device
    ):  # else the memory would be registered through the first GPU, and take a context there
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
