"""Dataset files of musubi-tuner become sources that give the windows and sizes which its table defines."""

import json
import math
from pathlib import Path

import pytest

from tests.data.clips import WAN, Recipe, captioned, make_image, make_video
from weft.config.source import read_text
from weft.data.buckets import Buckets
from weft.data.musubi import data_section, line_numbers, translated
from weft.data.survey import Survey
from weft.data.video import Source, VideoData
from weft.data.windows import Chunk, Full, Slide, Uniform
from weft.errors import ConfigError, DataError

GUIDE = """
[general]
resolution = [960, 544]
caption_extension = ".caption"
batch_size = 2
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
video_directory = "videos"
cache_directory = "cache/videos"
target_frames = [1, 25, 45]
frame_extraction = "uniform"
frame_sample = 4
source_fps = 30.0

[[datasets]]   # photographs
image_directory = "images"
num_repeats = 3
enable_bucket = false
resolution = 512
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text(text)
    return path


def said(folder: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        translated(written(folder, text))
    return str(caught.value)


def test_each_dataset_is_a_source_with_what_it_inherits(tmp_path):
    videos, images = translated(written(tmp_path, GUIDE)).sources
    area = math.ceil(math.sqrt(960 * 544))
    assert videos == Source(
        path=Path("videos"),
        only="video",
        caption_extension=".caption",
        extraction=Uniform(count=4),
        source_fps=30.0,
        buckets=Buckets(sides=(area,), frames=(1, 25, 45), choice="each_frames", upscale=False),
    )
    assert images == Source(
        path=Path("images"),
        only="image",
        caption_extension=".caption",
        repeats=3,
        buckets=Buckets(sizes=((512, 512),), frames=(1,), upscale=True),
    )


def test_without_keys_musubis_defaults_hold(tmp_path):
    (source,) = translated(written(tmp_path, '[[datasets]]\nvideo_directory = "v"')).sources
    assert source.buckets == Buckets(sizes=((960, 544),), frames=(1,), upscale=True)
    assert (source.extraction, source.repeats, source.source_fps) == (None, 1, None)


@pytest.mark.parametrize(
    ("keys", "extraction", "frames"),
    [
        ('frame_extraction = "chunk"\ntarget_frames = [25]', Chunk(), (25,)),
        ('frame_extraction = "slide"\nframe_stride = 10\ntarget_frames = [25]', Slide(step=10), (25,)),
        ('frame_extraction = "full"\nmax_frames = 100', Full(), (97,)),
        ("target_frames = [25, 48]", None, (25, 45)),
    ],
)
def test_each_way_of_extraction_has_its_own(tmp_path, keys, extraction, frames):
    (source,) = translated(written(tmp_path, f'[[datasets]]\nvideo_directory = "v"\n{keys}')).sources
    assert source.extraction == extraction and source.buckets is not None and source.buckets.frames == frames


def test_what_is_done_otherwise_is_noticed_with_its_line(tmp_path):
    text = '[[datasets]]\nvideo_directory = "v"\ncache_directory = "c"\nresolution = [850, 480]\ntarget_frames = [48]'
    path = written(tmp_path, text)
    notices = translated(path).notices
    assert notices[0].startswith(f"{path}, line 3: 'cache_directory' is not used: entries lie in data.cache_folder")
    assert notices[1].startswith(f"{path}, datasets 0 has no source_fps")
    assert notices[2] == f"{path}, line 5: [48] frames become [45], whole latent frames."
    assert notices[3] == f"{path}, line 4: 850x480 becomes 848x480, whose sides are multiples of 16."


def test_all_problems_are_told_at_once_with_their_lines(tmp_path):
    text = """
[general]
control_directory = "c"

[[datasets]]
video_directory = "v"

