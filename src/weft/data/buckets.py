"""Which shapes (frames, height, width) a clip may take under a token budget. Pure arithmetic, no torch."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from weft.geometry import VideoGeometry
from weft.section import Section

NEAR = 0.05  # of token counts: by as much more they cost a step hardly more time


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape in pixels and what it costs: clips of one bucket can stand in one batch."""

    frames: int
    height: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class Shapes(Section):
    """Shapes (frames, height, width): one idea, a shape is admitted when its token count fits the budget."""

    sides: tuple[PositiveInt, ...] = Field(
        default=(),
        description="Nominal square sides in pixels: the area is side^2 at most, the aspect ratio is the clip's; of "
        "captions alone it is one of data.aspects. Give either sides or sizes.",
    )
    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=(),
        description="Explicit (width, height) in pixels; a clip takes the one that cuts off least of its picture.",
    )
    frames: tuple[PositiveInt, ...] = Field(
        min_length=1,
        description="Allowed frame counts of the form 4k+1, counted at the training fps; images always use 1.",
    )
    token_budget: PositiveInt | None = Field(
        default=None, description="Most tokens one clip may cost in the transformer; null admits every shape."
    )

    @model_validator(mode="after")
    def _one_way_to_say_size(self) -> Self:
        if bool(self.sides) == bool(self.sizes):
            raise ValueError("give exactly one of 'sides' (square sides, aspect kept) and 'sizes' (width, height)")
        return self

    def problems(self, geometry: VideoGeometry) -> list[str]:
        """What cannot be right for this model, each as a sentence that names the nearest valid values."""
        found = []
        for frames in self.frames:
            below = geometry.longest_clip(frames)
            if below != frames:
                found.append(
                    f"buckets.frames: {frames} frames do not make whole latent frames; counts have the form "
                    f"{geometry.time_stride}k+1. The nearest are {below} and {below + geometry.time_stride}."
                )
        return found + picture_problems(self.sides, self.sizes, geometry)

    def every(self, aspects: Sequence[tuple[int, int]], geometry: VideoGeometry) -> list[Bucket]:
        """Every shape that there is, over the budget or not: the sizes, or the sides in each aspect ratio (width,
        height), with each frame count."""
        found = [size_of_area(side, w / h, geometry.side_multiple) for side in self.sides for w, h in aspects]
        sizes = [size for size in (*self.sizes, *found) if size is not None]
        shapes = [Bucket(count, h, w, geometry.tokens(count, h, w)) for w, h in sizes for count in self.frames]
        return list(dict.fromkeys(shapes))


class Buckets(Shapes):
    """The shapes that clips may take, and how a clip finds its own among them."""

    image_sides: tuple[PositiveInt, ...] = Field(
        default=(), description="Nominal square sides for images; neither these nor image_sizes: those of videos."
    )
    image_sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=(), description="Explicit (width, height) for images."
    )
    upscale: bool = Field(
        default=False,
        description="Enlarge clips that are smaller than the bucket. If not, they keep a smaller size or are dropped.",
    )
    choice: Literal["largest", "each_size", "each_frames", "each"] = Field(
        default="largest",
        description="Of the shapes that it can fill within the budget a clip takes the one of most tokens; or it is an "
        "item in the best one of each size, in the best one of each frame count, or in all of them.",
    )
    crop_slack: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Among explicit sizes, one that cuts off this share more of the picture than the best still "
        "competes; 1 lets every clip be cut to every size.",
    )

    @model_validator(mode="after")
    def _one_way_to_say_the_size_of_images(self) -> Self:
        if self.image_sides and self.image_sizes:
            raise ValueError("image_sides: give one of 'image_sides' and 'image_sizes', not both")
        return self

    def problems(self, geometry: VideoGeometry) -> list[str]:
        """What cannot be right for this model, of images too."""
        return super().problems(geometry) + picture_problems(self.image_sides, self.image_sizes, geometry)

    def choose(
        self, frames: int, width: int, height: int, geometry: VideoGeometry, *, is_image: bool = False
    ) -> Bucket | None:
        """The admitted shape with most tokens for a clip of so many frames and pixels; ties go to more frames."""
        return next(iter(self._admitted(frames, width, height, geometry, is_image=is_image)), None)

    def choices(
        self, frames: int, width: int, height: int, geometry: VideoGeometry, *, is_image: bool = False
    ) -> list[Bucket]:
        """The shapes that `choice` gives a clip, those with most tokens first; empty when none is admitted."""
        best: dict[object, Bucket] = {}
        for bucket in self._admitted(frames, width, height, geometry, is_image=is_image):
            size = (bucket.width, bucket.height)
            one_of = {"largest": None, "each_size": size, "each_frames": bucket.frames, "each": bucket}[self.choice]
            best.setdefault(one_of, bucket)
        return list(best.values())

    def _admitted(
        self, frames: int, width: int, height: int, geometry: VideoGeometry, *, is_image: bool
    ) -> list[Bucket]:
        """Every shape that the clip can fill within the budget, best first."""
        shapes = self._shapes(frames, width, height, geometry, is_image=is_image)
        admitted = [b for b in shapes if self.token_budget is None or b.tokens <= self.token_budget]
        # The last of the three decides between a landscape and a portrait size of equal cost.
        return sorted(
            admitted, key=lambda b: (b.tokens, b.frames, kept_share(width, height, b.width, b.height)), reverse=True
        )

    def why_not(self, frames: int, width: int, height: int, geometry: VideoGeometry, *, is_image: bool = False) -> str:
        """The reason, as a sentence, why `choose` finds nothing."""
        if not is_image and frames < min(self.frames):
            return f"It has {frames} frames at the training rate; the shortest bucket has {min(self.frames)}."
        shapes = self._shapes(frames, width, height, geometry, is_image=is_image)
        if not shapes:
            m, (_, sizes) = geometry.side_multiple, self._for(is_image)
            least_w, least_h = min(sizes, key=lambda size: size[0] * size[1]) if sizes else (m, m)
            return (
                f"{width}x{height} is smaller than the smallest size {least_w}x{least_h}, and buckets.upscale is off."
            )
        least = min(shapes, key=lambda b: b.tokens)
        return f"Its cheapest shape {least} has {least.tokens:,} tokens, above token_budget {self.token_budget:,}."

    def _shapes(self, frames: int, width: int, height: int, geometry: VideoGeometry, *, is_image: bool) -> list[Bucket]:
        """Every shape that the clip can fill, over the budget or not."""
        return [
            Bucket(count, h, w, geometry.tokens(count, h, w))
            for w, h in self._pictures(width, height, geometry, is_image)
            for count in ((1,) if is_image else self.frames)
            if count <= frames
        ]

    def _for(self, is_image: bool) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        """(sides, sizes), one of them empty, for an image or a video."""
        own = (self.image_sides, self.image_sizes)
        return own if is_image and any(own) else (self.sides, self.sizes)

    def _pictures(self, width: int, height: int, geometry: VideoGeometry, is_image: bool) -> list[tuple[int, int]]:
        """(width, height) of the pictures that may be cut out of one of width x height."""
        sides, sizes = self._for(is_image)
        if sides:
            room = None if self.upscale else (width, height)
            found = [size_of_area(side, width / height, geometry.side_multiple, room) for side in sides]
            return [size for size in dict.fromkeys(found) if size is not None]
        fitting = [(w, h) for w, h in sizes if self.upscale or (w <= width and h <= height)]
        best = max((kept_share(width, height, w, h) for w, h in fitting), default=0.0)
        return [(w, h) for w, h in fitting if kept_share(width, height, w, h) >= best - self.crop_slack]


