"""What training would see: every clip of the sources probed, with its bucket, its verdict and the reason."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weft.data.buckets import Bucket, kept_share
from weft.data.manifest import IMAGE_ENDINGS, VIDEO_ENDINGS, Entry, Media, read_source
from weft.data.media import Probe, probe_image, probe_video
from weft.errors import ConfigError, DataError
from weft.geometry import VideoGeometry

if TYPE_CHECKING:
    from weft.data.video import Source, VideoData

PROBING_THREADS = 4
CLIPS_NAMED = 5  # in an error; a long list hides the rest of the screen
LEAST_CROP_SAID = 0.01  # of the picture


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One row of the survey. frames_at_fps: frames that it has at the training rate. 0 where nothing could be read."""

    key: str
    path: Path
    caption: str
    media: Media
    source_fps: float = 0.0
    source_frames: int = 0
    width: int = 0  # pixels, as shown
    height: int = 0
    frames_at_fps: int = 0
    bucket: Bucket | None = None
    verdict: Literal["kept", "trimmed", "dropped", "unreadable"]
    reason: str
    repeats: int = 1
    split: Literal["train", "validation"] = "train"

    @property
    def usable(self) -> bool:
        return self.bucket is not None and self.verdict in ("kept", "trimmed")


@dataclass(frozen=True)
class Survey:
    """All clips of the sources in the order of the sources. fps: the rate that they are resampled to."""

    clips: tuple[Clip, ...]
    geometry: VideoGeometry
    fps: float

    @property
    def usable(self) -> tuple[Clip, ...]:
        return tuple(clip for clip in self.clips if clip.usable)

    @property
    def train(self) -> tuple[Clip, ...]:
        return tuple(clip for clip in self.usable if clip.split == "train")

    @property
    def validation(self) -> tuple[Clip, ...]:
        return tuple(clip for clip in self.usable if clip.split == "validation")

    @property
    def unreadable(self) -> tuple[Clip, ...]:
        return tuple(clip for clip in self.clips if clip.verdict == "unreadable")

    def buckets(self) -> dict[Bucket, int]:
        """Items per epoch in each bucket of the training clips, repeats counted, largest bucket first."""
        counts: Counter[Bucket] = Counter()
        for clip in self.train:
            counts[bucket_of(clip)] += clip.repeats
        return dict(sorted(counts.items(), key=lambda item: (-item[0].tokens, item[0])))

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1) -> int:
        """Optimizer steps until every item was drawn. accumulate: micro-batches per step, over all ranks."""
        micro_batches = sum(ceil(count / batch_size) for count in self.buckets().values())
        return ceil(micro_batches / accumulate)

    def without(self, failures: dict[str, str]) -> "Survey":
        """The same survey where the clips of these keys are unreadable for these reasons."""
        clips = tuple(
            replace(clip, verdict="unreadable", bucket=None, reason=failures[clip.key])
            if clip.key in failures
            else clip
            for clip in self.clips
        )
        return replace(self, clips=clips)

    def refuse_when_unusable(self, budget: int) -> None:
        """Raise DataError when nothing is kept, or more clips than the budget are unreadable."""
        if len(self.unreadable) > budget:
            raise DataError(
                f"{len(self.unreadable)} of {len(self.clips)} clips cannot be read, more than data.unreadable "
                f"({budget}). Mend or remove them, or raise the limit:\n{_named([c.reason for c in self.unreadable])}"
            )
        if not self.clips:
            endings = ", ".join((*VIDEO_ENDINGS, *IMAGE_ENDINGS))
            raise DataError(f"data.sources name no clip. Looked for files ending in {endings}.")
        if not self.train:
            lost = [f"{clip.key}: {clip.reason}" for clip in self.clips if not clip.usable]
            why = f"Change data.buckets or the sources:\n{_named(lost)}" if lost else "All are held out for validation."
            raise DataError(f"None of {len(self.clips)} clips is left to train on. {why}")


def bucket_of(clip: Clip) -> Bucket:
    """The bucket of a clip that is usable."""
    assert clip.bucket is not None, f"{clip.key} was {clip.verdict}"
    return clip.bucket


def survey(data: "VideoData", geometry: VideoGeometry) -> Survey:
    """Probe every clip of the sources. Raises ConfigError for impossible shapes, DataError for manifests, captions."""
    problems = data.buckets.problems(geometry)
    if problems:
        raise ConfigError(*(f"data.{problem}" for problem in problems))
    fps = data.fps or geometry.fps
    asked: list[tuple[Clip, Entry]] = []
    taken: set[str] = set()
    for index, source in enumerate((*data.sources, *data.validation_sources)):
        held_out = index >= len(data.sources)
        for entry in read_source(source.path, source.caption_extension):
            clip = _asked(entry, index, taken, source, data.caption_prefix)
            asked.append((replace(clip, split="validation") if held_out else clip, entry))
    if data.missing_captions == "error":
        _refuse_missing_captions([entry for _, entry in asked], data.sources[0].caption_extension)

    def judged(row: tuple[Clip, Entry]) -> Clip:
        clip, entry = row
        if entry.caption is None and data.missing_captions == "drop":
            return replace(clip, verdict="dropped", reason="It has no caption, and data.missing_captions is 'drop'.")
        return _judged(clip, entry, data, geometry, fps)

    with ThreadPoolExecutor(PROBING_THREADS) as pool:
        clips = list(pool.map(judged, asked))
    return Survey(tuple(_held_out(_told_of_leaks(clips), data.validation_items)), geometry, fps)


