"""What blocks keep for their backward pass, waiting in host memory meanwhile: nothing is computed twice."""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from weft.engines.residency import lock_pages, tensors_of
from weft.errors import RunError

LEAST = 1 << 16  # bytes of a tensor that is worth a copy


class Pool:
    """Pieces of host memory, used again step after step: locking pages costs milliseconds."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.free: dict[int, list[Tensor]] = {}
        self.used = self.most = 0  # bytes now, and at any time
        self.spare = 0  # bytes that lie free

    def take(self, size: int, settle: Callable[[], None]) -> Tensor:
        """So many bytes (n,) uint8. settle: waits for what still reads free pieces, before some are given up."""
        self.used += size
        self.most = max(self.most, self.used)
        if waiting := self.free.get(size):
            self.spare -= size
            return waiting.pop()
        if self.used + self.spare > self.most:  # pieces of other sizes, from other shapes of a step
            settle()
            self.free.clear()
            self.spare = 0
        piece = torch.empty(size, dtype=torch.uint8)
        if self.pinned:
            lock_pages(piece)
        return piece

    def give(self, piece: Tensor) -> None:
        self.used -= len(piece)
        self.spare += len(piece)
        self.free.setdefault(len(piece), []).append(piece)


class Piece:
    """One storage that was kept: on the host, and on the device again shortly before it is asked for."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # (n,)
        self.back: Tensor | None = None  # (n,)
        self.arrived: torch.cuda.Event | None = None


class Run:
    """One run of a block, whose pieces come back together. stays: storages that are not its own to send away."""

    def __init__(self, stays: frozenset[int], before: "weakref.ref[Run] | None") -> None:
        self.stays = stays
        self.before = before  # its backward pass comes next
        self.pieces: list[weakref.ref[Piece]] = []


@dataclass
class Leaving:
    """What one run sends to the host, as it lies on the device, and when all of it has been read."""

    sent: list[tuple[weakref.ref[Piece], Tensor, int]] = field(default_factory=list)  # with the version that was sent
    left: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class Away:
    """What autograd holds in place of a tensor."""

    owner: "Activations"
    run: Run
    piece: Piece
    dtype: torch.dtype
    place: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset

    def back(self) -> Tensor:
        return self.owner.returned(self.run, self.piece).view(self.dtype).as_strided(*self.place)


