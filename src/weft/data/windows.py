"""Which stretches of a clip are used, each an item of its own. Frames are counted at the training rate. No torch."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from weft.data.buckets import Buckets
from weft.data.sampler import chance
from weft.geometry import VideoGeometry
from weft.section import Section


class Head(Section):
    """The first frames of a clip; the rest is not used."""

    kind: Literal["head"] = "head"

    def shapes(self, buckets: Buckets, frames: int, geometry: VideoGeometry) -> Buckets:
        """The buckets that a clip of so many frames is offered."""
        return buckets

    def starts(self, frames: int, length: int, name: str) -> list[int]:
        """First frames of the windows of a length in a clip of so many frames, at least as many. name: the clip's."""
        return [0]


class Chunk(Head):
    """One window after another, without overlap; what is left at the end is not used."""

    kind: Literal["chunk"] = "chunk"

    def starts(self, frames: int, length: int, name: str) -> list[int]:
        return list(range(0, frames - length + 1, length))


class Slide(Head):
    """Windows that begin every so many frames, as long as they fit."""

    kind: Literal["slide"] = "slide"
    step: PositiveInt = Field(description="Frames from the beginning of one window to that of the next.")

    def starts(self, frames: int, length: int, name: str) -> list[int]:
        return list(range(0, frames - length + 1, self.step))


class Uniform(Head):
    """So many windows, spread evenly from the beginning to the end."""

    kind: Literal["uniform"] = "uniform"
    count: PositiveInt = Field(description="Windows of each clip; fewer where they would begin at the same frame.")

    def starts(self, frames: int, length: int, name: str) -> list[int]:
        gaps = max(1, self.count - 1)
        return list(dict.fromkeys(i * (frames - length) // gaps for i in range(self.count)))


class Random(Head):
    """So many windows anywhere in the clip, drawn once: the same in every epoch and every run of this seed."""

    kind: Literal["random"] = "random"
    count: PositiveInt = Field(default=1, description="Windows of each clip; fewer where the same one is drawn twice.")
    seed: int = Field(default=0, description="Decides where they begin; another seed, other windows to encode.")

    def starts(self, frames: int, length: int, name: str) -> list[int]:
        places = frames - length + 1
        return sorted({int(chance(self.seed, "window", name, length, i) * places) for i in range(self.count)})


class Full(Head):
    """As many frames as the clip has, cut to whole latent frames, up to the longest of buckets.frames."""

    kind: Literal["full"] = "full"

    def shapes(self, buckets: Buckets, frames: int, geometry: VideoGeometry) -> Buckets:
        longest = geometry.longest_clip(min(frames, max(buckets.frames)))
        counts = tuple(range(1, longest + 1, geometry.time_stride))
        return buckets.model_copy(update={"frames": counts or buckets.frames})


Extraction = Annotated[Head | Chunk | Slide | Uniform | Random | Full, Field(discriminator="kind")]


def covered(starts: Sequence[int], length: int) -> int:
    """Frames that stand in one or more of the windows. starts: ascending."""
    ends = [start + length for start in starts]
    overlaps = [max(0, end - start) for end, start in zip(ends[:-1], starts[1:], strict=True)]
    return len(starts) * length - sum(overlaps)
