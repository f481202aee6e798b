"""Reading by time, cutting to a shape, and telling what is wrong with a file, all on files made on the spot."""

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.clips import Recipe, cut_off, make_image, make_video, numbered, numbers_of
from weft.data.media import Cut, contact_sheet, probe_image, probe_video, read_cuts, read_image, read_video, write_video
from weft.errors import DataError


def square(frames: int, fps: float) -> Cut:
    return Cut(fps=fps, frames=frames, height=64, width=64)


# ---- Frames by time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov", ".avi"])
def test_at_the_source_rate_every_frame_is_read_once(tmp_path, ending):
    clip = make_video(tmp_path / f"clip{ending}", Recipe(frames=21, fps=16))
    assert probe_video(clip).frames_at(16) == 21
    assert numbers_of(read_video(clip, square(21, 16))) == list(range(21))


def test_30_fps_become_16_by_the_frame_that_is_shown_at_each_time(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=30, fps=30))
    assert probe_video(clip).frames_at(16) == 16
    assert numbers_of(read_video(clip, square(16, 16))) == [i * 30 // 16 for i in range(16)]


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_8_fps_become_16_by_showing_each_frame_twice(tmp_path, ending):
    clip = make_video(tmp_path / f"clip{ending}", Recipe(frames=6, fps=8))
    assert probe_video(clip).frames_at(16) == 12
    assert numbers_of(read_video(clip, square(12, 16))) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_uneven_timestamps_are_followed(tmp_path):
    # In sixteenths of a second: frame 1 lasts three times as long as frame 0.
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=4, times=(0, 100, 400, 500), clock=1600))
    assert numbers_of(read_video(clip, square(6, 16))) == [0, 1, 1, 1, 2, 3]


def test_a_clip_that_starts_late_is_counted_from_its_first_frame(tmp_path):
    clip = make_video(tmp_path / "clip.mkv", Recipe(frames=3, times=(5000, 5100, 5200), clock=1600))
    assert probe_video(clip).frames_at(16) == 3
    assert numbers_of(read_video(clip, square(3, 16))) == [0, 1, 2]


def test_more_frames_than_there_are_is_an_error_not_a_repetition(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=9))
    with pytest.raises(DataError, match=r"ends after 9 of 13 frames at 16 fps"):
        read_video(clip, square(13, 16))


# ---- Windows ------------------------------------------------------------------------------------------------------


def test_a_window_begins_where_it_is_told(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=21, fps=16))
    assert numbers_of(read_video(clip, replace(square(5, 16), start=7))) == [7, 8, 9, 10, 11]


def test_a_stride_takes_the_frames_at_every_so_manieth_time(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=30, fps=30))
    assert probe_video(clip).frames_at_rate(Fraction(16, 3)) == 6
    at_16 = [i * 30 // 16 for i in range(16)]
    assert numbers_of(read_video(clip, replace(square(4, 16), stride=3, start=1))) == at_16[3:13:3]


def test_a_declared_rate_replaces_the_files_timestamps(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=16, fps=60))
    assert probe_video(clip).declared(32).frames_at(16) == 8
    assert numbers_of(read_video(clip, replace(square(8, 16), declared_fps=32))) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_windows_of_one_reading_equal_those_of_readings_of_their_own(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=31, fps=30))
    cuts = [Cut(16, 5, 64, 64, start=8), Cut(16, 9, 64, 64), Cut(16, 5, 32, 48, start=11), Cut(16, 9, 64, 64, start=4)]
    together = dict(read_cuts(clip, cuts))
    assert [place for place, _ in read_cuts(clip, cuts)] == [1, 3, 0, 2]  # by their ends, then by their beginnings
    for place, cut in enumerate(cuts):
        assert np.array_equal(together[place], read_video(clip, cut))


def test_a_clip_that_ends_early_gives_the_windows_before(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(frames=12))
    reading = read_cuts(clip, [square(5, 16), replace(square(5, 16), start=8)])
    assert next(reading)[0] == 0
    with pytest.raises(DataError, match=r"ends after 12 of 13 frames at 16 fps"):
        next(reading)


# ---- The picture --------------------------------------------------------------------------------------------------


def test_a_wide_clip_is_scaled_to_cover_and_loses_both_sides_equally(tmp_path):
    left_to_right = np.zeros((64, 256, 3), np.uint8)
    left_to_right[:, :, 0] = np.arange(256)
    Image.fromarray(left_to_right).save(tmp_path / "ramp.png")
    read = read_image(tmp_path / "ramp.png", width=64, height=64)
    assert read.shape == (1, 64, 64, 3) and read.dtype == np.uint8
    assert np.array_equal(read[0, 0, :, 0], np.arange(96, 160))  # the middle of 0..255, not resized