[[datasets]]
video_directory = "v"
frame_exraction = "head"
target_frames = "25"
"""
    all_of_them = said(tmp_path, text)
    assert "line 3: 'control_directory' cannot be followed: Weft trains without control signals" in all_of_them
    own = said(tmp_path, text.replace('control_directory = "c"', ""))
    assert "line 10: there is no key 'frame_exraction'. Did you mean 'frame_extraction'?" in own
    assert "line 11: 'target_frames' is '25': input should be a valid tuple." in own


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[general]", "has no [[datasets]]"),
        ("[[dataset]]\nvideo_directory = 'v'", "there is no table 'dataset'. Did you mean 'datasets'?"),
        ("[[datasets]]\nbatch_size = 1", "datasets 0 names no clips. Write exactly one of: video_directory"),
        ("[[datasets]]\nvideo_directory = 'v'\nimage_directory = 'i'", "has video_directory and image_directory"),
        ("[[datasets]\n", "is no TOML"),
    ],
)
def test_a_file_that_is_no_dataset_says_what_it_lacks(tmp_path, text, sentence):
    assert sentence in said(tmp_path, text)


def test_lines_are_those_of_the_file():
    lines = line_numbers(GUIDE)
    assert lines["general", "resolution"] == 3
    assert lines["0", "frame_sample"] == 14 and lines["1", "resolution"] == 21


# ---- As a source --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset file beside two videos, an image and a JSONL file."""
    for name, frames in (("a.mp4", 30), ("b.mp4", 20)):
        captioned(make_video(tmp_path / "videos" / name, Recipe(frames=frames)))
    captioned(make_image(tmp_path / "videos" / "poster.png"))  # musubi passes over it: it is no video
    captioned(make_image(tmp_path / "images" / "c.png"))
    row = {"video_path": str(tmp_path / "videos" / "b.mp4"), "caption": "named by a row"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    text = f"""
[general]
resolution = [64, 64]
source_fps = 16.0
[[datasets]]
video_directory = "{tmp_path}/videos"
target_frames = [9, 25]
frame_extraction = "chunk"
[[datasets]]
image_directory = "{tmp_path}/images"
num_repeats = 2
[[datasets]]
video_jsonl_file = "{tmp_path}/rows.jsonl"
target_frames = [17]
"""
    written(tmp_path, text)
    return tmp_path


def surveyed(folder: Path, **fields: object) -> Survey:
    return VideoData.model_validate({"sources": [{"path": folder / "dataset.toml", **fields}]}).survey(WAN)


def test_a_dataset_file_is_surveyed_without_buckets_of_the_section(folder):
    survey = surveyed(folder)
    items = {clip.key: (str(clip.bucket), clip.repeats) for clip in survey.train}
    assert items == {
        "a.mp4:25x64x64": ("25x64x64", 1),
        "a.mp4:9x64x64": ("9x64x64", 1),
        "a.mp4@9:9x64x64": ("9x64x64", 1),
        "a.mp4@18:9x64x64": ("9x64x64", 1),
        "b.mp4": ("9x64x64", 1),
        "b.mp4@9": ("9x64x64", 1),
        "c.png": ("1x64x64", 2),
        f"{folder}/videos/b.mp4": ("17x64x64", 1),
    }
    assert survey.notices == ()


def test_repeats_of_the_file_multiply_those_of_its_datasets(folder):
    assert {clip.key: clip.repeats for clip in surveyed(folder, repeats=3).train}["c.png"] == 6


def test_further_keys_beside_the_file_are_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.stride: .*says this itself"):
        surveyed(folder, stride=2)


def test_another_batch_size_is_noticed(folder):
    data = VideoData.model_validate({"sources": [{"path": folder / "dataset.toml"}], "batch_size": 4})
    assert data.survey(WAN).notices == (
        f"{folder}/dataset.toml: its batch_size is 1; data.batch_size is 4, and counts.",
    )


def test_the_section_that_is_written_for_it_gives_the_same_items(folder):
    section, notices = data_section(folder / "dataset.toml")
    assert notices == () and section["batch_size"] == 1
    again = VideoData.model_validate(read_text(json.dumps(section)).data)
    assert again.survey(WAN) == surveyed(folder)


def test_buckets_that_all_datasets_share_are_written_once(tmp_path):
    text = '[general]\nenable_bucket = true\n[[datasets]]\nvideo_directory = "a"\n[[datasets]]\nvideo_directory = "b"\n'
    section, _ = data_section(written(tmp_path, text))
    assert section["buckets"] == {"frames": [1], "sides": [723], "upscale": True}
    assert section["sources"] == [{"path": name, "only": "video"} for name in ("a", "b")]
