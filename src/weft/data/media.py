"""Files of pictures: probe them, read them at a frame rate and a size, write them. PyAV, Pillow, numpy; no torch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from math import ceil
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont, ImageOps

from weft.data.manifest import VIDEO_ENDINGS
from weft.durable import whole_file
from weft.errors import DataError

# Pillow's bicubic widens its kernel when it shrinks, so it neither rings like Lanczos nor aliases like torch's default.
RESAMPLING = Image.Resampling.BICUBIC
# Of the told duration, besides two frames: the header may count a last frame that is shown for long.
HEADER_SLACK = Fraction(1, 20)


@dataclass(frozen=True)
class Probe:
    """What a file holds. Size in pixels as shown, after rotation. duration: seconds; 0 for an image."""

    width: int
    height: int
    frames: int
    fps: float
    duration: Fraction
    tolerance: Fraction  # seconds by which timestamps may be off because the container rounds them

    def frames_at(self, fps: float) -> int:
        """How many times i/fps, i = 0, 1, ..., lie before the end; never less than one."""
        return self.frames_at_rate(exact_fps(fps))

    def frames_at_rate(self, rate: Fraction) -> int:
        return max(1, ceil((self.duration - self.tolerance) * rate))

    def declared(self, fps: float) -> "Probe":
        """The same frames, evenly spaced at this rate, whatever the container says."""
        return replace(self, fps=fps, duration=self.frames / exact_fps(fps), tolerance=Fraction(0))


@dataclass(frozen=True)
class Cut:
    """The part of a clip that is used: so many frames at a rate, covering height x width pixels.

    stride: every stride-th frame at fps. start: of these the first that is used. declared_fps: the file's own rate,
    where its timestamps are not to be believed.
    """

    fps: float
    frames: int
    height: int
    width: int
    start: int = 0
    stride: int = 1
    declared_fps: float | None = None

    @property
    def rate(self) -> Fraction:
        return exact_fps(self.fps) / self.stride

    @property
    def end(self) -> int:
        return self.start + self.frames


def exact_fps(fps: float) -> Fraction:
    """23.976 and its like as what they stand for, 24000/1001."""
    return Fraction(fps).limit_denominator(1001)


# ---- Probing ------------------------------------------------------------------------------------------------------


def probe_image(path: Path) -> Probe:
    """Size of an image, read whole so that a truncated one is found. Raises DataError."""
    image = _open_image(path)
    return Probe(image.width, image.height, 1, 0.0, Fraction(0), Fraction(0))


def probe_video(path: Path) -> Probe:
    """Count a video's packets without decoding more than its first frame. Raises DataError with the reason."""
    with _opened(path) as (container, stream):
        first: VideoFrame | None = None
        shown: list[tuple[int, int]] = []  # presentation time and duration of each packet, in ticks
        packets = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise DataError(f"{path} is truncated or damaged at frame {packets} of {stream.frames or 'unknown'}.")
            if first is None:
                first = next((f for f in packet.decode() if isinstance(f, VideoFrame)), None)
            if packet.size == 0:  # the flush at the end
                continue
            packets += 1
            if not packet.is_discard:  # an edit list may cut frames off: stored, but never shown
                time = packet.pts if packet.pts is not None else packet.dts
                shown.append((packets if time is None else time, packet.duration or 0))
        if first is None or not shown:
            raise DataError(f"{path} holds no frame that can be decoded.")
        if packets < stream.frames:
            raise DataError(f"{path} is truncated: its header says {stream.frames} frames, and {packets} are there.")
        shown.sort()
        probe = _measured(shown, first, stream)
        told = _told_duration(container, stream, shown[0][0])
        if probe.duration < told * (1 - HEADER_SLACK) - 2 / exact_fps(probe.fps):
            there = f"{float(told):.2f} s, and {float(probe.duration):.2f} s are there"
            raise DataError(f"{path} is truncated: its header says {there}.")
        return probe


def _measured(shown: list[tuple[int, int]], first: VideoFrame, stream: VideoStream) -> Probe:
    """The probe of a video from the sorted (time, duration) of its packets and its first frame."""
    base = _tick(stream)
    last, lasts = shown[-1]
    before = shown[-2][0] if len(shown) > 1 else last
    duration = (last - shown[0][0]) * base + _last_shown(lasts, last - before, base)
    aspect = _pixel_aspect(stream, first)
    width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
    fps = float(len(shown) / duration)
    return Probe(max(1, round(width * aspect)), height, len(shown), fps, duration, _tolerance(stream))