class Activations:
    """Sends what blocks keep to host memory while the next block computes, and brings it back one block ahead.

    Weights stay, and so does what all blocks are given alike (text, time, positions). On the device are at most what
    two blocks keep: in the forward pass the one that runs and the one before, in the backward pass the one that is
    asked and the one that comes next. Order is the same on every device; on a GPU copies have a stream of their own.
    """

    def __init__(self, device: torch.device, pinned: bool, least: int = LEAST) -> None:
        self.device, self.least = device, least
        self.moved = 0  # bytes so far
        self.host_memory: Callable[[], AbstractContextManager[None]] = nullcontext  # around what is kept on the host
        self.pool = Pool(pinned and device.type == "cuda")
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.passed: frozenset[int] = frozenset()  # the storages of the last block's outputs
        self.last: weakref.ref[Run] | None = None
        self.leaving: deque[Leaving] = deque()
        self.coming: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[Piece], int]] = {}

    def begin(self, block: nn.Module, given: object) -> Run:
        """Before a block runs. given: its arguments."""
        self._let_go(1)
        self._settled(None)
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        storages = {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, Tensor)} - self.passed
        storages.update(t.untyped_storage()._cdata for t in tensors_of(block))
        run = Run(frozenset(storages), self.last)
        self.last = weakref.ref(run)
        self.leaving.append(Leaving())
        return run

    def end(self, output: object) -> None:
        """After a block has run. output: a tensor, or several in a sequence."""
        tensors = output if isinstance(output, Sequence) else (output,)
        self.passed = frozenset(t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor))

    def kept(self, run: Run, tensor: Tensor) -> Away | None:
        """What autograd is to hold in place of a tensor; None: the tensor, which stays."""
        if tensor.layout != torch.strided or tensor.device.type != self.device.type:
            return None
        storage = tensor.untyped_storage()
        size, rest = divmod(storage.nbytes(), tensor.element_size())
        # A small view of something large would take all of that along.
        if rest or tensor.nbytes < self.least or 2 * tensor.nbytes < storage.nbytes() or storage._cdata in run.stays:
            return None
        piece = self._same(storage, tensor._version)
        if piece is None:
            piece = self._sent(tensor, size)
            self._known[storage._cdata] = (StorageWeakRef(storage), weakref.ref(piece), tensor._version)
        run.pieces.append(weakref.ref(piece))
        place = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return Away(self, run, piece, tensor.dtype, place)

    def returned(self, run: Run, piece: Piece) -> Tensor:
        """A piece on the device (n,), and those of the run that is asked for next on their way."""
        self._let_go(0)
        self._bring(run)
        assert piece.back is not None
        if piece.arrived is not None:
            self._settled(piece.arrived)
        before = run.before() if run.before else None
        if before is not None:
            self._bring(before)
        return piece.back

    def _same(self, storage: torch.UntypedStorage, version: int) -> Piece | None:
        """The piece of a storage that was sent before and has not been written to since."""
        known = self._known.get(storage._cdata)
        return None if known is None or known[0].expired() or known[2] != version else known[1]()

    def _sent(self, tensor: Tensor, size: int) -> Piece:
        """A copy in host memory of all (n,) that lies with a tensor, whole once the device has come so far."""
        whole = tensor.detach().as_strided((size,), (1,), 0)
        with self.host_memory():
            memory = self.pool.take(whole.nbytes, self._read)
        piece = Piece(memory.view(tensor.dtype))
        weakref.finalize(piece, self.pool.give, memory).atexit = False
        self.moved += whole.nbytes
        leaving = self.leaving[-1]
        leaving.sent.append((weakref.ref(piece), whole, tensor._version))
        if self.side is None:
            piece.host.copy_(whole)
            return piece
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            piece.host.copy_(whole, non_blocking=True)
        leaving.left = leaving.left or torch.cuda.Event()
        leaving.left.record(self.side)
        return piece

    def _let_go(self, most: int) -> None:
        """Give back the device's memory of all but so many runs that are on their way to the host.

        That happens in the order of the device's computing, which must not run ahead of the copies. Where none may be
        left the backward pass begins, and takes what still lies on the device: nobody reads its copy, so nobody waits.
        """
        while len(self.leaving) > most:
            leaving = self.leaving.popleft()
            if leaving.left is not None and most:
                torch.cuda.current_stream(self.device).wait_event(leaving.left)
            for reference, whole, version in leaving.sent:
                if whole._version != version:
                    raise RunError(
                        "engine.offload_activations: a block has written over a tensor that it keeps for its backward "
                        "pass. Write engine.offload_activations=false."
                    )
                piece = reference()
                if piece is not None and not most:
                    piece.back = whole

    def _bring(self, run: Run) -> None:
        pieces = [piece for reference in run.pieces if (piece := reference()) is not None and piece.back is None]
        if not pieces:
            return
        fresh: list[Tensor] = []
        for piece in pieces:
            piece.back = torch.empty_like(piece.host, device=self.device, pin_memory=False)
            fresh.append(piece.back)
        if self.side is None:
            for piece, back in zip(pieces, fresh, strict=True):
                back.copy_(piece.host)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self.side):
            for piece, back in zip(pieces, fresh, strict=True):
                back.copy_(piece.host, non_blocking=True)
                piece.arrived = arrived
        arrived.record(self.side)
        # Held until somebody has waited: memory that is freed earlier would be given out while it is written to.
        self.coming.append((fresh, arrived))

    def _settled(self, arrived: torch.cuda.Event | None) -> None:
        """Let the device wait for what is coming back: up to an event, or all of it. None is awaited twice."""
        if self.side is None or (arrived is not None and all(event is not arrived for _, event in self.coming)):
            return
        while self.coming:
            _, event = self.coming.popleft()
            assert event is not None
            torch.cuda.current_stream(self.device).wait_event(event)
            if event is arrived:
                return

    def _read(self) -> None:
        """Wait for all copies. This is the host's own waiting, once for each new shape of a step."""
        if self.side is not None:
            self.side.synchronize()