def test_shrinking_averages_fine_stripes_instead_of_aliasing(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    inner = read_image(tmp_path / "stripes.png", width=64, height=64)[0, 8:-8, 8:-8]
    assert np.abs(inner.astype(int) - 127.5).max() < 8  # a kernel four source pixels wide leaves a small ripple


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_turned_phone_video_is_read_upright(tmp_path, rotation):
    clip = make_video(tmp_path / "clip.mp4", Recipe(width=96, height=48, rotation=rotation))
    probe = probe_video(clip)
    upright = np.rot90(numbered(8, 96, 48), rotation // 90)
    assert (probe.height, probe.width) == upright.shape[:2]
    last = read_video(clip, Cut(16, 9, probe.height, probe.width))[-1]
    assert np.abs(last.astype(int) - upright).mean() < 2  # the codec's error; a wrong turn is off by 16 and more


def test_pixels_that_are_not_square_are_stretched_to_be(tmp_path):
    clip = make_video(tmp_path / "clip.mp4", Recipe(width=64, height=64, pixel_aspect=2))
    probe = probe_video(clip)
    assert (probe.width, probe.height) == (128, 64)
    assert read_video(clip, Cut(16, 9, 64, 128)).shape == (9, 64, 128, 3)


def test_an_image_is_turned_by_its_exif_and_its_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (32, 64), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert (probe_image(tmp_path / "a.png").width, probe_image(tmp_path / "a.png").height) == (64, 32)
    assert (read_image(tmp_path / "a.png", 64, 32) == 255).all()


# ---- Files that lie -----------------------------------------------------------------------------------------------


def reason(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        probe_video(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and said.endswith(".")
    return said


def test_a_missing_file_says_so(tmp_path):
    assert "is not there" in reason(tmp_path / "gone.mp4")


def test_an_empty_file_says_so(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "empty (0 bytes)" in reason(tmp_path / "a.mp4")


# Matroska tells no number of frames: a loss below five percent is not seen, and the frames that are there count.
@pytest.mark.parametrize(
    ("ending", "share"), [*((e, s) for e in (".mp4", ".avi") for s in (0.2, 0.6, 0.95)), (".mkv", 0.2), (".mkv", 0.8)]
)
def test_a_broken_download_says_that_it_is_truncated(tmp_path, ending, share):
    clip = cut_off(make_video(tmp_path / f"a{ending}", Recipe(frames=40, width=128, height=128)), share)
    assert "truncated" in reason(clip)


def test_text_named_mp4_says_that_it_is_not_a_video(tmp_path):
    (tmp_path / "a.mp4").write_text("A hiker stands on a summit.\n" * 100)
    assert "not a video" in reason(tmp_path / "a.mp4")


def test_a_picture_named_mp4_says_what_it_is(tmp_path):
    make_image(tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert "is a PNG picture, not a video" in reason(tmp_path / "a.mp4")


def test_sound_without_a_picture_says_so(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "holds no video stream" in reason(tmp_path / "a.mp4")


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"not a picture", lambda b: b""])
def test_a_spoilt_picture_says_so(tmp_path, spoil):
    image = make_image(tmp_path / "a.jpg", 256, 256)
    image.write_bytes(spoil(image.read_bytes()))
    with pytest.raises(DataError, match=r"a\.jpg is (truncated, damaged or not an image|empty)"):
        probe_image(image)


# ---- Writing ------------------------------------------------------------------------------------------------------


def test_a_written_video_is_read_back_with_its_colours(tmp_path):
    frames = np.empty((9, 64, 96, 3), np.uint8)
    frames[:] = (220, 35, 35)
    write_video(tmp_path / "new" / "a.mp4", frames, fps=24, crf=10)
    probe = probe_video(tmp_path / "new" / "a.mp4")
    assert (probe.frames, probe.fps, probe.width, probe.height) == (9, 24.0, 96, 64)
    back = read_video(tmp_path / "new" / "a.mp4", Cut(24, 9, 64, 96))
    assert np.abs(back.astype(int) - frames).max() <= 4  # 8-bit YUV rounds; the wrong matrix is off by 16
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]


WRITTEN = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from weft.data.media import write_video
small = np.random.default_rng(2).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
write_video(Path(sys.argv[1]), np.stack([np.asarray(Image.fromarray(frame).resize((64, 64))) for frame in small]), 16)
"""


def test_the_same_frames_become_the_same_bytes_whatever_stood_in_memory_before(tmp_path):
    """glibc fills what it hands out with a byte that is named by an environment variable."""
    files = [tmp_path / f"{filled}.mp4" for filled in (0, 85, 170)]
    for file in files:
        filled = {**os.environ, "MALLOC_PERTURB_": file.stem}
        subprocess.run([sys.executable, "-c", WRITTEN, str(file)], env=filled, check=True)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_write_that_fails_leaves_no_file_and_the_old_one_as_it_was(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(Exception):  # noqa: B017 - whatever the encoder says against odd sides
        write_video(tmp_path / "a.mp4", np.zeros((2, 33, 33, 3), np.uint8), fps=16)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"old")]


def test_a_contact_sheet_has_a_row_for_each_label_and_at_most_eight_frames(tmp_path):
    rows = [("before", np.zeros((20, 40, 80, 3), np.uint8)), ("after", np.full((3, 80, 40, 3), 255, np.uint8))]
    contact_sheet(rows, tmp_path / "sheet.png", columns=8, side=160)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 166 + 6