def _last_shown(duration: int, interval: int, base: Fraction) -> Fraction:
    """Seconds of the last frame. Some writers leave it without a duration; then it lasts as long as the one before."""
    return max(1, duration if duration * 2 >= interval else interval) * base


def _tick(stream: VideoStream) -> Fraction:
    """Seconds of one unit of the stream's timestamps."""
    return stream.time_base or Fraction(1, 90_000)


def _tolerance(stream: VideoStream) -> Fraction:
    """Half a tick where frames do not fall on ticks, as at 16 fps in Matroska's milliseconds; else nothing."""
    if not stream.average_rate:
        return Fraction(0)
    ticks = 1 / (stream.average_rate * _tick(stream))  # per frame
    return Fraction(0) if ticks.denominator == 1 or ticks < 4 else _tick(stream) / 2


def _pixel_aspect(stream: VideoStream, frame: VideoFrame) -> Fraction:
    """Width over height of one pixel of the frame once it stands upright."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return 1 / aspect if frame.rotation % 180 else aspect


def _told_duration(container: InputContainer, stream: VideoStream, start: int) -> Fraction:
    """Seconds of the picture that the header promises, where it promises no number of frames; 0 for no promise.

    start: tick of the first frame; Matroska's durations count from zero, wherever the first frame stands.
    """
    if stream.frames:
        return Fraction(0)
    if stream.duration:
        return (stream.duration - start) * _tick(stream)
    if container.duration and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base) - start * _tick(stream)
    return Fraction(0)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container and its video stream; everything that FFmpeg says against the file becomes a DataError."""
    _refuse_empty(path)
    try:
        with av.open(str(path)) as container:
            shown = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            form = container.format.name
            if shown and form.endswith("_pipe") and form != "gif_pipe" and path.suffix.lower() in VIDEO_ENDINGS:
                raise DataError(f"{path} is a {form.removesuffix('_pipe').upper()} picture, not a video. Rename it.")
            if not shown:
                raise DataError(f"{path} holds no video stream.")
            shown[0].thread_type = "AUTO"
            yield container, shown[0]
    except FFmpegError as error:
        if isinstance(error, MemoryError):  # the machine's fault, not the file's
            raise
        said = (error.strerror or str(error)).strip().rstrip(".").lower()
        raise DataError(f"{path} is truncated, damaged or not a video: {said}.") from error


