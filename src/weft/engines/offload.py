"""The inputs of recomputed blocks, waiting in host memory between the forward and the backward pass."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAVING = 2  # inputs that may be on their way to the host at a time, and still take room on the device


class Waiting:
    """One input on the host, and on the device again shortly before its block is recomputed."""

    def __init__(self, host: Tensor, before: "Waiting | None") -> None:
        self.host = host
        self.before = None if before is None else weakref.ref(before)  # its backward comes next
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


@dataclass
class Inputs:
    """Sends what goes from block to block to host memory, and brings it back one block ahead of need.

    What all blocks are given alike (text, time, positions) stays where it is: it is kept once in any case.
    """

    device: torch.device
    pinned: bool
    passed: frozenset[int] = frozenset()  # the storages of the last block's outputs, and of what the next one is given
    last: "weakref.ref[Waiting] | None" = None
    moved: int = 0  # bytes so far
    largest: int = 0  # bytes of one input
    host_memory: Callable[[], AbstractContextManager[None]] = nullcontext  # around what is kept on the host
    _leaving: "deque[tuple[Tensor, torch.cuda.Event]]" = field(default_factory=deque)
    _side: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Inside, what autograd keeps goes to the host when it is what the block before passed on."""
        with saved_tensors_hooks(self.pack, self.unpack):
            yield

    def take(self, given: Sequence[object]) -> None:
        """Before a block runs. The first that it is given goes through all blocks, whoever made it: the first block's
        is sent away as others are."""
        if given and isinstance(given[0], Tensor):
            self.passed |= {given[0].untyped_storage()._cdata}

    def note(self, output: object) -> None:
        """Remember what a block passes on: a tensor, or several in a sequence."""
        tensors = output if isinstance(output, Sequence) else (output,)
        self.passed = frozenset(t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor))

    def pack(self, tensor: Tensor) -> Tensor | Waiting:
        if tensor.untyped_storage()._cdata not in self.passed:
            return tensor
        waiting = Waiting(self._sent(tensor.detach()), self.last() if self.last else None)
        self.last = weakref.ref(waiting)
        self.moved += tensor.nbytes
        self.largest = max(self.largest, tensor.nbytes)
        return waiting

    def unpack(self, kept: Tensor | Waiting) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._let_go(0)
        self._fetch(kept)
        back, kept.back = kept.back, None
        assert back is not None
        if kept.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
        before = kept.before() if kept.before else None
        if before is not None and self._side is not None:  # without a second stream nothing is gained by haste
            self._fetch(before)
        return back

    def _sent(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, whole once the device has come so far."""
        with self.host_memory():
            host = torch.empty_like(tensor, device="cpu", pin_memory=self._side is not None and self.pinned)
        if self._side is None:
            return host.copy_(tensor)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            host.copy_(tensor, non_blocking=True)
        left = torch.cuda.Event()
        left.record(self._side)
        self._leaving.append((tensor, left))
        self._let_go(LEAVING)
        return host

    def _let_go(self, most: int) -> None:
        """Give back the device's memory of all but so many inputs on their way to the host.

        That happens in the order of the device's computing, which must not run ahead of the copies.
        """
        while len(self._leaving) > most:
            _, left = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(left)

    def _fetch(self, waiting: Waiting) -> None:
        if waiting.back is not None:
            return
        back = torch.empty_like(waiting.host, device=self.device, pin_memory=False)
        if self._side is None:
            waiting.back = back.copy_(waiting.host)
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            back.copy_(waiting.host, non_blocking=True)
        waiting.arrived = torch.cuda.Event()
        waiting.arrived.record(self._side)
        waiting.back = back
