"""Clips far wider than the captions' world, so that the autoencoder also keeps what the base never drew."""

import numpy as np

from weft.demo.shapes import FRAMES, SHAPES, SIDE, coverage, random_scene, render


def polygon_coverage(rng: np.random.Generator, places: np.ndarray, radius: float) -> np.ndarray:
    """The share (F, H, W) that a random convex polygon or star covers, turning slowly about `places` (F, 2)."""
    corners = int(rng.integers(3, 8))
    star = rng.random() < 0.5
    inner = rng.uniform(0.4, 0.7) if star else 1.0
    turn = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(-1, 1), len(places))
    grid = np.arange(SIDE) + 0.5
    down = grid[None, :, None] - places[:, 0, None, None]
    right = grid[None, None, :] - places[:, 1, None, None]
    sector = np.pi / corners
    angle = np.mod(np.arctan2(down, right) + turn[:, None, None], 2 * sector) - sector
    # Between a tip (radius, at the sector's edge) and a notch (inner radius, in its middle) the edge is a line.
    along, across = np.hypot(down, right) * np.cos(angle), np.hypot(down, right) * np.abs(np.sin(angle))
    notch = radius * inner * (1.0 if star else np.cos(sector))
    tip = radius * np.array([np.cos(sector), np.sin(sector)])
    normal = np.array([tip[1], notch - tip[0]])
    normal /= np.hypot(*normal)
    return np.clip(0.5 - ((along - notch) * normal[0] + across * normal[1]), 0, 1)


def random_ground(rng: np.random.Generator) -> np.ndarray:
    """A background (H, W, 3) in [0, 255]: plain, a gradient or coarse noise."""
    kind = rng.choice(3, p=(0.45, 0.35, 0.2))
    first, second = rng.uniform(0, 255, (2, 3))
    if kind == 0:
        return np.broadcast_to(first, (SIDE, SIDE, 3))
    if kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        grid = np.linspace(-1, 1, SIDE)
        ramp = (np.cos(angle) * grid[:, None] + np.sin(angle) * grid[None]) / 2.83 + 0.5
        return first + ramp[..., None] * (second - first)
    coarse = int(rng.choice([4, 8, 16]))
    noise = rng.uniform(0, 1, (coarse, coarse, 1))
    return first + np.kron(noise, np.ones((SIDE // coarse, SIDE // coarse, 1))) * (second - first)


def broad_clip(rng: np.random.Generator) -> np.ndarray:
    """One to three shapes, known or not, on straight ways over a random background: uint8 (F, H, W, 3)."""
    clip = np.broadcast_to(random_ground(rng), (FRAMES, SIDE, SIDE, 3)).astype(np.float64)
    for _ in range(rng.integers(1, 4)):
        first, last = rng.uniform(0, SIDE, (2, 2))
        if rng.random() < 0.3:
            last = first
        time = np.linspace(0, 1, FRAMES)[:, None]
        places = first * (1 - time) + last * time
        radius = rng.uniform(6, 16)
        if rng.random() < 0.5:
            shape = SHAPES[rng.integers(len(SHAPES))]
            share = np.stack([coverage(shape, tuple(at), radius, (SIDE, SIDE)) for at in places])
        else:
            share = polygon_coverage(rng, places, radius)
        clip += share[..., None] * (rng.uniform(0, 255, 3) - clip)
    return np.rint(clip).astype(np.uint8)


def autoencoder_clip(rng: np.random.Generator) -> np.ndarray:
    """A clip for the autoencoder: mostly from the captions' world with rings, some broad."""
    if rng.random() < 0.85:
        return render(random_scene(rng, SHAPES))
    return broad_clip(rng)
