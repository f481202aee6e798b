"""Real files made on the spot: videos whose frames say their own number by their brightness."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from weft.geometry import VideoGeometry

WAN = VideoGeometry(fps=16, space_stride=8, time_stride=4, patch=(1, 2, 2), latent_channels=16)
TINY = VideoGeometry(fps=16, space_stride=8, time_stride=4, patch=(1, 2, 2), latent_channels=4)
STEP = 8  # grey levels between one frame and the next; far more than the codec's error


@dataclass(frozen=True)
class Recipe:
    """What a video is made of. times: ticks of 1/clock seconds at which frames are shown; None: one after another."""

    frames: int = 9
    fps: int = 16
    width: int = 64
    height: int = 64
    rotation: int = 0  # degrees, counter-clockwise, as metadata
    pixel_aspect: int = 1
    times: Sequence[int] | None = None
    clock: int = 0  # ticks a second, when times are given


def make_video(path: Path, recipe: Recipe = Recipe()) -> Path:
    """Write a video; the top half of frame i has the grey level i * STEP, the bottom half is STEP * i / 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=recipe.fps, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = recipe.width, recipe.height, "yuv420p"
        if recipe.times is not None:
            stream.codec_context.time_base = Fraction(1, recipe.clock)
        if recipe.pixel_aspect != 1:
            stream.codec_context.sample_aspect_ratio = Fraction(recipe.pixel_aspect)
        if recipe.rotation:
            stream.set_display_rotation(recipe.rotation)
        for i in range(recipe.frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, recipe.width, recipe.height), format="rgb24")
            if recipe.times is not None:
                frame.pts, frame.time_base = recipe.times[i], Fraction(1, recipe.clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(number: int, width: int, height: int) -> np.ndarray:
    """Frame (H, W, 3): its number (of 32) in grey above, half as bright below."""
    frame = np.full((height, width, 3), number * STEP % 256, np.uint8)
    frame[height // 2 :] //= 2
    return frame


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers of frames (F, H, W, 3), read from the top quarter."""
    top = frames[:, : frames.shape[1] // 4].astype(float).mean((1, 2, 3))
    return [round(level / STEP) for level in top]


def make_image(path: Path, width: int = 64, height: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbered(10, width, height)).save(path)
    return path


def cut_off(path: Path, share: float) -> Path:
    """Keep only the first part of a file, as a broken download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def captioned(path: Path, caption: str = "a clip") -> Path:
    """Put a caption beside a clip."""
    path.with_suffix(".txt").write_text(caption)
    return path
