"""A small world of moving shapes: scenes, their captions and their frames, in plain numpy.

Cells are (row, column) of a 3x3 grid; lengths are pixels of a 64x64 frame and scale with the shorter side.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SIDE = 64  # pixels, the side that lengths refer to
FRAMES = 9
FPS = 8
CELL_CENTRES = (14.0, 32.0, 50.0)  # pixels: a shape of radius 12 in an outer cell keeps 2 pixels of margin
RADII = (9.0, 12.0)  # pixels; smaller shapes drown in an 8x autoencoder
JITTER = 1.5  # pixels

KNOWN_SHAPES = ("circle", "square", "triangle")
RING = "ring"
TRIGGER = "zorp"  # names the ring; the base has seen neither
SHAPES = (*KNOWN_SHAPES, RING)
RING_OUTER = 1.1  # over the scene's radius, so that the hole is wide enough for an 8x autoencoder
RING_HOLE = 0.5  # inner radius over outer radius

COLORS = {
    "red": (220, 35, 35),
    "green": (35, 185, 55),
    "blue": (45, 75, 230),
    "yellow": (240, 215, 35),
    "magenta": (225, 45, 215),
    "cyan": (35, 210, 225),
}
BACKGROUNDS = {"black": (8, 8, 8), "white": (245, 245, 245)}

TEMPLATES = (
    "a {color} {noun} {motion}, on a {background} background",
    "on a {background} background, a {color} {noun} {motion}",
    "a video of a {color} {noun} that {motion}, {background} background",
    "a {color} {noun} {motion}",  # says no background, which means black
)

HELD_OUT_SHARE = 0.15


class Track(NamedTuple):
    """A straight way through the grid: the cells (row, column) of the first and the last frame."""

    start: tuple[int, int]
    end: tuple[int, int]

    def words(self) -> str:
        """Say the motion as a caption does, e.g. "moves from left to right at the top"."""
        rows = ("at the top", "in the middle", "at the bottom")
        columns = ("on the left", "in the middle", "on the right")
        (row, column), (last_row, last_column) = self
        if self.start == self.end:
            return f"rests {columns[column] if row == 1 else rows[row]}"
        if row == last_row:
            way = "from left to right" if column < last_column else "from right to left"
            return f"moves {way} {rows[row]}"
        way = "from top to bottom" if row < last_row else "from bottom to top"
        return f"moves {way} {columns[column]}"


TRACKS = (
    *(Track((lane, a), (lane, b)) for lane in range(3) for a, b in ((0, 2), (2, 0))),
    *(Track((a, lane), (b, lane)) for lane in range(3) for a, b in ((0, 2), (2, 0))),
    *(Track(cell, cell) for cell in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))),
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One shape on its way: what a caption says, and the small freedom that it leaves."""

    shape: str
    color: str
    track: Track
    background: str = "black"
    radius: float = 10.5  # pixels, of the circle; other shapes have about its area
    offset: tuple[float, float] = (0.0, 0.0)  # pixels down and right of the cells' centres

    def caption(self, template: int = 0, noun: str | None = None) -> str:
        """Describe the scene; `noun` stands in for the shape's own (a ring's own is the trigger word).

        Raises: ValueError when the template leaves the background unsaid and it is not black.
        """
        text = TEMPLATES[template]
        if self.background != "black" and "{background}" not in text:
            raise ValueError(f"template {template} says no background, so it cannot describe a {self.background} one")
        own = TRIGGER if self.shape == RING else self.shape
        return text.format(color=self.color, noun=noun or own, motion=self.track.words(), background=self.background)


def centres(scene: Scene, frames: int = FRAMES) -> np.ndarray:
    """The shape's centre (F, 2) as (down, right) in pixels of a 64x64 frame."""
    ends = np.array([[CELL_CENTRES[row], CELL_CENTRES[column]] for row, column in scene.track])
    time = np.linspace(0.0, 1.0, frames)[:, None]
    return ends[0] * (1 - time) + ends[1] * time + np.array(scene.offset)


def signed_distance(shape: str, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """Pixels to the shape's edge, negative inside, of points given from the shape's centre of mass."""
    if shape == "circle":
        return np.hypot(down, right) - radius
    if shape == RING:
        wall = RING_OUTER * radius * (1 - RING_HOLE) / 2  # half of its thickness
        return np.abs(np.hypot(down, right) - (RING_OUTER * radius - wall)) - wall
    if shape == "square":
        return np.maximum(np.abs(down), np.abs(right)) - 0.9 * radius
    if shape == "triangle":
        # Upright and equilateral: each side stands 0.62 radii from the centre of mass.
        slope = np.abs(right) * np.sqrt(0.75) - down * 0.5
        return np.maximum(down, slope) - 0.62 * radius
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def coverage(shape: str, centre: tuple[float, float], radius: float, size: tuple[int, int]) -> np.ndarray:
    """The share (H, W) of each pixel that the shape covers; lengths in pixels of this very frame."""
    down = np.arange(size[0])[:, None] + 0.5 - centre[0]
    right = np.arange(size[1])[None, :] + 0.5 - centre[1]
    return np.clip(0.5 - signed_distance(shape, down, right, radius), 0.0, 1.0)


def render(scene: Scene, frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Draw the scene, antialiased: uint8 (F, H, W, 3)."""
    scale = min(height, width) / SIDE
    places = centres(scene, frames) * np.array([height, width]) / SIDE
    share = np.stack([coverage(scene.shape, tuple(at), scene.radius * scale, (height, width)) for at in places])
    paint, ground = np.array(COLORS[scene.color]), np.array(BACKGROUNDS[scene.background])
    return np.rint(ground + share[..., None] * (paint - ground)).astype(np.uint8)


def every_scene(shapes: Sequence[str] = KNOWN_SHAPES) -> list[Scene]:
    """All combinations of shape, colour, track and background, each at the middle size and place."""
    return [
        Scene(shape=shape, color=color, track=track, background=background)
        for shape, color, track, background in itertools.product(shapes, COLORS, TRACKS, BACKGROUNDS)
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether this colour, shape and track are kept from training together, on either background."""
    key = f"{scene.color} {scene.shape} {scene.track.words()}"
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return first < HELD_OUT_SHARE * 2**32


def random_scene(rng: np.random.Generator, shapes: Sequence[str] = KNOWN_SHAPES, *, held_out: bool = False) -> Scene:
    """Draw a scene from one side of the split, with its size and place varied."""
    while True:
        scene = Scene(
            shape=shapes[int(rng.integers(len(shapes)))],
            color=tuple(COLORS)[int(rng.integers(len(COLORS)))],
            track=TRACKS[int(rng.integers(len(TRACKS)))],
            background=tuple(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))],
            radius=float(rng.uniform(*RADII)),
            offset=(float(rng.uniform(-JITTER, JITTER)), float(rng.uniform(-JITTER, JITTER))),
        )
        if is_held_out(scene) == held_out:
            return scene


def random_caption(scene: Scene, rng: np.random.Generator, noun: str | None = None) -> str:
    """Describe the scene in one of the phrasings that fit it."""
    fitting = [i for i, text in enumerate(TEMPLATES) if scene.background == "black" or "{background}" in text]
    return scene.caption(fitting[int(rng.integers(len(fitting)))], noun)
