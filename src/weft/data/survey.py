"""What training would see: the items that the clips of the sources give, each with its bucket, verdict and reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Literal, Protocol

from weft.data.buckets import Bucket
from weft.data.manifest import IMAGE_ENDINGS, VIDEO_ENDINGS, Media
from weft.errors import DataError
from weft.geometry import VideoGeometry

CLIPS_NAMED = 5  # in an error; a long list hides the rest of the screen


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One row of the survey: an item, which is a window of a clip in a bucket, or a clip that gives none.

    name: of the clip, shared by its items; key: the item's own, such as clip.mp4@12 for the window that begins at frame
    12. frames_at_fps: frames that the clip has at the training rate, every stride-th. 0 where nothing could be read.
    """

    key: str
    name: str
    path: Path
    captions: tuple[str, ...]  # at least one; a draw takes any of them
    media: Media
    source_fps: float = 0.0
    source_frames: int = 0
    width: int = 0  # pixels, as shown
    height: int = 0
    frames_at_fps: int = 0
    stride: int = 1
    declared_fps: float | None = None  # the file's rate, where its timestamps are not to be believed
    start: int = 0  # first frame of the window, counted as frames_at_fps
    bucket: Bucket | None = None
    verdict: Literal["kept", "trimmed", "dropped", "unreadable"]
    reason: str
    repeats: int = 1
    split: Literal["train", "validation", "other share"] = "train"

    @property
    def caption(self) -> str:
        """The first of its captions, which validation uses."""
        return self.captions[0]

    @property
    def usable(self) -> bool:
        return self.bucket is not None and self.verdict in ("kept", "trimmed") and self.split != "other share"


class Wanted(Protocol):
    """What a store keeps the encodings of: clips at a rate and in a geometry, and texts."""

    @property
    def geometry(self) -> VideoGeometry: ...
    @property
    def fps(self) -> float: ...
    @property
    def usable(self) -> Sequence[Clip]: ...
    @property
    def texts(self) -> Iterable[str]:
        """All that a batch may be told, the empty caption aside; a text may come more than once."""
        ...


@dataclass(frozen=True)
class Survey:
    """All items of the sources in the order of the sources. fps: the rate that they are resampled to.

    latent_frames: lengths that a batch may be cut to. notices: what the user should know. problems: what the config
    refuses in these clips, each a sentence. beside: texts that every batch tells beside the captions.
    """

    clips: tuple[Clip, ...]
    geometry: VideoGeometry
    fps: float
    latent_frames: tuple[int, ...] = ()
    notices: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def telling(self, beside: Mapping[str, str]) -> "Survey":
        """The same survey, whose batches tell these texts too."""
        return replace(self, beside=tuple(beside.values()))

    @property
    def texts(self) -> Iterable[str]:
        """The captions of the usable clips, and what is told beside them."""
        return (*(caption for clip in self.usable for caption in clip.captions), *self.beside)

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

    def digest(self) -> str:
        """Hash over what every training item is: key, captions, bucket, repeats, rate. The data as it is trained on."""
        digest = sha256()
        for clip in self.train:
            rate = (clip.stride, clip.declared_fps)
            digest.update(repr((clip.key, clip.captions, clip.bucket, clip.repeats, rate)).encode())
        return digest.hexdigest()

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1) -> int:
        """Optimizer steps until every item was drawn. accumulate: micro-batches per step, over all ranks."""
        return ceil(self.epoch_draws(batch_size) / accumulate)

    def epoch_draws(self, batch_size: int) -> int:
        """Micro-batches until every item was drawn."""
        return sum(ceil(count / batch_size) for count in self.buckets().values())

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
        """Raise DataError when nothing is kept, the config refuses a clip, or more than the budget are unreadable."""
        clips, broken = len({clip.name for clip in self.clips}), {clip.name for clip in self.unreadable}
        if len(broken) > budget:
            raise DataError(
                f"{len(broken)} of {clips} clips cannot be read, more than data.unreadable ({budget}). "
                f"Mend or remove them, or raise the limit:\n{named([c.reason for c in self.unreadable])}"
            )
        if self.problems:
            raise DataError("\n".join(self.problems))
        if not self.clips:
            endings = ", ".join((*VIDEO_ENDINGS, *IMAGE_ENDINGS))
            raise DataError(f"data.sources name no clip. Looked for files ending in {endings}.")
        if not self.train:
            raise DataError(f"None of {clips} clips is left to train on. {self._why_none()}")

    def _why_none(self) -> str:
        lost = [f"{clip.key}: {clip.reason}" for clip in self.clips if clip.verdict in ("dropped", "unreadable")]
        if any(clip.split == "other share" for clip in self.clips):
            return "The items go to other shares; make data.share's second number smaller."
        return f"Change data.buckets or the sources:\n{named(lost)}" if lost else "All are held out for validation."


def bucket_of(clip: Clip) -> Bucket:
    """The bucket of a clip that is usable."""
    assert clip.bucket is not None, f"{clip.key} was {clip.verdict}"
    return clip.bucket


def named(sentences: Sequence[str]) -> str:
    """The first sentences, one on a line, and how many more there are."""
    more = len(sentences) - CLIPS_NAMED
    rest = [f"  ... and {more} more"] if more > 0 else []
    return "\n".join([f"  {sentence}" for sentence in sentences[:CLIPS_NAMED]] + rest)
