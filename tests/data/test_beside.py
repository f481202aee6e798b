"""Texts beside the captions: encoded by every store, told by every batch, and of no effect on what else it holds."""

from collections.abc import Mapping, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from tests.data.clips import TINY
from tests.data.conftest import ToyEncoders
from weft.contracts import Batch
from weft.data.loader import VideoDataset
from weft.data.video import VideoData

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}
NEGATIVE = "blurred, five words or more"
CACHES = ("disk", "memory", "off")


class Pooled(ToyEncoders):
    """Of each caption a vector too, as HunyuanVideo's encoders give it."""

    def text(self, captions: Sequence[str]) -> list[Mapping[str, Tensor]]:
        return [{**told, "pooled": told["text"].mean(0)} for told in super().text(captions)]


def opened(data: VideoData, beside: Mapping[str, str], encoders: ToyEncoders, **fields: object) -> VideoDataset:
    section = data.model_copy(update=fields)
    return section.open(
        section.survey(TINY), IDENTITY, lambda: encoders, lambda event: None, seed=11, last_step=100, beside=beside
    )


def drawn(dataset: VideoDataset, count: int = 6, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.train.batches(0, rank, world), count))


@pytest.mark.parametrize("cache", CACHES)
def test_every_batch_tells_the_text_once_under_its_name_with_all_that_the_encoders_give(data, cache):
    encoders = Pooled()
    (expected,) = encoders.text([NEGATIVE])
    dataset = opened(data, {"negative": NEGATIVE}, encoders, cache=cache, validation_items=2)
    batches, failed = dataset.validation()
    assert batches and not failed
    for batch in [*drawn(dataset), *batches]:
        assert torch.equal(batch["negative/text"], expected["text"].float()[None])
        assert batch["negative/text"].dtype == batch["negative/pooled"].dtype == torch.float32
        assert batch["negative/text_mask"].tolist() == [[True]]
        assert torch.equal(batch["negative/pooled"], expected["pooled"].float()[None])


@pytest.mark.parametrize("cache", CACHES)
def test_texts_beside_the_captions_change_nothing_else_in_a_batch(data, encoders, cache):
    fields = {"cache": cache, "caption_dropout": 0.5, "random_frames": 0.5}
    plain, told = (drawn(opened(data, beside, encoders, **fields)) for beside in ({}, {"negative": NEGATIVE}))
    for one, other in zip(plain, told, strict=True):
        assert one.keys == other.keys and one.tensors.keys() == {"latents", "text", "text_mask"}
        assert all(torch.equal(one[name], other[name]) for name in one.tensors)
        assert set(other.tensors) - set(one.tensors) == {"negative/text", "negative/text_mask"}


def test_the_cache_counts_them_and_keeps_them_once_for_all_runs(data, encoders):
    survey = data.survey(TINY)
    plain, told = data.store(survey, IDENTITY), data.store(survey, IDENTITY, {"negative": NEGATIVE})
    assert told.status().missing == plain.status().missing + 1
    told.fill(lambda: encoders, lambda event: None)
    assert told.status().missing == plain.status().missing == 0
    a_caption = next(clip.caption for clip in survey.usable)
    assert data.store(survey, IDENTITY, {"one": "", "other": a_caption}).status().missing == 0
    only_a_text = data.store(survey, IDENTITY, {"negative": "another"}).status()
    assert only_a_text.line().endswith("; the missing are texts.")


def test_an_empty_text_is_the_encoded_empty_caption(data, encoders):
    batch = drawn(opened(data, {"negative": ""}, encoders), 1)[0]
    assert torch.equal(batch["negative/text"][0], encoders.text([""])[0]["text"].float())
