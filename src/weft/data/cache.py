"""Where the latents and texts of a survey come from when not from the disk: memory, or the encoders themselves."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Literal, Protocol

import torch
from torch import Tensor

from weft.contracts import Encoders
from weft.data.encoding import captions_of, clip_pixels, encoded_caption, encoded_pixels, latent_shape
from weft.data.filed import Held, Shown
from weft.data.filling import ALONE, Filled, Filling, Hands, Taken
from weft.data.survey import Clip, Wanted
from weft.events import Listener


@dataclass(frozen=True)
class CacheStatus:
    """Entries of a survey in its cache. bytes: of those present. estimated_bytes: of the missing, latents alone.
    sharded: entries that lie together in so many shards."""

    present: int
    missing: int
    bytes: int
    estimated_bytes: int
    shards: int = 0
    sharded: int = 0

    def line(self) -> str:
        """The status in one sentence."""
        here = f"cache: {self.present} of {self.present + self.missing} entries present ({_mib(self.bytes)})"
        if self.shards:
            here += f", {self.sharded} of them in {self.shards} shard{'s' if self.shards > 1 else ''}"
        if not self.missing:
            return f"{here}."
        need = f"need about {_mib(self.estimated_bytes)}" if self.estimated_bytes else "are texts"
        return f"{here}; the missing {need}."


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Keeping:
    """How entries are kept. dtype: of the latents and of what else a clip has in fp32; bf16 halves the cache and rounds
    what is trained on. shards: many entries in one file."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    shards: bool = True

    def kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A clip's tensors as they are kept."""
        if self.dtype == "fp32":
            return dict(tensors)
        return {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in tensors.items()}


EXACT = Keeping()


def latent_bytes(clips: Iterable[Clip], wanted: Wanted, keeping: Keeping = EXACT) -> int:
    """Bytes of the clips' latents."""
    size = 2 if keeping.dtype == "bf16" else 4
    return sum(size * prod(latent_shape(clip, wanted)) for clip in clips)


class Store(Protocol):
    """The latents and texts of one survey. All kinds of store give the same tensors, bit by bit, as long as clips are
    encoded one by one."""

    def status(self) -> CacheStatus: ...
    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        """Encode what is missing; encoders are asked for only then. Raises DataError on latents that are not finite."""
        ...

    def pack(self, tell: Listener) -> None:
        """Put what is kept in order, once all of it is there."""
        ...

    def expect(self, clips: Sequence[Clip]) -> None:
        """Hear that these clips will be asked for soon, so that they can be decoded ahead."""
        ...

    def shown(self, what: Clip | str) -> Shown:
        """The tensors of a clip or of a caption, to be written where a batch wants them. Raises DataError naming it."""
        ...

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        """Latents (C, F, H, W) as they are kept, and what the model is told of the first frame. Raises DataError naming
        the clip."""
        ...

    def text(self, caption: str) -> Mapping[str, Tensor]:
        """Text (L, D) in the encoder's dtype, unpadded, and what else the text encoders give."""
        ...


class MemoryStore:
    """The same tensors, kept in RAM for one run."""

    def __init__(self, wanted: Wanted, hands: Hands = ALONE, keeping: Keeping = EXACT) -> None:
        self._wanted = wanted
        self._hands = hands
        self._keeping = keeping
        self._held: dict[str, Mapping[str, Tensor]] = {}  # under "clip KEY" and "text CAPTION"

    def status(self) -> CacheStatus:
        clips, texts = self._missing()
        size = sum(tensor.nbytes for tensors in self._held.values() for tensor in tensors.values())
        return CacheStatus(
            len(self._held), len(clips) + len(texts), size, latent_bytes(clips, self._wanted, self._keeping)
        )

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        return Filling(self, self._wanted, encoders, tell, self._hands).run(*self._missing())

    def pack(self, tell: Listener) -> None: ...

    def expect(self, clips: Sequence[Clip]) -> None: ...

    def shown(self, what: Clip | str) -> Shown:
        return Held(self._held[self._name(what)])

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        return self._held[self._name(clip)]

    def text(self, caption: str) -> Mapping[str, Tensor]:
        return self._held[self._name(caption)]

    def take(self, what: Clip | str) -> Taken:
        return "there" if self._name(what) in self._held else "ours"

    def keep(self, what: Clip | str, tensors: Mapping[str, Tensor]) -> None:
        self._held[self._name(what)] = tensors if isinstance(what, str) else self._keeping.kept(tensors)

    def leave(self, what: Clip | str) -> None: ...

    def _name(self, what: Clip | str) -> str:
        return f"text {what}" if isinstance(what, str) else f"clip {what.key}"

    def _missing(self) -> tuple[list[Clip], list[str]]:
        clips = [clip for clip in self._wanted.usable if self._name(clip) not in self._held]
        return clips, [caption for caption in captions_of(self._wanted) if self._name(caption) not in self._held]


class LiveStore:
    """The same tensors, encoded anew each time that they are asked for; the encoders stay loaded."""

    def __init__(self, wanted: Wanted, hands: Hands = ALONE) -> None:
        self._wanted = wanted
        self._load: Callable[[], Encoders] | None = None
        self._one_at_a_time = Lock()  # the loader's thread and validation ask; video autoencoders keep state in a call
        self._decoders = ThreadPoolExecutor(hands.workers, "weft-decoder")
        self._expected: dict[str, list[Future[Tensor]]] = {}  # by key, as often as it is expected

    def status(self) -> CacheStatus:
        return CacheStatus(0, 0, 0, 0)

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        self._load = functools.cache(encoders)
        return Filled()

    def pack(self, tell: Listener) -> None: ...

    def expect(self, clips: Sequence[Clip]) -> None:
        for clip in clips:
            decoding = self._decoders.submit(clip_pixels, clip, self._wanted.fps)
            self._expected.setdefault(clip.key, []).append(decoding)

    def shown(self, what: Clip | str) -> Shown:
        return Held(self.text(what) if isinstance(what, str) else self.clip(what))

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        expected = self._expected.get(clip.key)
        pixels = expected.pop(0).result() if expected else clip_pixels(clip, self._wanted.fps)
        with self._one_at_a_time:
            return encoded_pixels(pixels, [clip], self._wanted, self._encoders())[0]

    def text(self, caption: str) -> Mapping[str, Tensor]:
        with self._one_at_a_time:
            return encoded_caption(caption, self._encoders())

    def _encoders(self) -> Callable[[], Encoders]:
        assert self._load is not None, "a store is filled before it is read"
        return self._load
