"""Shards: many entries in one file, found as single ones are, damaged one at a time, never the only copy too soon."""

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.data.clips import TINY
from tests.data.conftest import ToyEncoders
from tests.data.test_cache import IDENTITY, LATENTS, TEXTS, never, same, silent
from tests.data.test_loader import drawn, equal, opened
from weft.data import packing_shards, shards
from weft.data.cache import EXACT, Keeping
from weft.data.disk import LatentStore
from weft.data.encoding import captions_of
from weft.data.entries import digest
from weft.data.survey import Survey
from weft.data.video import VideoData
from weft.errors import ConfigError, DataError
from weft.events import Notice

SINGLE = replace(EXACT, shards=False)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entries make a shard: the folder of clips has few of each shape."""
    monkeypatch.setattr(packing_shards, "LEAST", 2)


@pytest.fixture
def survey(data: VideoData) -> Survey:
    return data.survey(TINY)


@pytest.fixture
def folder(data: VideoData) -> Path:
    return data.cache_folder


@pytest.fixture
def single(folder: Path, survey: Survey, encoders: ToyEncoders) -> LatentStore:
    """A cache of single files, as there were before shards."""
    store = LatentStore(folder, survey, IDENTITY, keeping=SINGLE)
    store.fill(lambda: encoders, silent)
    return store


@pytest.fixture
def packed(folder: Path, survey: Survey, encoders: ToyEncoders) -> LatentStore:
    store = LatentStore(folder, survey, IDENTITY)
    store.fill(lambda: encoders, silent)
    return store


def shards_in(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.safetensors"))


def singles_in(folder: Path) -> list[Path]:
    return sorted(path for kind in ("latents", "text") for path in (folder / kind).rglob("*.safetensors"))


def test_filling_puts_the_clips_of_each_shape_and_the_texts_into_a_shard(packed, folder):
    # Of the folder's eight clips five are square and two wide; the still picture is alone of its shape.
    # 9 frames are 3 latent ones; 80x48 has the proportions of 96x48, less one step of 16 pixels, within 64x64.
    groups = [path.name.rpartition("-")[0] for path in shards_in(folder)]
    assert groups == ["latents-4x3x6x10", "latents-4x3x8x8", "text"]
    assert len(singles_in(folder)) == 1
    status = packed.status()
    assert (status.present, status.missing, status.shards) == (LATENTS + TEXTS, 0, 3)
    assert status.sharded == LATENTS + TEXTS - 1
    assert f"{LATENTS + TEXTS - 1} of them in 3 shards" in status.line()


def test_a_sharded_cache_gives_what_single_files_give_and_needs_no_encoders(single, folder, survey):
    before = {what: dict(single.clip(what)) for what in survey.usable}
    texts = {what: dict(single.text(what)) for what in captions_of(survey)}
    single_again = LatentStore(folder, survey, IDENTITY)
    single_again.pack(silent)
    store = LatentStore(folder, survey, IDENTITY)
    assert store.fill(never, silent).encoded == 0 and len(shards_in(folder)) == 3
    assert all(same(store.clip(what), tensors) for what, tensors in before.items())
    assert all(same(store.text(what), tensors) for what, tensors in texts.items())


def test_batches_of_shards_and_of_single_files_are_the_same_bit_by_bit(data, encoders, tmp_path):
    other = data.model_copy(update={"cache_folder": tmp_path / "other", "cache_shards": False})
    pairs = zip(drawn(opened(data, encoders), 0, 12), drawn(opened(other, encoders), 0, 12), strict=True)
    assert all(equal(one, two) for one, two in pairs)
    assert shards_in(data.cache_folder) and not shards_in(other.cache_folder)


def test_entries_from_before_there_were_sums_are_read_and_packed(single, folder, survey):
    clip = survey.usable[0]
    path = single.path_of(clip)
    tensors = load_file(path)
    save_file(tensors, path, metadata={"about": clip.key, "sha256": digest(tensors)})
    assert same(single.clip(clip), tensors)
    store = LatentStore(folder, survey, IDENTITY)
    store.pack(silent)
    assert not path.exists() and same(store.clip(clip), tensors)


def test_a_shard_is_a_safetensors_file_that_says_what_it_holds(packed, folder, survey):
    with safe_open(shards_in(folder)[-1], "pt") as file:
        names = set(file.keys())
        assert "a still picture" in file.metadata()["about"]
    assert f"{packed.path_of('a still picture').stem}/text" in names


def flip(folder: Path, name: str) -> None:
    """A bit of one entry's data."""
    known = shards.Shards(folder)
    known.look()
    place = known.find(name)
    assert place is not None
    content = bytearray(place.path.read_bytes())
    content[next(iter(place.parts.values())).begin + 1] ^= 4
    place.path.write_bytes(content)


def test_a_flipped_bit_in_a_shard_costs_its_own_entry_alone(packed, folder, survey, encoders):
    clip = survey.train[0]
    before = packed.clip(clip)
    flip(folder / "shards", packed.path_of(clip).stem)
    with pytest.raises(DataError, match=rf"{clip.key}.*damaged and is now removed"):
        packed.clip(clip)
    again = LatentStore(folder, survey, IDENTITY)
    assert again.status().missing == 1
    assert again.fill(lambda: encoders, silent).encoded == 1
    assert same(again.clip(clip), before) and encoders.clips_encoded == LATENTS + 1


