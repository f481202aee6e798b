"""The cache: entries that are found by what they were made of, written whole, and never used when damaged."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.clips import TINY, Recipe, captioned, make_video
from tests.data.conftest import ToyEncoders
from weft.data.cache import LiveStore, MemoryStore, Store
from weft.data.disk import LatentStore
from weft.data.encoding import captions_of
from weft.data.entries import ContentHashes
from weft.data.stores import open_store
from weft.data.sums import Sum
from weft.data.survey import Survey
from weft.data.video import VideoData
from weft.errors import DataError
from weft.events import PhaseStarted, Progress

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}
LATENTS, TEXTS = 8, 9  # of the folder of clips: the texts are eight captions and the empty one


@pytest.fixture
def survey(data: VideoData) -> Survey:
    return data.survey(TINY)


@pytest.fixture
def folder(data: VideoData) -> Path:
    return data.cache_folder


@pytest.fixture
def store(folder: Path, survey: Survey) -> LatentStore:
    return LatentStore(folder, survey, IDENTITY)


def silent(event: object) -> None: ...


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def never() -> ToyEncoders:
    raise AssertionError("a complete cache loads no encoders")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors"))


def test_a_cache_is_filled_once_and_then_needs_no_encoders(store, encoders):
    assert store.status().missing == LATENTS + TEXTS
    filled = store.fill(lambda: encoders, silent)
    assert (filled.encoded, encoders.clips_encoded) == (LATENTS + TEXTS, LATENTS)
    assert store.fill(never, silent).encoded == 0
    status = store.status()
    assert (status.present, status.missing, status.estimated_bytes) == (LATENTS + TEXTS, 0, 0)


def test_filling_tells_its_phase_and_each_entry(store, encoders, heard):
    store.fill(lambda: encoders, heard.append)
    assert heard[0] == PhaseStarted(phase="caching", total=LATENTS + TEXTS)
    assert [event.done for event in heard if isinstance(event, Progress)] == list(range(1, LATENTS + TEXTS + 1))


def test_the_encoders_are_made_once(store, encoders):
    made = []
    store.fill(lambda: made.append(1) or encoders, silent)
    assert len(made) == 1


def test_disk_memory_and_no_cache_give_the_same_tensors(store, survey, encoders, folder):
    memory, live = open_store("memory", folder, survey, IDENTITY), open_store("off", folder, survey, IDENTITY)
    assert isinstance(memory, MemoryStore) and isinstance(live, LiveStore)
    for each in (store, memory, live):
        each.fill(lambda: encoders, silent)
    for clip in survey.usable:
        assert store.clip(clip)["latents"].dtype == torch.float32
        assert same(store.clip(clip), memory.clip(clip))
        assert same(store.clip(clip), live.clip(clip))
    for caption in captions_of(survey):
        assert store.text(caption)["text"].dtype == torch.bfloat16
        assert len(store.text(caption)["text"]) == len(caption) + 1
        assert same(store.text(caption), memory.text(caption))
        assert same(store.text(caption), live.text(caption))


def test_the_empty_caption_is_encoded_not_zero(store, encoders):
    store.fill(lambda: encoders, silent)
    empty = store.text("")["text"]
    assert empty.shape == (1, 6) and empty.abs().sum() > 0


def test_another_autoencoder_or_cut_finds_none_of_the_old_latents(store, data, encoders, folder, survey):
    store.fill(lambda: encoders, silent)
    others: list[Store] = [
        LatentStore(folder, survey, {**IDENTITY, "latents": "vae-2"}),
        LatentStore(folder, data.model_copy(update={"fps": 12.0}).survey(TINY), IDENTITY),
    ]
    assert others[0].status().missing == LATENTS
    assert others[1].status().missing == LATENTS - 1  # an image has no rate
    assert LatentStore(folder, survey, {**IDENTITY, "text": "t5-2"}).status().missing == TEXTS


def test_an_edited_clip_is_encoded_anew_and_a_renamed_one_is_not(tmp_path, encoders, data, folder):
    clip = captioned(make_video(tmp_path / "clips" / "a.mp4", Recipe(frames=9)))
    fields = {"sources": [{"path": tmp_path / "clips"}], "buckets": {"sides": [64], "frames": [9]}}
    section = VideoData.model_validate({**fields, "cache_folder": folder})

    def missing() -> int:
        return section.store(section.survey(TINY), IDENTITY).status().missing

    section.store(section.survey(TINY), IDENTITY).fill(lambda: encoders, silent)
    clip.with_suffix(".txt").rename(tmp_path / "clips" / "b.txt")
    clip.rename(tmp_path / "clips" / "b.mp4")
    assert missing() == 0
    make_video(tmp_path / "clips" / "b.mp4", Recipe(frames=10))
    assert missing() == 1


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def reshaped(path: Path) -> None:
    from weft.data.entries import write_entry

    write_entry(path, {"latents": torch.zeros(4, 1, 2, 2)}, "of another shape")


@pytest.mark.parametrize("damage", [torn, emptied, reshaped])
def test_a_damaged_entry_is_counted_and_encoded_anew(
    store: LatentStore, survey: Survey, encoders: ToyEncoders, damage: Callable[[Path], None]
):
    store.fill(lambda: encoders, silent)
    clip = survey.train[0]
    before = store.clip(clip)
    damage(store.path_of(clip))
    assert store.status().missing == 1
    filled = store.fill(lambda: encoders, silent)
    assert (filled.damaged, filled.encoded) == (1, 1)
    assert same(store.clip(clip), before)


def test_a_flipped_bit_is_found_when_the_entry_is_read_and_never_used(store, survey, encoders):
    store.fill(lambda: encoders, silent)
    clip = survey.train[0]
    path = store.path_of(clip)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{clip.key}.*damaged and is now removed"):
        store.clip(clip)
    assert store.fill(lambda: encoders, silent).encoded == 1


def test_an_entry_is_summed_when_it_is_first_read_and_whole_ever_after(store, encoders, survey, monkeypatch):
    store.fill(lambda: encoders, silent)
    summed: list[int] = []
    add = Sum.add
    monkeypatch.setattr(Sum, "add", lambda self, block: (summed.append(len(block)), add(self, block))[1])
    clip, other = survey.train[:2]
    first = store.clip(clip)
    once = sum(summed)
    assert once == sum(tensor.nbytes for tensor in first.values()) and same(store.clip(clip), first)
    assert sum(summed) == once
    store.clip(other)
    assert sum(summed) > once
    path = store.path_of(clip)
    path.write_bytes(path.read_bytes()[:-8])  # cut off since: there is nothing to read
    with pytest.raises(DataError, match=rf"{clip.key}.*damaged and is now removed"):
        store.clip(clip)
    assert store.fill(lambda: encoders, silent).encoded == 1


def test_a_fill_that_is_killed_goes_on_where_it_was(store, encoders, folder):
    def killed(event: object) -> None:
        if isinstance(event, Progress) and event.done == TEXTS + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.fill(lambda: encoders, killed)
    assert len(files(folder)) == TEXTS + 3
    assert store.fill(lambda: encoders, silent).encoded == LATENTS - 3


def test_what_another_process_has_encoded_meanwhile_is_not_encoded_again(folder, survey, encoders):
    one, other = (LatentStore(folder, survey, IDENTITY) for _ in range(2))
    theirs = ToyEncoders()

    def overtaken(event: object) -> None:
        if isinstance(event, Progress) and event.done == TEXTS + 1:
            other.fill(lambda: theirs, silent)

    one.fill(lambda: encoders, overtaken)
    assert (encoders.clips_encoded, theirs.clips_encoded) == (1, LATENTS - 1)
    assert not list(folder.rglob("*.partial"))


def test_latents_that_are_not_finite_stop_the_fill_and_name_the_clip(store, encoders, survey):
    class Overflowing(ToyEncoders):
        def latents(self, pixels: Tensor) -> Tensor:
            return super().latents(pixels) / 0

    with pytest.raises(DataError, match=rf"{survey.usable[0].key}: its latents are not finite"):
        store.fill(Overflowing, silent)


def test_a_clip_that_cannot_be_decoded_is_reported_and_the_rest_is_encoded(tmp_path, folder, encoders):
    good, bad = (captioned(make_video(tmp_path / "clips" / name, Recipe(frames=9))) for name in ("a.mp4", "b.mp4"))
    fields = {"sources": [{"path": good.parent}], "buckets": {"sides": [64], "frames": [9]}}
    section = VideoData.model_validate({**fields, "cache_folder": folder})
    survey = section.survey(TINY)
    bad.write_text("overwritten after the survey")
    filled = section.store(survey, IDENTITY).fill(lambda: encoders, silent)
    assert list(filled.failed) == ["b.mp4"] and str(bad) in filled.failed["b.mp4"]
    assert encoders.clips_encoded == 1


def test_the_hash_of_a_file_is_remembered_until_the_file_changes(tmp_path):
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"one")
    hashes = ContentHashes(tmp_path / "hashes.json")
    first = hashes.of(clip)
    hashes.save()
    stamp = clip.stat().st_mtime_ns
    clip.write_bytes(b"two")
    os.utime(clip, ns=(stamp, stamp))  # same size and time: only the memo can still say "one"
    assert ContentHashes(tmp_path / "hashes.json").of(clip) == first
    os.utime(clip, ns=(time.time_ns(), stamp + 1))
    assert ContentHashes(tmp_path / "hashes.json").of(clip) != first


def test_a_spoilt_memo_of_hashes_is_only_a_lost_memo(tmp_path):
    (tmp_path / "hashes.json").write_text("[1, 2")
    (tmp_path / "a.mp4").write_bytes(b"one")
    assert len(ContentHashes(tmp_path / "hashes.json").of(tmp_path / "a.mp4")) == 64
