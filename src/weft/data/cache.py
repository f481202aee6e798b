"""Where the latents and texts of a survey come from: a folder that runs share, memory, or the encoders themselves."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

from torch import Tensor

from weft.contracts import Encoders
from weft.data.encoding import CODE_VERSION, captions_of, clip_pixels, encoded_caption, encoded_pixels, latent_shape
from weft.data.entries import ContentHashes, entry_path, is_sound, read_entry, write_entry
from weft.data.survey import Clip, Survey, bucket_of
from weft.errors import DataError
from weft.events import Listener, PhaseStarted, Progress

PHASE = "caching"


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
        return f"{here}; the missing need about {_mib(self.estimated_bytes)}." if self.missing else f"{here}."


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@dataclass
class Filled:
    """What filling did. damaged: entries that were there but unfit. failed: key of an unreadable clip -> reason."""

    encoded: int = 0
    damaged: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Store(Protocol):
    """The latents and texts of one survey. All kinds of store give the same tensors, bit by bit."""

    def status(self) -> CacheStatus: ...
    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        """Encode what is missing; encoders are asked for only then. Raises DataError on latents that are not finite."""
        ...

    def latents(self, clip: Clip) -> Tensor:
        """fp32 (C, F, H, W). Raises DataError that names the clip."""
        ...

    def text(self, caption: str) -> Tensor:
        """(L, D) in the encoder's dtype, unpadded."""
        ...


def open_store(
    mode: Literal["disk", "memory", "off"], folder: Path, survey: Survey, identity: Mapping[str, str]
) -> Store:
    """The store that a config's `cache` asks for."""
    if mode == "disk":
        return LatentStore(folder, survey, identity)
    return MemoryStore(survey) if mode == "memory" else LiveStore(survey)


