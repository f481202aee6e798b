"""What training would see: verdicts with reasons, the held-out items, and when it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.clips import WAN, Recipe, captioned, cut_off, make_image, make_video
from weft.data.buckets import Bucket
from weft.data.survey import Survey
from weft.data.video import VideoData
from weft.errors import ConfigError, DataError


def surveyed(folder: Path, **fields: object) -> Survey:
    buckets = {"sides": [64], "frames": [5, 9]}
    return VideoData.model_validate({"sources": [{"path": folder}], "buckets": buckets, **fields}).survey(WAN)


def reasons(survey: Survey) -> dict[str, tuple[str, str]]:
    return {clip.key: (clip.verdict, clip.reason) for clip in survey.clips}


def test_each_clip_has_a_verdict_and_a_sentence(tmp_path):
    captioned(make_video(tmp_path / "exact.mp4", Recipe(frames=9)))
    captioned(make_video(tmp_path / "long.mp4", Recipe(frames=15)))
    captioned(make_video(tmp_path / "short.mp4", Recipe(frames=4)))
    captioned(make_video(tmp_path / "wide.mp4", Recipe(frames=9, width=128)))
    captioned(make_image(tmp_path / "still.png"))
    survey = surveyed(tmp_path)
    assert reasons(survey) == {
        "exact.mp4": ("kept", "All 9 frames at 16 fps are used."),
        "long.mp4": ("trimmed", "15 frames at 16 fps become 9; the last 6 are not used."),
        "short.mp4": ("dropped", "It has 4 frames at the training rate; the shortest bucket has 5."),
        "still.png": ("kept", "One picture is one frame."),
        "wide.mp4": (
            "kept",
            "All 9 frames at 16 fps are used. 128x64 becomes 80x48, and 17% of the picture is cut off.",
        ),
    }
    assert survey.clips[0].bucket == Bucket(9, 64, 64, 3 * 4 * 4)
    assert survey.buckets() == {Bucket(9, 64, 64, 48): 2, Bucket(9, 48, 80, 45): 1, Bucket(1, 64, 64, 16): 1}


def test_broken_files_are_rows_with_reasons_not_tracebacks(tmp_path):
    captioned(make_video(tmp_path / "good.mp4"))
    captioned(cut_off(make_video(tmp_path / "cut.mp4", Recipe(frames=30)), 0.7))
    captioned(tmp_path / "empty.mp4").touch()
    captioned(tmp_path / "text.mp4").write_text("no video at all")
    make_image(tmp_path / "a.png").rename(captioned(tmp_path / "picture.mp4"))
    survey = surveyed(tmp_path)
    assert {clip.key for clip in survey.unreadable} == {"cut.mp4", "empty.mp4", "text.mp4", "picture.mp4"}
    assert [clip.key for clip in survey.train] == ["good.mp4"]
    with pytest.raises(DataError, match=r"4 of 5 clips cannot be read, more than data\.unreadable \(3\)"):
        survey.refuse_when_unusable(3)
    survey.refuse_when_unusable(4)


def test_clips_are_counted_at_the_rate_of_the_model_or_of_the_config(tmp_path):
    captioned(make_video(tmp_path / "a.mp4", Recipe(frames=12, fps=8)))
    assert surveyed(tmp_path).clips[0].frames_at_fps == 24
    assert surveyed(tmp_path, fps=4).clips[0].frames_at_fps == 6


def test_nothing_to_train_on_is_refused_with_the_endings_that_were_looked_for(tmp_path):
    (tmp_path / "clip.mpeg").touch()
    with pytest.raises(DataError, match=r"\.mp4, \.mov.*\.png, \.jpg"):
        surveyed(tmp_path).refuse_when_unusable(0)


def test_a_survey_that_drops_all_says_why(tmp_path):
    captioned(make_video(tmp_path / "a.mp4", Recipe(frames=3)))
    with pytest.raises(DataError, match=r"a\.mp4: It has 3 frames"):
        surveyed(tmp_path).refuse_when_unusable(0)


def test_missing_captions_are_all_named(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        make_video(tmp_path / name)
    captioned(tmp_path / "b.mp4", "  \n")
    with pytest.raises(DataError, match=r"(?s)2 of 2 clips have no caption.*a\.mp4.*b\.mp4"):
        surveyed(tmp_path)
    assert [clip.caption for clip in surveyed(tmp_path, missing_captions="empty").train] == ["", ""]
    dropped = surveyed(tmp_path, missing_captions="drop")
    assert {clip.verdict for clip in dropped.clips} == {"dropped"}


def test_the_prefix_stands_before_each_caption(tmp_path):
    captioned(make_video(tmp_path / "a.mp4"), "a ring moves")
    assert surveyed(tmp_path, caption_prefix="zorp,").clips[0].caption == "zorp, a ring moves"


def test_keys_stay_unique_when_sources_hold_equal_names(tmp_path):
    for name in ("one", "two"):
        captioned(make_video(tmp_path / name / "a.mp4"))
    sources = [{"path": tmp_path / "one", "repeats": 3}, {"path": tmp_path / "two"}]
    survey = surveyed(tmp_path, sources=sources)
    assert [(clip.key, clip.repeats) for clip in survey.clips] == [("a.mp4", 3), ("a.mp4#1", 1)]
    assert sum(survey.buckets().values()) == 4


def test_steps_count_partial_batches_and_round_up(clips):
    survey = surveyed(clips)  # 5 square, 2 wide, 1 image
    assert [survey.steps_per_epoch(batch, accumulate) for batch, accumulate in ((1, 1), (2, 1), (2, 4))] == [8, 5, 2]


def test_held_out_items_leave_training_and_stay_held_out_when_clips_are_added(clips, tmp_path):
    held_out = {clip.key for clip in surveyed(clips, validation_items=2).validation}
    survey = surveyed(clips, validation_items=3)
    assert len(survey.validation) == 3 and held_out < {clip.key for clip in survey.validation}
    assert len(survey.train) == 5
    captioned(make_video(tmp_path / "more" / "added.mp4"))
    sources = [{"path": clips}, {"path": tmp_path / "more"}]
    grown = {clip.key for clip in surveyed(clips, sources=sources, validation_items=3).validation}
    assert len(grown & {clip.key for clip in survey.validation}) >= 2


def test_validation_sources_are_never_trained_on_and_a_leak_is_told(clips, tmp_path):
    captioned(make_video(tmp_path / "own.mp4"))
    survey = surveyed(clips, validation_sources=[{"path": tmp_path}, {"path": clips}])
    validation = {clip.key: clip.reason for clip in survey.validation}
    assert len(survey.train) == 8 and len(validation) == 9
    assert "trained on" in validation["square_0.mp4#2"] and "trained on" not in validation["own.mp4"]


def test_shapes_that_the_model_cannot_take_are_refused_before_any_clip_is_read(tmp_path):
    with pytest.raises(ConfigError) as caught:
        surveyed(tmp_path / "nowhere", buckets={"sizes": [[850, 480]], "frames": [48, 81]})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["data.buckets.frames", "data.buckets.sizes"]


def test_parsing_the_section_imports_no_heavy_library():
    heavy = "{'torch', 'av', 'numpy', 'PIL'}"
    code = f"import sys, weft.data.video; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "videos" / "metadata.json"


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no folder of real clips beside the checkout")
def test_real_clips_of_five_shapes_and_three_rates_find_their_buckets():
    fields = {"buckets": {"sides": [512], "frames": [49, 81], "token_budget": 22_000}}
    survey = surveyed(REAL, **fields)
    assert [clip.frames_at_fps for clip in survey.clips] == [98, 82, 81, 80, 114, 146]  # duration times 16, rounded up
    assert {clip.key.split("_")[0]: str(clip.bucket) for clip in survey.clips} == {
        "hiker": "81x416x624",
        "pose": "81x672x384",
        "dog": "81x384x672",
        "drawing": "49x224x224",
        "press": "81x384x672",
    }
    survey.refuse_when_unusable(0)
