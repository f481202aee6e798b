"""Where the latents and texts of a survey come from when not from the disk: memory, or the encoders themselves."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Protocol

from torch import Tensor

from weft.contracts import Encoders
from weft.data.encoding import captions_of, clip_pixels, encoded_caption, encoded_pixels, latent_shape
from weft.data.filling import ALONE, Filled, Filling, Hands, Taken
from weft.data.survey import Clip, Wanted
from weft.events import Listener


@dataclass(frozen=True)
class CacheStatus:
    """Entries of a survey in its cache. bytes: of those present. estimated_bytes: of the missing, latents alone."""

    present: int
    missing: int
    bytes: int
    estimated_bytes: int

    def line(self) -> str:
        """The status in one sentence."""
        here = f"cache: {self.present} of {self.present + self.missing} entries present ({_mib(self.bytes)})"
        if not self.missing:
            return f"{here}."
        need = f"need about {_mib(self.estimated_bytes)}" if self.estimated_bytes else "are texts"
        return f"{here}; the missing {need}."


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def latent_bytes(clips: Iterable[Clip], wanted: Wanted) -> int:
    """Bytes of the clips' latents in fp32."""
    return sum(4 * prod(latent_shape(clip, wanted)) for clip in clips)


class Store(Protocol):
    """The latents and texts of one survey. All kinds of store give the same tensors, bit by bit, as long as clips are
    encoded one by one."""

    def status(self) -> CacheStatus: ...
    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        """Encode what is missing; encoders are asked for only then. Raises DataError on latents that are not finite."""
        ...

    def expect(self, clips: Sequence[Clip]) -> None:
        """Hear that these clips will be asked for soon, so that they can be decoded ahead."""
        ...

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        """Latents (C, F, H, W) in fp32, and what the model is told of the first frame. Raises DataError naming the
        clip."""
        ...

    def text(self, caption: str) -> Mapping[str, Tensor]:
        """Text (L, D) in the encoder's dtype, unpadded, and what else the text encoders give."""
        ...


class MemoryStore:
    """The same tensors, kept in RAM for one run."""

    def __init__(self, wanted: Wanted, hands: Hands = ALONE) -> None:
        self._wanted = wanted
        self._hands = hands
        self._held: dict[str, Mapping[str, Tensor]] = {}  # under "clip KEY" and "text CAPTION"

    def status(self) -> CacheStatus:
        clips, texts = self._missing()
        size = sum(tensor.nbytes for tensors in self._held.values() for tensor in tensors.values())
        return CacheStatus(len(self._held), len(clips) + len(texts), size, latent_bytes(clips, self._wanted))

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        return Filling(self, self._wanted, encoders, tell, self._hands).run(*self._missing())

    def expect(self, clips: Sequence[Clip]) -> None: ...

    def clip(self, clip: Clip) -> Mapping[str, Tensor]:
        return self._held[self._name(clip)]

    def text(self, caption: str) -> Mapping[str, Tensor]:
        return self._held[self._name(caption)]

    def take(self, what: Clip | str) -> Taken:
        return "there" if self._name(what) in self._held else "ours"

    def keep(self, what: Clip | str, tensors: Mapping[str, Tensor]) -> None:
        self._held[self._name(what)] = tensors

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

    def expect(self, clips: Sequence[Clip]) -> None:
        for clip in clips:
            decoding = self._decoders.submit(clip_pixels, clip, self._wanted.fps)
            self._expected.setdefault(clip.key, []).append(decoding)

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