class LatentStore:
    """A folder with one file for each latent and each text, found by content, cut and the encoder's fingerprint."""

    def __init__(self, folder: Path, survey: Survey, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._survey = survey
        self._identity = dict(identity)
        self._hashes = ContentHashes(folder / "hashes.json")

    def path_of(self, clip: Clip) -> Path:
        """Where a clip's latents lie: the name is made of everything that they depend on."""
        bucket = bucket_of(clip)
        transform = {
            "fps": self._survey.fps if clip.media == "video" else None,
            "frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "start": 0,
            "media": clip.media,
            "code": CODE_VERSION,
        }
        made_of = (self._hashes.of(clip.path), json.dumps(transform, sort_keys=True), self._identity["latents"])
        return entry_path(self._folder, "latents", *made_of)

    def path_of_text(self, caption: str) -> Path:
        """Where the text of a caption lies."""
        return entry_path(self._folder, "text", caption, self._identity["text"])

    def status(self) -> CacheStatus:
        clips, texts = self._missing()
        gone = {self.path_of(clip): clip for clip in clips}
        lost = {*gone, *map(self.path_of_text, texts)}
        wanted = {
            *map(self.path_of, self._survey.usable),
            *map(self.path_of_text, captions_of(self._survey)),
        }
        size = sum(path.stat().st_size for path in wanted - lost)
        return CacheStatus(len(wanted - lost), len(lost), size, _latent_bytes(gone.values(), self._survey))

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        clips, texts = self._missing()
        total = len(clips) + len(texts)
        if total == 0:
            return Filled()
        unfit = {*map(self.path_of, clips), *map(self.path_of_text, texts)}
        filled = Filled(damaged=sum(path.exists() for path in unfit))
        load = functools.cache(encoders)
        tell(PhaseStarted(phase=PHASE, total=total))
        for done, caption in enumerate(texts, start=1):
            path = self.path_of_text(caption)
            write_entry(path, "text", encoded_caption(caption, load), caption)
            filled.encoded += 1
            tell(Progress(phase=PHASE, done=done, total=total, note=f"caption: {caption[:60]}"))
        for done, clip in enumerate(clips, start=len(texts) + 1):
            self._fill_clip(clip, load, filled)
            tell(Progress(phase=PHASE, done=done, total=total, note=filled.failed.get(clip.key, clip.key)))
        self._refuse_gaps(filled.failed)
        return filled

    def _refuse_gaps(self, failed: Mapping[str, str]) -> None:
        """Raise DataError when something is not there that was to be written."""
        clips, texts = self._missing()
        lost = [clip.key for clip in clips if clip.key not in failed] + texts
        if lost:
            raise DataError(
                f"{len(lost)} cache entries went while others were written, first that of {lost[0]!r}. "
                "Start again to encode them."
            )

    def latents(self, clip: Clip) -> Tensor:
        path, expected = self.path_of(clip), latent_shape(clip, self._survey)
        return self._read(path, "latents", expected, f"{clip.key}: its latents")

    def text(self, caption: str) -> Tensor:
        return self._read(self.path_of_text(caption), "text", None, f"The text of '{caption[:60]}'")

    def _missing(self) -> tuple[list[Clip], list[str]]:
        """Clips and captions that have no sound entry."""
        clips = [
            clip
            for clip in self._survey.usable
            if not is_sound(self.path_of(clip), "latents", latent_shape(clip, self._survey))
        ]
        self._hashes.save()
        return clips, [c for c in captions_of(self._survey) if not is_sound(self.path_of_text(c), "text")]

    def _fill_clip(self, clip: Clip, encoders: Callable[[], Encoders], filled: Filled) -> None:
        path = self.path_of(clip)
        # Another process, or another clip of the same content, may have been faster.
        if is_sound(path, "latents", latent_shape(clip, self._survey)):
            return
        latents = _encoded_or_failed(clip, self._survey, encoders, filled)
        if latents is not None:
            write_entry(path, "latents", latents, clip.key)

    def _read(self, path: Path, kind: str, shape: tuple[int, ...] | None, what: str) -> Tensor:
        """A sound entry. A damaged one is removed, so that the next fill encodes it anew."""
        tensor = read_entry(path, kind)
        if tensor is not None and shape in (None, tuple(tensor.shape)):
            return tensor
        was = "damaged and is now removed" if path.exists() else "not in the cache"
        path.unlink(missing_ok=True)
        raise DataError(f"{what} ({path}): the entry is {was}. Start again, or run `weft cache`, to encode it anew.")


class MemoryStore:
    """The same tensors, kept in RAM for one run."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._latents: dict[str, Tensor] = {}  # by key
        self._texts: dict[str, Tensor] = {}  # by caption

    def status(self) -> CacheStatus:
        held = [*self._latents.values(), *self._texts.values()]
        clips, texts = self._missing()
        size = sum(tensor.nbytes for tensor in held)
        return CacheStatus(len(held), len(clips) + len(texts), size, _latent_bytes(clips, self._survey))

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        clips, texts = self._missing()
        filled, total = Filled(), len(clips) + len(texts)
        if total == 0:
            return filled
        load = functools.cache(encoders)
        tell(PhaseStarted(phase=PHASE, total=total))
        for done, caption in enumerate(texts, start=1):
            self._texts[caption] = encoded_caption(caption, load)
            filled.encoded += 1
            tell(Progress(phase=PHASE, done=done, total=total, note=f"caption: {caption[:60]}"))
        for done, clip in enumerate(clips, start=len(texts) + 1):
            latents = _encoded_or_failed(clip, self._survey, load, filled)
            if latents is not None:
                self._latents[clip.key] = latents
            tell(Progress(phase=PHASE, done=done, total=total, note=filled.failed.get(clip.key, clip.key)))
        return filled

    def latents(self, clip: Clip) -> Tensor:
        return self._latents[clip.key]

    def text(self, caption: str) -> Tensor:
        return self._texts[caption]

    def _missing(self) -> tuple[list[Clip], list[str]]:
        clips = [clip for clip in self._survey.usable if clip.key not in self._latents]
        return clips, [caption for caption in captions_of(self._survey) if caption not in self._texts]


class LiveStore:
    """The same tensors, encoded anew each time that they are asked for; the encoders stay loaded."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._load: Callable[[], Encoders] | None = None
        self._one_at_a_time = Lock()  # the loader's thread and validation ask; video autoencoders keep state in a call

    def status(self) -> CacheStatus:
        return CacheStatus(0, 0, 0, 0)

    def fill(self, encoders: Callable[[], Encoders], tell: Listener) -> Filled:
        self._load = functools.cache(encoders)
        return Filled()

    def latents(self, clip: Clip) -> Tensor:
        pixels = clip_pixels(clip, self._survey.fps)
        with self._one_at_a_time:
            return encoded_pixels(pixels, clip, self._survey, self._encoders())

    def text(self, caption: str) -> Tensor:
        with self._one_at_a_time:
            return encoded_caption(caption, self._encoders())

    def _encoders(self) -> Callable[[], Encoders]:
        assert self._load is not None, "a store is filled before it is read"
        return self._load


def _encoded_or_failed(clip: Clip, survey: Survey, encoders: Callable[[], Encoders], filled: Filled) -> Tensor | None:
    """A clip's latents, counted; or None for a file that cannot be decoded, whose reason is kept."""
    try:
        pixels = clip_pixels(clip, survey.fps)
    except DataError as error:
        filled.failed[clip.key] = str(error)
        return None
    filled.encoded += 1
    return encoded_pixels(pixels, clip, survey, encoders)


def _latent_bytes(clips: Iterable[Clip], survey: Survey) -> int:
    return sum(4 * math.prod(latent_shape(clip, survey)) for clip in clips)
