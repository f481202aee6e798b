"""Captions alone: where they stand, what batches they make, and that the draws hold for any number of processes."""

import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.data.clips import TINY, WAN
from tests.data.conftest import ToyEncoders
from weft.contracts import Batch
from weft.data.prompt_files import read_prompts
from weft.data.prompt_loader import PromptDataset
from weft.data.prompts import PromptData
from weft.errors import ConfigError, DataError
from weft.geometry import VideoGeometry

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}
TI2V_5B = VideoGeometry(fps=24, space_stride=16, time_stride=4, patch=(1, 2, 2), latent_channels=48)
FOUR_SHAPES = {"sizes": [[64, 64], [96, 48]], "frames": [5, 9]}


def section(**fields: Any) -> PromptData:
    return PromptData.model_validate({"buckets": FOUR_SHAPES, **fields})


@pytest.fixture
def data(tmp_path: Path) -> PromptData:
    """Seven captions, of which three batches of up to three are made."""
    texts = [f"caption {'very ' * number}number {number}" for number in range(7)]
    return section(texts=texts, batch_size=3, cache_folder=tmp_path / "cache")


def opened(data: PromptData, encoders: ToyEncoders, beside: Mapping[str, str] = {}, **fields: object) -> PromptDataset:
    chosen = data.model_copy(update=fields)
    return chosen.open(
        chosen.survey(TINY), IDENTITY, lambda: encoders, lambda event: None, seed=11, last_step=100, beside=beside
    )


def drawn(dataset: PromptDataset, start: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.train.batches(start, rank, world), count))


def equal(one: Batch, other: Batch) -> bool:
    same_names = one.keys == other.keys and one.tensors.keys() == other.tensors.keys()
    return same_names and all(torch.equal(one[name], other[name]) for name in one.tensors)


# ---- Batches ----


def test_a_batch_holds_an_empty_shape_and_its_captions(data, encoders):
    dataset = opened(data, encoders)
    texts = {prompt.key: prompt.text for prompt in dataset.survey.train}
    for batch in drawn(dataset, 0, 6):
        assert batch.tensors.keys() == {"blank", "text", "text_mask"}
        assert batch["blank"].shape[:2] == (len(batch.keys), 4) and not batch["blank"].any()
        mask = batch["text_mask"].expand(batch["text"].shape[:2])
        assert mask.sum(1).tolist() == [len(texts[key]) + 1 for key in batch.keys]
        for row, key in zip(batch["text"], batch.keys, strict=True):
            expected = encoders.text([texts[key]])[0]["text"].float()
            assert torch.equal(row[: len(expected)], expected) and not row[len(expected) :].any()


def test_an_epoch_shows_every_caption_once_in_an_order_of_its_own(data, encoders):
    dataset = opened(data, encoders)
    assert dataset.train.epoch_draws == dataset.survey.epoch_draws(3) == 3
    epochs = [[key for batch in drawn(dataset, start, 3) for key in batch.keys] for start in (0, 3, 6)]
    assert all(Counter(keys) == Counter(prompt.key for prompt in dataset.survey.train) for keys in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_each_shape_is_drawn_as_often_as_any_other(data, encoders):
    batches = drawn(opened(data, encoders, cache="memory"), 0, 800)
    shapes = Counter(tuple(batch["blank"].shape[1:]) for batch in batches)
    # 64x64 and 96x48 pixels of 5 and 9 frames; 8 pixels a cell, 4 frames after the first in one.
    assert shapes.keys() == {(4, f, h, w) for f in (2, 3) for h, w in ((8, 8), (6, 12))}
    assert all(abs(count - 200) < 37 for count in shapes.values())  # three standard deviations


def test_a_restart_repeats_the_batches_bit_by_bit(data, encoders):
    whole = drawn(opened(data, encoders, caption_dropout=0.5), 0, 12)
    again = drawn(opened(data, encoders, caption_dropout=0.5), 7, 5)
    assert all(equal(one, other) for one, other in zip(whole[7:], again, strict=True))


def test_two_ranks_draw_what_one_draws(data, encoders):
    dataset = opened(data, encoders, caption_dropout=0.5)
    whole = drawn(dataset, 0, 12)
    for rank in (0, 1):
        assert all(map(equal, whole[rank::2], drawn(dataset, 0, 6, rank, world=2)))
        assert all(map(equal, whole[6 + rank :: 2], drawn(dataset, 6, 3, rank, world=2)))


def test_all_three_stores_give_the_same_batches_with_the_texts_beside(data, encoders):
    beside = {"negative": "blurred"}
    disk, memory, live = (drawn(opened(data, encoders, beside, cache=kind), 0, 4) for kind in ("disk", "memory", "off"))
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(disk, memory, live, strict=True))
    assert all(torch.equal(b["negative/text"][0], encoders.text(["blurred"])[0]["text"].float()) for b in disk)