def test_a_batch_never_holds_a_damaged_entry(data, encoders, folder):
    dataset = opened(data, encoders, batch_size=1, caption_dropout=0.0)
    path = next(path for path in shards_in(folder) if path.name.startswith("latents"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged and is now removed"):
        drawn(dataset, 0, 8)


def test_a_shard_that_was_copied_in_part_gives_what_it_has(packed, folder, survey, encoders):
    path = shards_in(folder)[-1]
    path.write_bytes(path.read_bytes()[:-8])
    store = LatentStore(folder, survey, IDENTITY)
    assert store.status().missing == 1  # the last of the texts alone
    filled = store.fill(lambda: encoders, silent)
    assert (filled.damaged, filled.encoded) == (1, 1)
    assert store.status().missing == 0


def test_a_shard_without_a_sound_header_is_named_and_its_entries_are_made_anew(packed, folder, survey, encoders, heard):
    path = shards_in(folder)[-1]
    path.write_bytes(path.read_bytes()[:20])
    store = LatentStore(folder, survey, IDENTITY)
    assert store.fill(lambda: encoders, heard.append).encoded == TEXTS
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert any(path.name in text and "is not used; copy it again, or delete it" in text for text in said)


def test_a_deleted_shard_is_only_missing_entries(packed, folder, survey, encoders):
    shards_in(folder)[-1].unlink()
    with pytest.raises(DataError, match="not in the cache"):
        packed.text("")
    store = LatentStore(folder, survey, IDENTITY)
    assert store.status().missing == TEXTS
    assert store.fill(lambda: encoders, silent).encoded == TEXTS


def test_a_cache_that_was_moved_is_found_whole(packed, folder, survey):
    moved = folder.rename(folder.with_name("elsewhere"))
    assert LatentStore(moved, survey, IDENTITY).fill(never, silent).encoded == 0


def test_what_another_process_packs_meanwhile_is_read_from_its_shard(single, folder, survey):
    clip = survey.train[0]
    before, shown = single.clip(clip), single.shown(clip)
    LatentStore(folder, survey, IDENTITY).pack(silent)
    assert not single.path_of(clip).exists()
    target = torch.empty(shown.shapes["latents"])
    shown.write("latents", target)  # asked for when it was a single file, read when it lies in a shard
    assert torch.equal(target, before["latents"])
    assert all(single.clip(other) for other in survey.usable)


def test_of_two_processes_one_packs_a_shape_and_the_other_leaves_it(single, folder, survey):
    one, other = (LatentStore(folder, survey, IDENTITY) for _ in range(2))
    assert all(one._claims.take(folder / "shards" / group) for group in {one._group(what) for what in one._all()})
    other.pack(silent)
    assert not shards_in(folder) and other.status().missing == 0


def test_a_full_disk_leaves_single_files_and_says_so(single, folder, survey, heard, monkeypatch):
    def full(*args: object) -> list[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing_shards, "write_shard", full)
    before = singles_in(folder)
    store = LatentStore(folder, survey, IDENTITY)
    store.pack(heard.append)
    assert singles_in(folder) == before and store.status().missing == 0
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert any("the disk is full" in text and "none is lost" in text for text in said)


def test_what_a_killed_packing_left_is_cleared_away(single, folder, survey, monkeypatch):
    store = LatentStore(folder, survey, IDENTITY)
    with monkeypatch.context() as patched:  # the shard is whole, and its entries are about to be deleted
        patched.setattr(Path, "unlink", _only_claims(Path.unlink))
        store.pack(silent)
    (folder / "shards" / ".tmp-0123-text-abc.safetensors").write_bytes(b"half a shard")
    assert len(singles_in(folder)) == LATENTS + TEXTS and store.status().missing == 0
    LatentStore(folder, survey, IDENTITY).pack(silent)
    assert len(singles_in(folder)) == 1 and len(shards_in(folder)) == 3
    assert not list((folder / "shards").glob(".tmp-*"))


def _only_claims(unlink: Callable[..., None]) -> Callable[..., None]:
    def only(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".claim" or path.name.startswith(".tmp-"):
            unlink(path, missing_ok=missing_ok)

    return only


def test_large_shapes_are_spread_over_shards_of_limited_size(single, folder, survey, monkeypatch):
    paths = singles_in(folder)
    sizes = [path.stat().st_size for path in paths]
    groups = list(shards.portions(paths, limit=max(sizes) * 2))
    assert [path for group in groups for path in group] == paths
    assert all(sum(path.stat().st_size for path in group) <= max(sizes) * 2 for group in groups)


# ---- Half precision -----------------------------------------------------------------------------------------------


def test_latents_kept_in_bf16_are_the_rounded_ones_in_every_kind_of_cache(data, encoders, tmp_path):
    exact = drawn(opened(data, encoders), 0, 6)
    for kind in ("disk", "memory"):
        fields = {"cache": kind, "cache_dtype": "bf16", "cache_folder": tmp_path / "half"}
        for one, half in zip(exact, drawn(opened(data, encoders, **fields), 0, 6), strict=True):
            assert torch.equal(half["latents"], one["latents"].bfloat16()), "torch.equal asks for one dtype"
            assert torch.equal(half["text"], one["text"])


def test_entries_in_bf16_stand_beside_exact_ones_and_need_half_the_room(packed, folder, survey):
    half = LatentStore(folder, survey, IDENTITY, keeping=Keeping("bf16"))
    status, exact = half.status(), LatentStore(folder / "empty", survey, IDENTITY).status()
    assert (status.present, status.missing) == (TEXTS, LATENTS)
    assert 2 * status.estimated_bytes == exact.estimated_bytes


def test_what_is_never_kept_has_no_dtype(data):
    with pytest.raises((ConfigError, ValueError), match="cache: off"):
        VideoData.model_validate({**data.model_dump(), "cache": "off", "cache_dtype": "bf16"})
