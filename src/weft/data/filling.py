"""Encode what a store lacks: threads decode clips ahead, in a fixed order, while the encoder works."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from weft.contracts import Encoders
from weft.data.ahead import ahead_in_each
from weft.data.buckets import Bucket
from weft.data.encoding import encoded_caption, encoded_pixels, pixels_of
from weft.data.survey import Clip, Wanted, bucket_of
from weft.errors import DataError
from weft.events import Listener, Notice, PhaseStarted, Progress

PHASE = "caching"
LEAST_WORKERS, MOST_WORKERS = 2, 8  # two, so that the next clip is decoded while one is encoded
WINDOWS_AHEAD = 2  # decoded windows that wait in each open file: what bounds the memory
WAIT_SECONDS = 0.5  # between looks at what other processes are making

# Whose an entry is to make: ours; nobody's, for it is there; another process's, which is at it.
Taken = Literal["ours", "there", "theirs"]
W = TypeVar("W")


@dataclass(frozen=True)
class Hands:
    """How much is done at once. workers: threads that decode. encoder_batch: clips that are encoded together."""

    workers: int = 1
    encoder_batch: int = 1

    @classmethod
    def of(cls, workers: int | Literal["auto"], encoder_batch: int) -> "Hands":
        return cls(
            min(MOST_WORKERS, max(LEAST_WORKERS, os.cpu_count() or 1)) if workers == "auto" else workers, encoder_batch
        )


ALONE = Hands()


@dataclass
class Filled:
    """What filling did. damaged: entries that were there but unfit. failed: key of an unreadable clip -> reason."""

    encoded: int = 0
    damaged: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Shelf(Protocol):
    """Where entries are kept, a clip's under the clip and a text's under its caption."""

    def take(self, what: Clip | str) -> Taken: ...
    def keep(self, what: Clip | str, tensors: Mapping[str, Tensor]) -> None: ...
    def leave(self, what: Clip | str) -> None:
        """Give up an entry that was taken and cannot be made."""
        ...


@dataclass
class Filling:
    """One filling of a shelf. encoders: made when they are first asked for, and once."""

    shelf: Shelf
    wanted: Wanted
    encoders: Callable[[], Encoders]
    tell: Listener
    hands: Hands
    filled: Filled = field(default_factory=Filled)
    _done: int = 0
    _total: int = 0

    def run(self, clips: Sequence[Clip], captions: Sequence[str]) -> Filled:
        """Make the missing entries. Raises DataError for encodings that are not finite."""
        self._total = len(clips) + len(captions)
        if self._total == 0:
            return self.filled
        self.encoders = functools.cache(self.encoders)
        self.tell(PhaseStarted(phase=PHASE, total=self._total))
        self._until_none_is_left(list(captions), self._encode_captions)
        self._until_none_is_left(list(clips), self._encode_clips)
        return self.filled

    def _until_none_is_left(self, wanted: list[W], encode: Callable[[list[W]], list[W]]) -> None:
        """Encode, and come back to what other processes were at: it is there then, or has been given up."""
        told = False
        while wanted:
            theirs = encode(wanted)
            if len(theirs) == len(wanted):
                if not told:
                    self.tell(Notice(text=f"cache: waiting for {len(theirs)} that another process makes"))
                    told = True
                time.sleep(WAIT_SECONDS)
            wanted = theirs

    def _encode_captions(self, captions: list[str]) -> list[str]:
        """Make the texts that are ours to make; return those that others are making."""
        theirs = []
        for caption in captions:
            taken = self.shelf.take(caption)
            if taken == "theirs":
                theirs.append(caption)
                continue
            if taken == "ours":
                self.shelf.keep(caption, encoded_caption(caption, self.encoders))
                self.filled.encoded += 1
            self._tell_progress(f"caption: {caption[:60]}")
        return theirs

    def _encode_clips(self, clips: list[Clip]) -> list[Clip]:
        theirs: list[Clip] = []
        together: dict[Bucket, list[tuple[Clip, Tensor]]] = {}
        streams = (self._decoded(items) for items in by_file(clips))
        with closing(ahead_in_each(streams, self.hands.workers, WINDOWS_AHEAD)) as decoded:
            for clip, found in decoded:
                if isinstance(found, Tensor):
                    group = together.setdefault(bucket_of(clip), [])
                    group.append((clip, found))
                    if len(group) == self.hands.encoder_batch:
                        self._encode(together.pop(bucket_of(clip)))
                elif isinstance(found, DataError):
                    self.shelf.leave(clip)
                    self.filled.failed[clip.key] = str(found)
                    self._tell_progress(str(found))
                elif found == "theirs":
                    theirs.append(clip)
                else:
                    self._tell_progress(clip.key)
        for group in together.values():
            self._encode(group)
        return theirs

    def _decoded(self, items: Sequence[Clip]) -> Iterator[tuple[Clip, "Tensor | DataError | Taken"]]:
        """The items of one file, with their pixels where they are ours to encode. Runs in a thread."""
        ours = []
        for item in items:
            taken = self.shelf.take(item)
            if taken == "ours":
                ours.append(item)
            else:
                yield item, taken
        waiting = {item.key: item for item in ours}
        try:
            for item, pixels in pixels_of(ours, self.wanted.fps) if ours else ():
                del waiting[item.key]
                yield item, pixels
        except DataError as error:
            for item in waiting.values():
                yield item, error

    def _encode(self, group: Sequence[tuple[Clip, Tensor]]) -> None:
        clips = [clip for clip, _ in group]
        pixels = torch.cat([found for _, found in group])  # (B, 3, F, H, W)
        for clip, tensors in zip(clips, encoded_pixels(pixels, clips, self.wanted, self.encoders), strict=True):
            self.shelf.keep(clip, tensors)
            self.filled.encoded += 1
            self._tell_progress(clip.key)

    def _tell_progress(self, note: str) -> None:
        self._done += 1
        self.tell(Progress(phase=PHASE, done=self._done, total=self._total, note=note))


def by_file(clips: Sequence[Clip]) -> list[list[Clip]]:
    """The clips in groups that one reading of a file serves, in the order of their first."""
    groups: dict[object, list[Clip]] = {}
    for clip in clips:
        groups.setdefault((clip.path, clip.stride, clip.declared_fps), []).append(clip)
    return list(groups.values())