def lengths_line(shapes: Sequence[Bucket]) -> str:
    """How many token counts the shapes have, for it is by these, and not by shapes, that blocks are compiled and
    recorded; and which of them are so near one another that one size would do. Nothing for a single shape."""
    counts = sorted({shape.tokens for shape in shapes})
    if len(shapes) < 2:
        return ""
    many = f"{len(shapes)} shapes have {len(counts)} token count{'s' if len(counts) > 1 else ''}"
    if len(counts) == 1:
        return f"{many}: {counts[0]:,}."
    near = [(a, b) for a, b in pairwise(counts) if b <= a * (1 + NEAR)]
    line = f"{many}, from {counts[0]:,} to {counts[-1]:,}."
    if not near:
        return line
    a, b = near[0]
    return f"{line} Some lie within {NEAR:.0%} of another, as {a:,} of {b:,}: fewer shapes would compile less."


def picture_problems(sides: Sequence[int], sizes: Sequence[tuple[int, int]], geometry: VideoGeometry) -> list[str]:
    """Which sides and sizes (width, height) the model cannot take, each as a sentence."""
    found, m = [], geometry.side_multiple
    for width, height in sizes:
        if width % m or height % m:
            near = f"{max(m, round(width / m) * m)}x{max(m, round(height / m) * m)}"
            found.append(
                f"buckets.sizes: {width}x{height} is refused, because width and height must be multiples of {m} "
                f"for this model. The nearest is {near}."
            )
    found += [
        f"buckets.sides: {side} is less than {m} pixels, the smallest side of this model. Use {m} or more."
        for side in sides
        if side < m
    ]
    return found


def kept_share(width: int, height: int, new_width: int, new_height: int) -> float:
    """The share of a picture that is left when it covers new_width x new_height and the rest is cut off."""
    scale = max(new_width / width, new_height / height)
    return (new_width * new_height) / (width * height * scale * scale)


def size_of_area(
    side: int, aspect: float, multiple: int, room: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """(width, height) in multiples, of an area up to side^2, whose ratio is nearest to the aspect width/height.

    room: the (width, height) that must not be exceeded, so that nothing is enlarged; None when it may be.
    Returns None when not even one multiple has room.
    """
    most_w, most_h = room or (side * side, side * side)

    def size(w: int) -> tuple[int, int]:
        return w, min(side * side // w, most_h) // multiple * multiple

    # The ratio w/h only grows with w, so the nearest one stands on either side of where it crosses the aspect.
    widths = range(multiple, min(most_w, side * side // multiple) + 1, multiple) if most_h >= multiple else range(0)
    cross = bisect_left(widths, aspect, key=lambda w: w / size(w)[1])
    near = [size(w) for w in widths[max(cross - 1, 0) : cross + 1]]
    return min(near, key=lambda wh: (abs(log(wh[0] / wh[1] / aspect)), -wh[0] * wh[1]), default=None)