def test_cached_captions_are_read_back_without_encoders(data, encoders):
    survey = data.survey(TINY)
    store = data.store(survey, IDENTITY, {"negative": "blurred"})
    assert store.status().missing == 7 + 1 + 1  # and the empty one
    assert opened(data, encoders, {"negative": "blurred"}) and encoders.clips_encoded == 0
    assert store.status().missing == 0
    other = opened(data, None, {"negative": "blurred"})  # type: ignore[arg-type]  # nothing asks it for anything
    assert len(drawn(other, 0, 3)) == 3


def test_the_asked_share_of_captions_is_dropped_and_by_default_none(data, encoders):
    def lengths(**fields: Any) -> list[int]:
        batches = drawn(opened(data, encoders, batch_size=1, cache="memory", **fields), 0, 400)
        return [batch["text"].shape[1] for batch in batches]

    assert min(lengths()) > 1
    assert abs(lengths(caption_dropout=0.25).count(1) / 400 - 0.25) < 0.065  # three standard deviations


def test_a_key_is_of_the_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    (tmp_path / "b.txt").write_text("# moved\n\nsecond\n")
    ones = section(files=[tmp_path / "a.txt"]).survey(TINY).train
    others = section(files=[tmp_path / "b.txt"]).survey(TINY).train
    assert ones[1].key == others[0].key != ones[0].key


def test_there_is_nothing_to_measure_on(data, encoders):
    dataset = opened(data, encoders)
    assert dataset.validation() == ([], []) and dataset.survey.validation == ()


def test_shares_are_equal_apart_and_together_all(data):
    surveys = [data.model_copy(update={"share": (i, 2)}).survey(TINY) for i in (0, 1)]
    keys = [{prompt.key for prompt in survey.train} for survey in surveys]
    assert not keys[0] & keys[1] and sorted(map(len, keys)) == [3, 4]
    assert keys[0] | keys[1] == {prompt.key for prompt in data.survey(TINY).train}
    nobody = data.model_copy(update={"texts": ("alone",), "share": (1, 2)}).survey(TINY)
    with pytest.raises(DataError, match="None of 1 captions"):
        nobody.refuse_when_unusable()


def test_the_digest_is_of_captions_and_shapes(data):
    def digest(**fields: object) -> str:
        return section(**{**data.model_dump(), **fields}).survey(TINY).digest()

    assert digest() == digest(cache="off") == digest(batch_size=1)
    assert len({digest(), digest(texts=["another"]), digest(buckets={"sizes": [[64, 64]], "frames": [5]})}) == 3


# ---- Shapes ----


def test_a_side_is_taken_in_every_aspect_ratio_in_multiples_of_the_models_own():
    sides = {"sides": [704], "frames": [81]}
    for geometry, multiple in ((WAN, 16), (TI2V_5B, 32)):
        shapes = section(texts=["a"], buckets=sides).survey(geometry).shapes
        assert len(shapes) == 5
        assert all(shape.height % multiple == shape.width % multiple == 0 for shape in shapes)
        assert all(shape.height * shape.width <= 704 * 704 for shape in shapes)
        ratios = sorted(shape.width / shape.height for shape in shapes)
        assert ratios == pytest.approx([9 / 16, 3 / 4, 1, 4 / 3, 16 / 9], rel=0.06)  # 32 pixels of a side of 528
    chosen = section(texts=["a"], buckets=sides, aspects=[[2, 1]]).survey(WAN).shapes
    assert [shape.width / shape.height for shape in chosen] == [2]


def test_a_size_that_would_lose_columns_is_refused_with_the_nearest():
    data = section(texts=["a"], buckets={"sizes": [[832, 464]], "frames": [81, 80]})
    with pytest.raises(ConfigError) as refused:
        data.survey(TI2V_5B)
    assert "832x464 is refused" in str(refused.value) and "832x448" in str(refused.value)
    assert "data.buckets.frames: 80 frames" in str(refused.value)


