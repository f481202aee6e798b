"""What becomes of one clip: the buckets that it fits, the windows that are used of it, and the reason in words."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from weft.data.buckets import Bucket, Buckets, kept_share
from weft.data.manifest import Entry
from weft.data.media import Probe, exact_fps, probe_image, probe_video
from weft.data.survey import Clip
from weft.data.windows import Extraction, covered
from weft.errors import DataError
from weft.geometry import VideoGeometry

if TYPE_CHECKING:
    from weft.data.video import Source

LEAST_CROP_SAID = 0.01  # of the picture


@dataclass(frozen=True)
class Asked:
    """A clip that a source names, before its file is looked into, and how that source wants it used."""

    clip: Clip
    entry: Entry
    source: "Source"
    buckets: Buckets
    extraction: Extraction
    geometry: VideoGeometry
    fps: float  # of training

    @property
    def rate(self) -> Fraction:
        """Frames a second that are taken."""
        return exact_fps(self.fps) / self.source.stride

    def rate_words(self) -> str:
        whole = f"{self.fps:g} fps"
        return whole if self.source.stride == 1 else f"{whole}, one of every {self.source.stride},"


@dataclass(frozen=True)
class Seen:
    """What a clip's file holds. frames: at the rate that is taken."""

    probe: Probe
    frames: int
    is_image: bool


def items_of(asked: Asked) -> list[Clip]:
    """The items that a clip gives, each with its bucket and window; one row with the reason when it gives none."""
    clip = asked.clip
    if asked.entry.problem:
        return [clip]
    is_image = clip.media == "image"
    try:
        probe = probe_image(clip.path) if is_image else probe_video(clip.path)
    except DataError as error:
        return [replace(clip, reason=str(error))]
    declared = asked.source.source_fps
    if declared and not is_image:
        probe = probe.declared(declared)
    seen = Seen(probe, 1 if is_image else probe.frames_at_rate(asked.rate), is_image)
    row = replace(
        clip, source_fps=probe.fps, source_frames=probe.frames, width=probe.width, height=probe.height,
        frames_at_fps=seen.frames, stride=1 if is_image else asked.source.stride,
        declared_fps=None if is_image else declared,
    )  # fmt: skip
    shape = (seen.frames, probe.width, probe.height)
    offered = asked.extraction.shapes(asked.buckets, seen.frames, asked.geometry)
    found = offered.choices(*shape, asked.geometry, is_image=is_image)
    if not found:
        reason = asked.buckets.why_not(*shape, asked.geometry, is_image=is_image)
        return [replace(row, verdict="dropped", reason=reason)]
    return [item for bucket in found for item in _windows(asked, row, seen, bucket, len(found) > 1)]


def is_too_short(clip: Clip, buckets: Buckets) -> bool:
    """Whether a clip was dropped because it is shorter than every bucket."""
    return clip.verdict == "dropped" and clip.media == "video" and 0 < clip.frames_at_fps < min(buckets.frames)


def _windows(asked: Asked, row: Clip, seen: Seen, bucket: Bucket, is_one_of_several: bool) -> list[Clip]:
    """The items of one bucket."""
    starts = [0] if seen.is_image else asked.extraction.starts(seen.frames, bucket.frames, row.name)
    used = covered(starts, bucket.frames)
    verdict = "trimmed" if used < seen.frames else "kept"
    shape = f":{bucket}" if is_one_of_several else ""
    return [
        replace(
            row,
            key=f"{row.name}{f'@{start}' if start else ''}{shape}",
            start=start,
            bucket=bucket,
            verdict=verdict,
            reason=f"{_use(asked, seen, bucket, starts, start)}{_fit(seen.probe, bucket)}",
        )
        for start in starts
    ]


def _use(asked: Asked, seen: Seen, bucket: Bucket, starts: list[int], start: int) -> str:
    """Which frames are used, as a sentence."""
    frames, rate = seen.frames, asked.rate_words()
    if seen.is_image:
        return "One picture is one frame."
    if frames == bucket.frames:
        return f"All {frames} frames at {rate} are used."
    if starts == [0]:
        unused = frames - bucket.frames
        return f"{frames} frames at {rate} become {bucket.frames}; the last {unused} are not used."
    used = covered(starts, bucket.frames)
    of_all = f" {len(starts)} windows show {used} of them." if len(starts) > 1 else ""
    return f"Frames {start} to {start + bucket.frames - 1} of {frames} at {rate} are used.{of_all}"


def _fit(probe: Probe, bucket: Bucket) -> str:
    """What becomes of the picture, as a further sentence."""
    if (probe.width, probe.height) == (bucket.width, bucket.height):
        return ""
    cut = 1 - kept_share(probe.width, probe.height, bucket.width, bucket.height)
    crop = f", and {cut:.0%} of the picture is cut off" if cut >= LEAST_CROP_SAID else ""
    return f" {probe.width}x{probe.height} becomes {bucket.width}x{bucket.height}{crop}."
