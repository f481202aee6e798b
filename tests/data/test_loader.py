"""What training draws: padded batches in an order that a restart repeats, and the clips that are measured on."""

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice

import pytest
import torch
from torch import Tensor

from tests.data.clips import TINY, Recipe, captioned, make_video
from tests.data.conftest import ToyEncoders
from tests.small import make_hunyuan, make_wan
from weft.contracts import Batch, Encoders, ModelFamily
from weft.data import cache
from weft.data.filed import Held
from weft.data.laying import FRAMEWISE, collated
from weft.data.loader import VideoDataset, padded
from weft.data.slots import Slots
from weft.data.survey import Clip
from weft.data.video import VideoData
from weft.errors import DataError
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.wan import Wan

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}


def opened(data: VideoData, encoders: ToyEncoders, **fields: object) -> VideoDataset:
    section = data.model_copy(update=fields)
    survey = section.survey(TINY)
    return section.open(survey, IDENTITY, lambda: encoders, lambda event: None, seed=11, last_step=100)


def drawn(dataset: VideoDataset, start: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.train.batches(start, rank, world), count))


def equal(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(torch.equal(one[name], other[name]) for name in one.tensors)


def test_a_batch_holds_latents_padded_text_as_it_is_kept_and_its_mask(data, encoders):
    dataset = opened(data, encoders, caption_dropout=0.0)
    captions = {clip.key: clip.caption for clip in dataset.survey.train}
    for batch in drawn(dataset, 0, 5):
        lengths = [len(captions[key]) + 1 for key in batch.keys]
        size = len(batch.keys)
        assert batch["latents"].shape[:2] == (size, 4) and batch["latents"].dtype == torch.float32
        assert batch["text"].shape == (size, max(lengths), 6) and batch["text"].dtype == torch.bfloat16
        mask = batch["text_mask"].expand(batch["text"].shape[:2])
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == lengths
        assert (batch["text"][~mask] == 0).all()
        assert torch.equal(batch["text"][0, : lengths[0]], encoders.text([captions[batch.keys[0]]])[0]["text"])


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
        later = drawn(dataset, 6, 3, rank, world=2)
        assert all(equal(one, other) for one, other in zip(whole[6 + rank :: 2], later, strict=True))


def test_an_epoch_is_as_many_draws_whoever_makes_them_and_its_position_is_its_number(data, encoders):
    stream = opened(data, encoders).train
    keys = [key for batch in islice(stream.batches(0, 0, 1), stream.epoch_draws) for key in batch.keys]
    assert sorted(keys) == sorted(clip.key for clip in stream.clips)
    assert stream.position(stream.epoch_draws) == {}


def test_dropped_captions_are_the_encoded_empty_one_at_the_asked_share(data, encoders):
    dataset = opened(data, encoders, caption_dropout=0.25, batch_size=1)
    batches = drawn(dataset, 0, 800)
    dropped = [batch for batch in batches if batch["text"].shape[1] == 1]
    assert abs(len(dropped) / 800 - 0.25) < 0.046  # three standard deviations
    empty = encoders.text([""])[0]["text"]
    assert all(torch.equal(batch["text"][0], empty) for batch in dropped)
    assert {1, 0} == {int(drawn(opened(data, encoders, caption_dropout=p), 0, 1)[0]["text"].shape[1] == 1)
                      for p in (0.0, 1.0)}  # fmt: skip


def test_one_of_several_captions_is_drawn_and_validation_uses_the_first(tmp_path, encoders):
    for name in ("a.mp4", "b.mp4"):
        make_video(tmp_path / name)
    rows = [{"video": name, "text": ["one", "three", "seven11"]} for name in ("a.mp4", "b.mp4")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"sources": [{"path": tmp_path / "m.jsonl"}], "buckets": {"sides": [64], "frames": [9]}}
    data = VideoData.model_validate({**fields, "cache": "memory", "caption_dropout": 0, "validation_items": 1})
    dataset = opened(data, encoders)
    lengths = Counter(batch["text"].shape[1] for batch in drawn(dataset, 0, 300))
    assert lengths.keys() == {3 + 1, 5 + 1, 7 + 1}
    assert all(abs(count - 100) < 25 for count in lengths.values())  # three standard deviations
    batches, _ = dataset.validation()
    assert batches[0]["text"].shape[1] == 3 + 1


def test_the_asked_share_of_batches_is_cut_to_a_shorter_length_of_the_buckets(data, encoders):
    whole, cut = (opened(data, encoders, random_frames=share, batch_size=1) for share in (0.0, 0.25))
    pairs = list(zip(drawn(whole, 0, 800), drawn(cut, 0, 800), strict=True))
    videos = [(one, other) for one, other in pairs if one["latents"].shape[2] == 3]  # 9 frames; images stay as they are
    shorter = [other for one, other in videos if other["latents"].shape[2] == 2]  # 5 frames
    assert abs(len(shorter) / len(videos) - 0.25) < 0.05  # three standard deviations
    for one, other in pairs:
        assert one.keys == other.keys
        assert torch.equal(one["latents"][:, :, : other["latents"].shape[2]], other["latents"])


def test_what_a_model_is_told_of_the_first_frame_is_kept_beside_the_latents_and_cut_alike(data):
    class Told(ToyEncoders):
        """Of the first frame its latents, over as many latent frames as the clip has; of the whole picture a vector."""

        def given(self, pixels: Tensor) -> Mapping[str, Tensor]:
            only_first = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], 2)
            return {"image": super().latents(only_first), "clip": pixels[:, :, 0].mean((2, 3)).bfloat16()}

    for kind in ("disk", "memory", "off"):
        for batch in drawn(opened(data, Told(), random_frames=1.0, cache=kind), 0, 5):
            assert batch["image"].shape == batch["latents"].shape
            assert torch.allclose(batch["image"][:, :, 0], batch["latents"][:, :, 0])
            assert batch["clip"].shape == (len(batch.keys), 3) and batch["clip"].dtype == torch.bfloat16