def _asked(entry: Entry, index: int, taken: set[str], source: "Source", prefix: str) -> Clip:
    """A clip before its probe, under a key that no earlier clip has taken."""
    key = entry.key if entry.key not in taken else f"{entry.key}#{index}"
    taken.add(key)
    caption = f"{prefix} {entry.caption or ''}".strip()
    return Clip(
        key=key, path=entry.path, caption=caption, media=entry.media, verdict="unreadable", reason=entry.problem,
        repeats=source.repeats,
    )  # fmt: skip


def _judged(clip: Clip, entry: Entry, data: "VideoData", geometry: VideoGeometry, fps: float) -> Clip:
    """The clip with what its file holds, its bucket and the verdict."""
    if entry.problem:
        return clip
    try:
        probe = probe_image(clip.path) if clip.media == "image" else probe_video(clip.path)
    except DataError as error:
        return replace(clip, reason=str(error))
    frames = 1 if clip.media == "image" else probe.frames_at(fps)
    seen = replace(
        clip, source_fps=probe.fps, source_frames=probe.frames, width=probe.width, height=probe.height,
        frames_at_fps=frames,
    )  # fmt: skip
    shape = (frames, probe.width, probe.height)
    is_image = clip.media == "image"
    bucket = data.buckets.choose(*shape, geometry, is_image=is_image)
    if bucket is None:
        return replace(seen, verdict="dropped", reason=data.buckets.why_not(*shape, geometry, is_image=is_image))
    verdict = "trimmed" if frames > bucket.frames else "kept"
    return replace(seen, bucket=bucket, verdict=verdict, reason=_how_it_fits(probe, frames, bucket, fps))


def _how_it_fits(probe: Probe, frames: int, bucket: Bucket, fps: float) -> str:
    """One or two sentences: which frames are used, and what becomes of the picture."""
    if probe.duration == 0:
        used = "One picture is one frame."
    elif frames > bucket.frames:
        used = f"{frames} frames at {fps:g} fps become {bucket.frames}; the last {frames - bucket.frames} are not used."
    else:
        used = f"All {frames} frames at {fps:g} fps are used."
    if (probe.width, probe.height) == (bucket.width, bucket.height):
        return used
    cut = 1 - kept_share(probe.width, probe.height, bucket.width, bucket.height)
    crop = f", and {cut:.0%} of the picture is cut off" if cut >= LEAST_CROP_SAID else ""
    return f"{used} {probe.width}x{probe.height} becomes {bucket.width}x{bucket.height}{crop}."


def _refuse_missing_captions(entries: Sequence[Entry], extension: str) -> None:
    missing = [entry.place for entry in entries if entry.caption is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(entries)} clips have no caption, or an empty one. Write it into a file of the "
            f"same name ending in {extension}, or under 'text' in the manifest; or set data.missing_captions to "
            f"'empty' or 'drop':\n{_named(missing)}"
        )


def _told_of_leaks(clips: list[Clip]) -> list[Clip]:
    """The clips, where a validation clip that is also trained on says so."""
    trained = {clip.path.resolve() for clip in clips if clip.split == "train" and clip.usable}
    warning = "It is trained on as well, so its loss says nothing about new clips."
    return [
        replace(clip, reason=f"{clip.reason} {warning}")
        if clip.split == "validation" and clip.usable and clip.path.resolve() in trained
        else clip
        for clip in clips
    ]


def _held_out(clips: list[Clip], count: int) -> list[Clip]:
    """The clips, with `count` usable ones moved to validation: those whose keys have the smallest hashes."""
    usable = [clip.key for clip in clips if clip.usable and clip.split == "train"]
    chosen = set(sorted(usable, key=lambda key: hashlib.sha256(key.encode()).digest())[:count])
    return [replace(clip, split="validation") if clip.key in chosen else clip for clip in clips]


def _named(sentences: Sequence[str]) -> str:
    """The first sentences, one on a line, and how many more there are."""
    more = len(sentences) - CLIPS_NAMED
    rest = [f"  ... and {more} more"] if more > 0 else []
    return "\n".join([f"  {sentence}" for sentence in sentences[:CLIPS_NAMED]] + rest)
