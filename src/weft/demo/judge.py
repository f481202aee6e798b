"""Measure whether a clip shows what its caption told: colour, way and shape, in plain numpy.

Only hue against the grey background is looked at, so the check holds under blur but not for textured scenes.
"""

from dataclasses import dataclass

import numpy as np

from weft.demo.shapes import COLORS, SHAPES, SIDE, Scene, centres, coverage

LEAST_CHROMA = 60.0  # of 255; a paler frame shows no coloured shape
LEAST_AREA = 60  # pixels of a 64x64 frame, a fifth of the smallest shape
FARTHEST = 8.0  # pixels of a 64x64 frame, less than half the way to the next cell
HOLLOW = 0.5  # of the wall's chroma, at most, in a ring's middle


@dataclass(frozen=True)
class Verdict:
    """What is right about a clip, and what was seen in it."""

    color: bool
    motion: bool
    shape: bool
    seen_color: str | None  # None when no frame shows a coloured shape
    seen_shape: str | None
    farthest: float  # pixels of a 64x64 frame, the worst distance from the told way

    @property
    def right(self) -> bool:
        return self.color and self.motion and self.shape


def chroma(frame: np.ndarray) -> np.ndarray:
    """How far each pixel (H, W) is from grey: the spread of its channels, in [0, 255]."""
    levels = frame.astype(np.float64)
    return levels.max(-1) - levels.min(-1)


def share_of(frame: np.ndarray) -> np.ndarray | None:
    """How much of each pixel (H, W) the coloured shape covers, in [0, 1]; None when there is none."""
    spread = chroma(frame)
    full = np.percentile(np.sort(spread, axis=None)[-LEAST_AREA:], 50)
    return None if full < LEAST_CHROMA else np.clip(spread / full, 0.0, 1.0)


def direction(rgb: np.ndarray) -> np.ndarray:
    """A colour's hue as a unit vector (3,): its part across the grey axis."""
    across = rgb - rgb.mean()
    return across / max(float(np.linalg.norm(across)), 1e-9)


def nearest_color(frames: np.ndarray, shares: list[np.ndarray | None]) -> str | None:
    """Name the colour whose hue is nearest to the mean of the covered pixels."""
    covered = [frame[share > 0.7] for frame, share in zip(frames, shares, strict=True) if share is not None]
    if not covered:
        return None
    seen = direction(np.concatenate(covered).astype(np.float64).mean(0))
    return max(COLORS, key=lambda name: float(seen @ direction(np.array(COLORS[name], dtype=np.float64))))


def centroid(share: np.ndarray) -> np.ndarray:
    """The mask's centre of mass (2,), down and right in pixels."""
    mask = share > 0.5
    return np.argwhere(mask).mean(0) + 0.5


def likeness(share: np.ndarray, shape: str) -> float:
    """Overlap over union of the mask and the shape drawn with the same area about the same centre."""
    mask = (share > 0.5).astype(np.float64)
    centre, area = centroid(share), mask.sum()
    radius = 10.0
    for _ in range(3):  # pixels quantise the area, so one proportional step is not quite enough
        drawn = coverage(shape, tuple(centre), radius, share.shape)
        radius *= float(np.sqrt(area / max(drawn.sum(), 1.0)))
    drawn = coverage(shape, tuple(centre), radius, share.shape)
    return float(np.minimum(mask, drawn).sum() / np.maximum(mask, drawn).sum())


def is_hollow(share: np.ndarray) -> bool:
    """Whether the background shows in the middle of a wall that goes all the way round."""
    down, right = np.indices(share.shape) + 0.5
    middle = centroid(share)
    far = np.hypot(down - middle[0], right - middle[1])
    hole = share[far < 2.5].mean() < HOLLOW
    angle = np.arctan2(down - middle[0], right - middle[1])
    sectors = np.floor((angle + np.pi) / (2 * np.pi) * 12).astype(int) % 12
    walled = [bool((share[(sectors == i) & (far > 2.5)] > 0.5).any()) for i in range(12)]
    return bool(hole) and sum(walled) >= 11


def seen_shape(shares: list[np.ndarray | None]) -> str | None:
    """Name the shape that most frames resemble; a ring must be hollow, and nothing hollow is another shape."""
    seen = [share for share in shares if share is not None and (share > 0.5).sum() >= LEAST_AREA]
    if not seen:
        return None
    if 2 * sum(is_hollow(share) for share in seen) > len(seen):
        return "ring"
    filled = [shape for shape in SHAPES if shape != "ring"]
    return max(filled, key=lambda shape: sum(likeness(share, shape) for share in seen))


def distance_from_way(shares: list[np.ndarray | None], scene: Scene) -> float:
    """The farthest that the mask strays from the scene's centre in the first, middle and last frame, in pixels."""
    places = centres(scene, len(shares))
    worst = 0.0
    for index in (0, len(shares) // 2, len(shares) - 1):
        share = shares[index]
        if share is None or (share > 0.5).sum() < LEAST_AREA:
            return float("inf")
        at = centroid(share) * SIDE / np.array(share.shape)
        worst = max(worst, float(np.hypot(*(at - places[index]))))
    return worst


def judge(video: np.ndarray, scene: Scene) -> Verdict:
    """Compare uint8 frames (F, 64, 64, 3) with the scene that their caption tells."""
    shares = [share_of(frame) for frame in video]
    color, shape = nearest_color(video, shares), seen_shape(shares)
    farthest = distance_from_way(shares, scene)
    return Verdict(
        color=color == scene.color,
        motion=farthest <= FARTHEST,
        shape=shape == scene.shape,
        seen_color=color,
        seen_shape=shape,
        farthest=farthest,
    )