def on_cpu(family: ModelFamily) -> Encoders:
    return family.encoders(torch.device("cpu"), lambda module: module)


def pixels_of_13_frames() -> Tensor:
    return torch.rand(1, 3, 13, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", ["t2v", "i2v22", "ti2v"])
def test_the_first_latents_of_a_clip_equal_the_encoding_of_the_shorter_clip(tmp_path, kind):
    family = Wan.model_validate({"source": str(make_wan(tmp_path / kind, kind=kind))})
    assert family.geometry().causal
    wan, pixels = on_cpu(family), pixels_of_13_frames()
    with torch.no_grad():
        whole = {"latents": wan.latents(pixels), **wan.given(pixels)}
        for frames in (1, 5, 9):
            shorter = {"latents": wan.latents(pixels[:, :, :frames]), **wan.given(pixels[:, :, :frames])}
            first = {name: tensor[0] for name, tensor in whole.items()}
            first |= {name: first[name][:, : shorter[name].shape[2]] for name in whole if name in FRAMEWISE}
            for name in whole:
                torch.testing.assert_close(first[name], shorter[name][0], rtol=0, atol=1e-6)  # rounding of fp32


def test_a_family_whose_first_latents_depend_on_later_frames_says_so(tmp_path):
    family = HunyuanVideo.model_validate({"source": str(make_hunyuan(tmp_path / "hunyuan"))})
    hunyuan, pixels = on_cpu(family), pixels_of_13_frames()
    with torch.no_grad():
        whole, shorter = hunyuan.latents(pixels), hunyuan.latents(pixels[:, :, :5])
    assert (whole[:, :, :2] - shorter).abs().max() > 1e-3
    assert not family.geometry().causal


def test_the_next_batches_are_decoded_at_once_when_nothing_is_cached(data, encoders, monkeypatch):
    at_once, most, lock = 0, 0, threading.Lock()
    read = cache.clip_pixels

    def counted(clip: Clip, fps: float) -> Tensor:
        nonlocal at_once, most
        with lock:
            at_once, most = at_once + 1, max(most, at_once + 1)
        time.sleep(0.02)
        found = read(clip, fps)
        with lock:
            at_once -= 1
        return found

    monkeypatch.setattr(cache, "clip_pixels", counted)
    batches = drawn(opened(data, encoders, cache="off", workers=3), 0, 10)
    assert most == 3
    assert all(equal(a, b) for a, b in zip(batches, drawn(opened(data, encoders, cache="memory"), 0, 10), strict=True))


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
    assert all(batch["text"].shape[1] > 1 for batch in batches)


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


def kept(*texts: Tensor) -> list[Held]:
    return [Held({"text": text}) for text in texts]


def test_half_precision_is_laid_as_it_is_kept_and_in_fp32_beside_another_dtype():
    half, other, exact = torch.randn(3, 2).bfloat16(), torch.randn(3, 2).half(), torch.randn(2, 2)
    for texts, dtype in (
        ([half, half[:1]], torch.bfloat16), ([other], torch.float16), ([exact], torch.float32),
        ([half, other], torch.float32), ([half, exact], torch.float32), ([exact.double()], torch.float32),
    ):  # fmt: skip
        batch = collated(("a", "b")[: len(texts)], [], kept(*texts), {}, Slots())
        assert batch["text"].dtype == dtype
        for row, text in zip(batch["text"], texts, strict=True):
            assert torch.equal(row[: len(text)], text.to(dtype)) and not row[len(text) :].any()


def test_padding_is_zero_and_masked_in_memory_that_held_another_batch():
    slots = Slots()
    long, short = torch.ones(5, 2).bfloat16(), torch.ones(2, 2).bfloat16()
    collated(("a", "b"), [], kept(long, long), {}, slots)
    batch = collated(("a", "b"), [], kept(long, short), {}, slots)
    assert batch["text_mask"].tolist() == [[True] * 5, [True, True, False, False, False]]
    assert not batch["text"][1, 2:].any() and batch["text"][1, :2].all()


def test_texts_are_padded_with_zeros_to_the_longest():
    text, mask = padded([torch.ones(2, 3), torch.full((4, 3), 2.0)])
    assert text.shape == (2, 4, 3) and text[0, 2:].abs().sum() == 0
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_the_mask_of_texts_of_one_length_has_one_column_so_that_its_shape_says_that_all_is_text():
    _, mask = padded([torch.ones(3, 2), torch.ones(3, 2)])
    assert mask.tolist() == [[True], [True]]
