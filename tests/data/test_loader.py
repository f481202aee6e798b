"""What training draws: padded batches in an order that a restart repeats, and the clips that are measured on."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from tests.data.clips import TINY, Recipe, captioned, make_video
from tests.data.conftest import ToyEncoders
from weft.contracts import Batch
from weft.data.loader import VideoDataset, ahead, padded
from weft.data.video import VideoData
from weft.errors import DataError

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}


def opened(data: VideoData, encoders: ToyEncoders, **fields: object) -> VideoDataset:
    section = data.model_copy(update=fields)
    survey = section.survey(TINY)
    return section.open(survey, IDENTITY, lambda: encoders, lambda event: None, seed=11, last_step=100)


def drawn(dataset: VideoDataset, start: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.train.batches(start, rank, world), count))


def equal(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(torch.equal(one[name], other[name]) for name in one.tensors)


def test_a_batch_holds_latents_padded_text_and_its_mask(data, encoders):
    dataset = opened(data, encoders, caption_dropout=0.0)
    captions = {clip.key: clip.caption for clip in dataset.survey.train}
    for batch in drawn(dataset, 0, 5):
        lengths = [len(captions[key]) + 1 for key in batch.keys]
        size = len(batch.keys)
        assert batch["latents"].shape[:2] == (size, 4) and batch["latents"].dtype == torch.float32
        assert batch["text"].shape == (size, max(lengths), 6) and batch["text"].dtype == torch.float32
        assert batch["text_mask"].dtype == torch.bool and batch["text_mask"].sum(1).tolist() == lengths
        assert (batch["text"][~batch["text_mask"]] == 0).all()
        assert torch.equal(batch["text"][0, : lengths[0]], encoders.text([captions[batch.keys[0]]])[0].float())


def test_an_epoch_shows_every_clip_once(data, encoders):
    dataset = opened(data, encoders)
    keys = Counter(key for batch in drawn(dataset, 0, 5) for key in batch.keys)
    assert keys == Counter(clip.key for clip in dataset.survey.train)


def test_a_restart_repeats_the_batches_bit_by_bit(data, encoders):
    whole = drawn(opened(data, encoders, caption_dropout=0.5), 0, 12)
    again = drawn(opened(data, encoders, caption_dropout=0.5), 7, 5)
    assert all(equal(one, other) for one, other in zip(whole[7:], again, strict=True))


def test_two_ranks_draw_what_one_draws(data, encoders):
    dataset = opened(data, encoders, caption_dropout=0.5)
    whole = drawn(dataset, 0, 12)
    for rank in (0, 1):
        own = drawn(dataset, 0, 6, rank, world=2)
        assert all(equal(one, other) for one, other in zip(whole[rank::2], own, strict=True))


def test_dropped_captions_are_the_encoded_empty_one_at_the_asked_share(data, encoders):
    dataset = opened(data, encoders, caption_dropout=0.25, batch_size=1)
    batches = drawn(dataset, 0, 800)
    dropped = [batch for batch in batches if batch["text_mask"].shape[1] == 1]
    assert abs(len(dropped) / 800 - 0.25) < 0.046  # three standard deviations
    empty = encoders.text([""])[0].float()
    assert all(torch.equal(batch["text"][0], empty) for batch in dropped)
    assert {1, 0} == {int(drawn(opened(data, encoders, caption_dropout=p), 0, 1)[0]["text_mask"].shape[1] == 1)
                      for p in (0.0, 1.0)}  # fmt: skip


def test_every_kind_of_cache_trains_on_the_same_batches(data, encoders):
    disk, memory, live = (drawn(opened(data, encoders, cache=kind), 0, 6) for kind in ("disk", "memory", "off"))
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(disk, memory, live, strict=True))


def test_validation_goes_once_through_the_held_out_clips_in_one_order_with_captions(data, encoders):
    dataset = opened(data, encoders, validation_items=5, caption_dropout=1.0)
    batches, failed = dataset.validation()
    again, _ = dataset.validation()
    assert failed == [] and all(equal(one, other) for one, other in zip(batches, again, strict=True))
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted(clip.key for clip in dataset.survey.validation) and len(keys) == 5
    assert all((batch["text_mask"].sum(1) > 1).all() for batch in batches)


def test_a_validation_clip_that_cannot_be_loaded_is_reported_and_not_averaged(tmp_path, encoders):
    good, bad = (captioned(make_video(tmp_path / "held" / name)) for name in ("good.mp4", "bad.mp4"))
    captioned(make_video(tmp_path / "train" / "a.mp4"))
    data = VideoData.model_validate(
        {
            "sources": [{"path": tmp_path / "train"}],
            "validation_sources": [{"path": good.parent}],
            "buckets": {"sides": [64], "frames": [9]},
            "cache": "off",
        }
    )
    dataset = opened(data, encoders)
    bad.write_text("overwritten after the survey")
    batches, failed = dataset.validation()
    assert [batch.keys for batch in batches] == [("good.mp4",)]
    assert [item.key for item in failed] == ["bad.mp4"] and "not a video" in failed[0].reason


def test_a_training_clip_that_cannot_be_loaded_stops_training_and_is_named(tmp_path, encoders):
    clip = captioned(make_video(tmp_path / "a.mp4", Recipe(frames=9)))
    fields = {"sources": [{"path": tmp_path}], "buckets": {"sides": [64], "frames": [9]}, "cache": "off"}
    dataset = opened(VideoData.model_validate(fields), encoders)
    clip.write_text("overwritten after the survey")
    with pytest.raises(DataError, match=r"a\.mp4"):
        drawn(dataset, 0, 1)


def test_clips_that_fail_to_encode_count_toward_the_error_budget(tmp_path, encoders):
    for name in ("a.mp4", "b.mp4"):
        captioned(make_video(tmp_path / "clips" / name, Recipe(frames=9)))
    fields = {"sources": [{"path": tmp_path / "clips"}], "buckets": {"sides": [64], "frames": [9]}}
    data = VideoData.model_validate({**fields, "cache_folder": tmp_path / "cache"})
    survey = data.survey(TINY)
    (tmp_path / "clips" / "b.mp4").write_text("overwritten after the survey")

    def open_with(budget: int) -> VideoDataset:
        section = data.model_copy(update={"unreadable": budget})
        return section.open(survey, IDENTITY, lambda: encoders, lambda event: None, seed=0, last_step=1)

    with pytest.raises(DataError, match=r"1 of 2 clips cannot be read"):
        open_with(0)
    assert [batch.keys for batch in drawn(open_with(1), 0, 2)] == [("a.mp4",), ("a.mp4",)]


def test_texts_are_padded_with_zeros_to_the_longest():
    text, mask = padded([torch.ones(2, 3), torch.full((4, 3), 2.0)])
    assert text.shape == (2, 4, 3) and text[0, 2:].abs().sum() == 0
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


# ---- The thread ---------------------------------------------------------------------------------------------------


def counted(made: list[int], last: int = 10_000) -> Iterator[Batch]:
    for i in range(last):
        made.append(i)
        yield Batch({}, (str(i),))


def loader_threads() -> int:
    return sum(thread.name == "weft-loader" for thread in threading.enumerate())


def test_a_few_batches_are_made_ahead_and_no_more():
    made: list[int] = []
    batches = ahead(counted(made), 3)
    assert next(batches).keys == ("0",)
    time.sleep(0.3)
    assert 4 <= len(made) <= 5  # taken: one; waiting: three; one more in the hand of the thread
    batches.close()


def test_a_stream_that_is_left_early_ends_its_thread():
    before = loader_threads()
    batches = ahead(counted([]), 2)
    next(batches)
    batches.close()
    assert loader_threads() == before


def test_what_fails_in_the_thread_is_raised_after_the_batches_before_it():
    def failing() -> Iterator[Batch]:
        yield Batch({}, ("0",))
        raise DataError("clip 1 is gone")

    batches = ahead(failing(), 2)
    assert next(batches).keys == ("0",)
    with pytest.raises(DataError, match="clip 1 is gone"):
        next(batches)


def test_a_stream_that_ends_ends():
    assert len(list(ahead(counted([], last=5), 2))) == 5