def _refuse_empty(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} is not there.")
    if not path.is_file():
        raise DataError(f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")


# ---- Reading ------------------------------------------------------------------------------------------------------


def read_video(path: Path, cut: Cut) -> np.ndarray:
    """Frames (F, H, W, 3) uint8: the i-th is the source frame that is shown at the i-th time of the cut.

    Source frames are dropped and shown twice as their timestamps ask. Raises DataError when the clip ends early.
    """
    ((_, frames),) = read_cuts(path, [cut])
    return frames


@dataclass
class _Window:
    """A cut in the making."""

    place: int
    cut: Cut
    taken: list[np.ndarray] = field(default_factory=list)


def read_cuts(path: Path, cuts: Sequence[Cut]) -> Iterator[tuple[int, np.ndarray]]:
    """(place among the cuts, frames) of each as soon as it is whole; the file is decoded once, and no further than
    needed.

    The cuts have one rate. Overlapping ones of one size share their pictures until they are whole. Raises DataError
    when the clip ends early, after those that are whole.
    """
    first = cuts[0]
    assert len({(cut.rate, cut.declared_fps) for cut in cuts}) == 1, "the cuts of one reading have one rate"
    waiting = sorted((_Window(place, cut) for place, cut in enumerate(cuts)), key=lambda w: (w.cut.start, w.cut.end))
    with _opened(path) as (container, stream):
        tolerance = Fraction(0) if first.declared_fps else _tolerance(stream)
        shown = 0  # times of the rate that lie behind
        for number, (frame, until) in enumerate(_shown_until(container, stream, path)):
            ends = (number + 1) / exact_fps(first.declared_fps) if first.declared_fps else until
            before, shown = shown, max(shown, ceil((ends - tolerance) * first.rate))
            for window in _fed(waiting, before, shown, _pictures(frame, _pixel_aspect(stream, frame))):
                yield window.place, np.stack(window.taken)
            waiting = [window for window in waiting if len(window.taken) < window.cut.frames]
            if not waiting:
                return
    lost = waiting[0]
    rate, needed = f"{float(first.rate):g} fps", lost.cut.end
    raise DataError(f"{path} ends after {shown} of {needed} frames at {rate}; it is damaged.")


def _fed(waiting: Sequence[_Window], before: int, shown: int, picture: Callable[[Cut], np.ndarray]) -> list[_Window]:
    """The windows that are whole once the frame that stands at the times before .. shown - 1 has been given to all."""
    whole = []
    for window in waiting:
        if window.cut.start >= shown:
            break
        count = min(window.cut.end, shown) - max(window.cut.start, before)
        if count > 0:
            window.taken += [picture(window.cut)] * count
            whole += [window] if len(window.taken) == window.cut.frames else []
    return whole


def _pictures(frame: VideoFrame, pixel_aspect: Fraction) -> Callable[[Cut], np.ndarray]:
    """The frame as a cut asks for it; converted only when it is asked for, and once for each size."""
    upright = cache(lambda: _upright(frame))
    sized = cache(lambda width, height: covering(upright(), width, height, pixel_aspect))
    return lambda cut: sized(cut.width, cut.height)


def _shown_until(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Each decoded frame, and the time in seconds after the first frame at which the next replaces it."""
    base = _tick(stream)
    before: VideoFrame | None = None
    start = last = interval = 0  # ticks
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise DataError(f"{path} is damaged at frame {number}.")
        time = number if frame.pts is None else frame.pts
        start = time if before is None else start
        if before is not None:
            interval = time - last
            yield before, (time - start) * base
        before, last = frame, time
    if before is not None:
        yield before, (last - start) * base + _last_shown(before.duration or 0, interval, base)


def _upright(frame: VideoFrame) -> Image.Image:
    """The frame in RGB by its own colour tags, turned as its rotation metadata asks (degrees, counter-clockwise)."""
    rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.rot90(rgb, turns) if turns else rgb)


def covering(image: Image.Image, width: int, height: int, pixel_aspect: Fraction = Fraction(1)) -> np.ndarray:
    """(H, W, 3) uint8: the picture scaled to cover width x height, the overhang cut off equally on both sides."""
    shown = float(image.width * pixel_aspect), float(image.height)
    scale = max(width / shown[0], height / shown[1])
    # The part of the source that stays, in its own pixels; resizing straight from it rounds nothing.
    box_w, box_h = width / scale / float(pixel_aspect), height / scale
    left, top = (image.width - box_w) / 2, (image.height - box_h) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + box_w, image.width), min(top + box_h, image.height))
    if (width, height) == image.size and box == (0.0, 0.0, width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), RESAMPLING, box=box))


def read_image(path: Path, width: int, height: int) -> np.ndarray:
    """(1, H, W, 3) uint8 of an image that covers width x height. Raises DataError."""
    return covering(_open_image(path), width, height)[None]


def _open_image(path: Path) -> Image.Image:
    """An image in RGB, upright by its EXIF; what is transparent becomes white."""
    _refuse_empty(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is truncated, damaged or not an image: {str(error).rstrip('.')}.") from error


# ---- Writing ------------------------------------------------------------------------------------------------------


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 18) -> None:
    """Write frames (F, H, W, 3) uint8 as H.264 yuv420p with BT.709 colours. Height and width must be even. The same
    frames become the same bytes, on machines of any number of cores.

    crf: constant rate factor, 0 lossless to 51 worst.
    """

    options = {"movflags": "+faststart"}
    # x264's macroblock tree reads memory that nothing was written to, unless 128 divides the width; files that differ
    # by chance come of it. Without it they are a third larger, and no worse.
    steady = {"crf": str(crf), "x264-params": "mbtree=0"}
    with whole_file(path) as draft, av.open(str(draft), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=exact_fps(fps), options=steady)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # with more, their number changes the bytes; 81 frames of 480p take a second
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709.value
        for pixels in frames:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], path: Path, columns: int = 8, side: int = 160) -> None:
    """Write a PNG with one row per (label, frames (F, H, W, 3) uint8): up to so many frames, evenly spread.

    side: pixels of the longer side of a tile.
    """
    margin, caption = 6, 18  # pixels
    strips = []
    for label, frames in rows:
        chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        scale = side / max(frames.shape[1:3])
        size = round(frames.shape[2] * scale), round(frames.shape[1] * scale)
        tiles = [Image.fromarray(frames[i]).resize(size, RESAMPLING) for i in chosen]
        strips.append((label, tiles))
    width = columns * (side + margin) + margin
    sheet = Image.new("RGB", (width, sum(caption + t[0].height + margin for _, t in strips) + margin), "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for label, tiles in strips:
        draw.text((margin, top), label, fill="black", font=ImageFont.load_default(12))
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (margin + column * (side + margin), top + caption))
        top += caption + tiles[0].height + margin
    with whole_file(path) as draft:
        sheet.save(draft, format="PNG")
