"""The items of a clip: its windows and buckets, keys, reasons, rates; and that no option exceeds the token budget."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.clips import WAN, Recipe, captioned, make_image, make_video
from weft.data.survey import Survey, bucket_of
from weft.data.video import VideoData
from weft.geometry import VideoGeometry

TI2V_5B = VideoGeometry(fps=24, space_stride=16, time_stride=4, patch=(1, 2, 2), latent_channels=48)


def surveyed(folder: Path, buckets: dict[str, object] | None = None, **source: object) -> Survey:
    fields = {"sources": [{"path": folder, **source}], "buckets": buckets or {"sides": [64], "frames": [5, 9]}}
    return VideoData.model_validate(fields).survey(WAN)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A folder with one clip of 30 frames at 16 fps."""
    captioned(make_video(tmp_path / "a.mp4", Recipe(frames=30)))
    return tmp_path


def test_each_window_is_an_item_with_its_key_start_and_reason(long):
    survey = surveyed(long, extraction={"kind": "chunk"})
    assert [(clip.key, clip.start) for clip in survey.train] == [("a.mp4", 0), ("a.mp4@9", 9), ("a.mp4@18", 18)]
    assert {clip.name for clip in survey.train} == {"a.mp4"}
    assert survey.train[1].verdict == "trimmed"
    assert survey.train[1].reason == "Frames 9 to 17 of 30 at 16 fps are used. 3 windows show 27 of them."


def test_a_window_that_begins_later_says_which_frames_it_uses(long):
    survey = surveyed(long, extraction={"kind": "random", "seed": 3})
    (clip,) = survey.train
    assert clip.start > 0 and clip.reason == f"Frames {clip.start} to {clip.start + 8} of 30 at 16 fps are used."


def test_full_uses_the_most_frames_that_the_budget_admits(long):
    assert [str(clip.bucket) for clip in surveyed(long, extraction={"kind": "full"}).train] == ["9x64x64"]
    whole = {"sides": [64], "frames": [81]}
    assert [str(clip.bucket) for clip in surveyed(long, whole, extraction={"kind": "full"}).train] == ["29x64x64"]
    tight = {**whole, "token_budget": 6 * 16}  # six latent frames of 4x4 tokens
    assert [str(clip.bucket) for clip in surveyed(long, tight, extraction={"kind": "full"}).train] == ["21x64x64"]


def test_a_source_without_an_extraction_takes_that_of_the_section(long):
    fields = {"sources": [{"path": long}], "buckets": {"sides": [64], "frames": [9]}}
    data = VideoData.model_validate({**fields, "extraction": {"kind": "slide", "step": 7}})
    assert [clip.start for clip in data.survey(WAN).train] == [0, 7, 14, 21]


def test_every_frame_count_can_be_an_item_of_its_own(long):
    buckets = {"sides": [64, 32], "frames": [5, 9], "choice": "each_frames"}
    keys = [clip.key for clip in surveyed(long, buckets, extraction={"kind": "uniform", "count": 2}).train]
    assert keys == ["a.mp4:9x64x64", "a.mp4@21:9x64x64", "a.mp4:5x64x64", "a.mp4@25:5x64x64"]


def test_every_size_can_be_an_item_of_its_own_with_the_frames_that_it_can_bear(long):
    buckets = {"sides": [32, 64], "frames": [5, 9, 29], "choice": "each_size", "token_budget": 48}
    assert [str(clip.bucket) for clip in surveyed(long, buckets).train] == ["9x64x64", "29x32x32"]


def test_images_can_have_sizes_of_their_own(tmp_path):
    captioned(make_image(tmp_path / "a.png", 256, 256))
    captioned(make_video(tmp_path / "b.mp4", Recipe(frames=9)))
    survey = surveyed(tmp_path, {"sides": [64], "image_sides": [128], "frames": [9]})
    assert [str(clip.bucket) for clip in survey.train] == ["1x128x128", "9x64x64"]


def test_a_stride_takes_every_second_frame_and_halves_their_number(long):
    survey = surveyed(long, {"sides": [64], "frames": [13, 17]}, stride=2)
    (clip,) = survey.train
    assert (clip.frames_at_fps, clip.stride, bucket_of(clip).frames) == (15, 2, 13)
    assert "15 frames at 16 fps, one of every 2, become 13" in clip.reason


def test_a_declared_rate_counts_in_place_of_the_files(tmp_path):
    captioned(make_video(tmp_path / "a.mp4", Recipe(frames=30, fps=60)))  # shot at 30
    assert surveyed(tmp_path).clips[0].frames_at_fps == 8
    (clip,) = surveyed(tmp_path, source_fps=30).clips
    assert (clip.frames_at_fps, clip.source_fps, clip.declared_fps) == (16, 30.0, 30.0)


def test_a_source_can_have_buckets_of_its_own_and_only_one_kind(long):
    captioned(make_image(long / "b.png"))
    own = {"sides": [32], "frames": [13]}
    sources = [{"path": long, "buckets": own, "only": "video"}, {"path": long, "only": "image"}]
    data = VideoData.model_validate({"sources": sources, "buckets": {"sides": [64], "frames": [5]}})
    found = [(clip.key, str(clip.bucket)) for clip in data.survey(WAN).train]
    assert found == [("a.mp4", "13x32x32"), ("b.png", "1x64x64")]


EXTRACTIONS = [
    {"kind": "head"}, {"kind": "chunk"}, {"kind": "slide", "step": 3}, {"kind": "uniform", "count": 3},
    {"kind": "random", "count": 2}, {"kind": "full"},
]  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    captioned(make_video(folder / "a.mp4", Recipe(frames=30, width=96, height=64)))
    captioned(make_video(folder / "b.mp4", Recipe(frames=12, width=64, height=128, fps=30)))
    captioned(make_image(folder / "c.png", 160, 96))
    return folder


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(1, 200),
    sides=st.lists(st.integers(32, 128), min_size=1, max_size=3),
    image_sides=st.lists(st.integers(32, 160), max_size=2),
    sizes=st.lists(st.sampled_from([(32, 32), (64, 32), (32, 64), (96, 96)]), max_size=3, unique=True),
    counts=st.lists(st.integers(0, 8).map(lambda k: 4 * k + 1), min_size=1, max_size=4),
    choice=st.sampled_from(["largest", "each_size", "each_frames", "each"]),
    extraction=st.sampled_from(EXTRACTIONS),
    stride=st.integers(1, 3),
    upscale=st.booleans(),
    slack=st.sampled_from([0.0, 0.05, 1.0]),
    geometry=st.sampled_from([WAN, TI2V_5B]),
)
def test_no_option_ever_exceeds_the_token_budget(
    mixed, budget, sides, image_sides, sizes, counts, choice, extraction, stride, upscale, slack, geometry
):
    size = {"sizes": sizes} if sizes else {"sides": sides}
    buckets = {
        **size, "image_sides": image_sides, "frames": counts, "token_budget": budget, "choice": choice,
        "upscale": upscale, "crop_slack": slack,
    }  # fmt: skip
    source = {"path": mixed, "extraction": extraction, "stride": stride}
    survey = VideoData.model_validate({"sources": [source], "buckets": buckets}).survey(geometry)
    keys = [clip.key for clip in survey.clips]
    assert len(keys) == len(set(keys))
    for clip in survey.usable:
        bucket = bucket_of(clip)
        assert geometry.tokens(bucket.frames, bucket.height, bucket.width) == bucket.tokens <= budget
        assert clip.start + bucket.frames <= clip.frames_at_fps
        assert bucket.frames % 4 == 1 and bucket.height % geometry.side_multiple == 0