def test_shapes_above_the_budget_are_left_out_and_a_budget_below_all_is_refused():
    buckets = {"sizes": [[832, 480], [480, 480]], "frames": [81, 49], "token_budget": 20_000}
    shapes = section(texts=["a"], buckets=buckets).survey(WAN).shapes
    # 13 and 21 latent frames of 30x30 tokens; 13 of 30x52 are 20,280
    assert [shape.tokens for shape in shapes] == [21 * 30 * 30, 13 * 30 * 30] == [18_900, 11_700]
    with pytest.raises(ConfigError, match=r"49x480x480 has 11,700 tokens, above token_budget 5,000"):
        section(texts=["a"], buckets={**buckets, "token_budget": 5_000}).survey(WAN)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "no captions are named"),
        ({"texts": ["a", "  "]}, "caption 1, counted from 0, is empty"),
        ({"texts": ["a"], "aspects": [[1, 1]]}, "buckets.sizes are given"),
        ({"texts": ["a"], "buckets": {**FOUR_SHAPES, "upscale": True}}, "upscale"),  # there is nothing to enlarge
        ({"texts": ["a"], "share": [2, 2]}, "i is below n"),
    ],
)
def test_what_has_no_meaning_for_captions_alone_is_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        section(**fields)


# ---- Files ----


def texts_of(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path).prompts]


def test_a_text_file_has_one_caption_a_line_without_blank_lines_and_comments(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa red fox\n\n# not this\n  a hare, running \n", "utf-8")
    listed = read_prompts(tmp_path / "p.txt").prompts
    assert [(prompt.text, prompt.place) for prompt in listed] == [
        ("a red fox", f"{tmp_path / 'p.txt'}, line 1"),
        ("a hare, running", f"{tmp_path / 'p.txt'}, line 4"),
    ]


def test_manifests_name_captions_by_any_of_three_keys_or_as_they_are(tmp_path):
    rows = [{"text": "one"}, {"caption": "two"}, {"prompt": ["three", "four"]}, "five"]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text('prompt,seed\n"one, with a comma",3\ntwo,4\n')
    assert texts_of(tmp_path / "p.jsonl") == texts_of(tmp_path / "p.json") == ["one", "two", "three", "four", "five"]
    assert texts_of(tmp_path / "p.csv") == ["one, with a comma", "two"]
    assert read_prompts(tmp_path / "p.csv").notices == (
        f"{tmp_path / 'p.csv'}: the captions alone are used, not 'seed'.",
    )


def test_every_line_without_a_caption_is_told(tmp_path):
    rows = [{"text": "good"}, {"file_path": "a.mp4"}, {"text": "a", "prompt": "b"}, {"text": " "}, {"text": 3}, 4]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    with pytest.raises(DataError) as refused:
        read_prompts(path)
    told = str(refused.value).splitlines()
    wrong = ("a caption is lost", "Keep one", "is empty", "Expected a string", "expected a caption", "not JSON")
    assert len(told) == len(wrong)
    for line, (said, what) in enumerate(zip(told, wrong, strict=True), start=2):
        assert said.startswith(f"{path}, line {line}: ") and what in said


def test_a_lost_file_is_told_with_the_nearest(tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(DataError, match=r"there is no '.*promts\.txt'\. Did you mean '.*/prompts\.txt'\?"):
        read_prompts(tmp_path / "promts.txt")
    with pytest.raises(DataError, match="there is no"):
        read_prompts(tmp_path / "no folder" / "promts.txt")


def test_files_that_hold_no_captions_are_refused(tmp_path):
    contents = {"empty.txt": b"# nothing\n", "latin.txt": "ein M\u00e4rchen".encode("latin-1"), "clip.mp4": b"a"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    said = {"empty.txt": "holds no caption", "latin.txt": "as UTF-8", "clip.mp4": "another ending", ".": "is a folder"}
    for name, what in said.items():
        with pytest.raises(DataError, match=what):
            read_prompts(tmp_path / name)


def test_a_caption_that_stands_twice_is_drawn_once_and_told(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    survey = section(files=[tmp_path / "p.txt"], texts=["b", "c"]).survey(TINY)
    assert [prompt.text for prompt in survey.train] == ["a", "b", "c"]
    assert survey.notices == (
        f"2 captions stand there already and are left out, first 'a' ({tmp_path / 'p.txt'}, line 3).",
    )
