"""What training would see: verdicts with reasons, the held-out items, and when it refuses."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.data.clips import WAN, Recipe, captioned, cut_off, make_image, make_video
from weft.data.buckets import Bucket
from weft.data.encoding import clip_pixels, pixels_of
from weft.data.filling import by_file
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


def test_all_windows_of_a_held_out_clip_leave_training(clips):
    extraction = {"kind": "slide", "step": 1}
    survey = surveyed(clips, validation_items=2, extraction=extraction, buckets={"sides": [64], "frames": [5]})
    assert len({clip.name for clip in survey.validation}) == 2
    assert not {clip.name for clip in survey.validation} & {clip.name for clip in survey.train}


def test_a_file_that_stands_in_two_sources_is_held_out_of_both(clips):
    own = {"sides": [32], "frames": [5]}
    sources = [{"path": clips}, {"path": clips, "buckets": own, "stride": 2}]
    survey = surveyed(clips, sources=sources, validation_items=3)
    assert len({clip.path for clip in survey.validation}) == 3
    assert not {clip.path for clip in survey.validation} & {clip.path for clip in survey.train}


def test_shares_divide_the_items_and_measure_on_the_same(clips):
    whole = surveyed(clips, validation_items=2)
    shares = [surveyed(clips, validation_items=2, share=[i, 3]) for i in range(3)]
    keys = [[clip.key for clip in survey.train] for survey in shares]
    assert [len(own) for own in keys] == [2, 2, 2]
    assert sorted(key for own in keys for key in own) == sorted(clip.key for clip in whole.train)
    assert all(survey.validation == whole.validation for survey in shares)
    assert all(len(survey.usable) == 2 + 2 for survey in shares)  # what its cache holds


def test_a_share_counts_from_0(clips):
    with pytest.raises(ValidationError, match="i is below n"):
        surveyed(clips, share=[2, 2])


def test_a_share_of_nothing_says_so(tmp_path):
    captioned(make_video(tmp_path / "a.mp4"))
    with pytest.raises(DataError, match=r"go to other shares"):
        surveyed(tmp_path, share=[1, 2]).refuse_when_unusable(0)


def test_more_dropped_clips_than_tolerated_are_refused_with_their_reasons(tmp_path):
    captioned(make_video(tmp_path / "a.mp4"))
    captioned(make_video(tmp_path / "b.mp4", Recipe(frames=3)))
    surveyed(tmp_path).refuse_when_unusable(0)
    surveyed(tmp_path, dropped=1).refuse_when_unusable(0)
    with pytest.raises(
        DataError, match=r"1 of 2 clips are dropped, more than data\.dropped \(0\)\..*\n  b\.mp4: It has 3"
    ):
        surveyed(tmp_path, dropped=0).refuse_when_unusable(0)


def test_clips_that_are_too_short_can_be_refused_while_others_may_be_dropped(tmp_path):
    captioned(make_video(tmp_path / "a.mp4"))
    captioned(make_image(tmp_path / "tiny.png", 8, 8))
    surveyed(tmp_path, too_short="error").refuse_when_unusable(0)
    captioned(make_video(tmp_path / "b.mp4", Recipe(frames=3)))
    with pytest.raises(DataError, match=r"1 of 3 clips are too short.*\n  b\.mp4"):
        surveyed(tmp_path, too_short="error").refuse_when_unusable(0)


def test_cutting_batches_is_refused_where_later_frames_count_or_nothing_is_shorter(tmp_path):
    captioned(make_video(tmp_path / "a.mp4"))
    fields = {"sources": [{"path": tmp_path}], "random_frames": 0.5}
    data = VideoData.model_validate({**fields, "buckets": {"sides": [64], "frames": [5, 9]}})
    assert data.survey(WAN).latent_frames == (2, 3)
    with pytest.raises(ConfigError, match=r"data\.random_frames: this model's autoencoder looks at later frames"):
        data.survey(replace(WAN, causal=False))
    single = VideoData.model_validate({**fields, "buckets": {"sides": [64], "frames": [9]}})
    with pytest.raises(ConfigError, match="nothing is shorter"):
        single.survey(WAN)


def test_a_source_without_buckets_needs_those_of_the_section(tmp_path):
    with pytest.raises(ValidationError, match=r"data\.sources\.1 has none of its own"):
        own = {"sides": [64], "frames": [9]}
        VideoData.model_validate({"sources": [{"path": tmp_path, "buckets": own}, {"path": tmp_path}]})


def test_keys_of_other_trainers_that_are_not_used_are_noticed(tmp_path):
    make_video(tmp_path / "a.mp4")
    row = '{"file_path": "a.mp4", "text": "x", "type": "video", "control_file_path": "c.mp4"}'
    (tmp_path / "metadata.json").write_text(f"[{row}]")
    survey = surveyed(tmp_path / "metadata.json")
    assert [clip.key for clip in survey.train] == ["a.mp4"]
    (notice,) = survey.notices
    assert notice.endswith("line 1: 'control_file_path' is not used: Weft trains without control signals.")


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


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no folder of real clips beside the checkout")
def test_real_clips_give_windows_up_to_their_ends_at_their_own_rates():
    buckets = {"sides": [256], "frames": [33]}
    survey = surveyed(REAL, buckets=buckets, extraction={"kind": "uniform", "count": 3})
    starts = {
        clip.key.split("_")[0]: clip.start for clip in survey.clips
    }  # of the last window: frames at 16 fps less 33
    assert starts == {"hiker": 98 - 33, "pose": 82 - 33, "dog": 81 - 33, "drawing": 80 - 33, "press": 146 - 33}
    slow = surveyed(REAL, buckets=buckets, sources=[{"path": REAL, "stride": 2}])
    assert [clip.frames_at_fps for clip in slow.clips] == [49, 41, 41, 40, 57, 73]  # half, rounded up


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no folder of real clips beside the checkout")
def test_windows_of_real_clips_read_at_once_equal_those_read_alone():
    buckets = {"sides": [96], "frames": [17]}
    survey = surveyed(REAL, buckets=buckets, extraction={"kind": "slide", "step": 23})
    for items in by_file(survey.usable)[:3]:
        for clip, pixels in pixels_of(items, survey.fps):
            assert torch.equal(pixels, clip_pixels(clip, survey.fps))
