"""Filling a cache: decoded ahead by threads, encoded together, the same whatever is done at once."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.clips import TINY, Recipe, captioned, make_video
from tests.data.conftest import ToyEncoders
from weft.data import media
from weft.data.cache import MemoryStore, Store
from weft.data.disk import LatentStore
from weft.data.encoding import pixels_of
from weft.data.filling import WINDOWS_AHEAD, Hands
from weft.data.survey import Clip, Survey
from weft.data.video import VideoData
from weft.events import Event, Progress

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}


class Counting(ToyEncoders):
    """Knows how many clips it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def latents(self, pixels: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        return super().latents(pixels)


@pytest.fixture
def windows(clips: Path, tmp_path: Path) -> Survey:
    """Two windows and more of each clip."""
    fields = {"sources": [{"path": clips}], "buckets": {"sides": [64], "frames": [5]}}
    extraction = {"kind": "slide", "step": 2}
    return VideoData.model_validate({**fields, "extraction": extraction}).survey(TINY)


def filled(store: Store, encoders: ToyEncoders) -> Store:
    store.fill(lambda: encoders, lambda event: None)
    return store


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_number_of_workers_changes_nothing_that_is_kept(windows, tmp_path):
    one = filled(MemoryStore(windows, Hands(workers=1)), ToyEncoders())
    for workers in (2, 5):
        other = filled(LatentStore(tmp_path / str(workers), windows, IDENTITY, Hands(workers=workers)), ToyEncoders())
        assert all(same(one.clip(clip), other.clip(clip)) for clip in windows.usable)


def test_progress_is_told_in_one_order_whatever_the_number_of_workers(windows):
    def notes(workers: int) -> list[str]:
        heard: list[Event] = []
        MemoryStore(windows, Hands(workers=workers)).fill(ToyEncoders, heard.append)
        return [event.note for event in heard if isinstance(event, Progress)]

    assert notes(1) == notes(4)


def test_a_file_is_opened_once_for_all_its_windows(windows, monkeypatch):
    opened: Counter[str] = Counter()
    really = media.read_cuts

    def counted(path: Path, cuts: list[media.Cut]) -> Iterator[object]:
        opened[path.name] += 1
        return really(path, cuts)

    monkeypatch.setattr("weft.data.encoding.read_cuts", counted)
    filled(MemoryStore(windows), ToyEncoders())
    videos = {clip.name: 0 for clip in windows.usable if clip.media == "video"}
    assert opened == Counter(videos.keys()) and len(windows.usable) > 2 * len(videos)


def test_a_long_film_is_never_decoded_far_ahead_of_a_slow_encoder(tmp_path, monkeypatch):
    captioned(make_video(tmp_path / "film.mp4", Recipe(frames=120)))
    fields = {"sources": [{"path": tmp_path}], "buckets": {"sides": [64], "frames": [5]}}
    survey = VideoData.model_validate({**fields, "extraction": {"kind": "chunk"}}).survey(TINY)
    decoded = 0
    waiting: list[int] = []

    def counted(items: list[Clip], fps: float) -> Iterator[tuple[Clip, Tensor]]:
        nonlocal decoded
        for found in pixels_of(items, fps):
            decoded += 1
            yield found

    class Slow(ToyEncoders):
        def latents(self, pixels: Tensor) -> Tensor:
            time.sleep(0.03)
            waiting.append(decoded - self.clips_encoded)
            return super().latents(pixels)

    monkeypatch.setattr("weft.data.filling.pixels_of", counted)
    filled(MemoryStore(survey, Hands(workers=2)), Slow())
    assert len(waiting) == 24
    assert max(waiting) <= 1 + WINDOWS_AHEAD + 1  # in the encoder; ready; in the thread's hand


def test_clips_of_one_bucket_are_encoded_together_and_give_the_same_to_rounding(windows, tmp_path):
    singly, together = Counting(), Counting()
    one = filled(MemoryStore(windows), singly)
    four = Hands(workers=2, encoder_batch=4)
    memory, disk = (
        filled(MemoryStore(windows, four), together),
        filled(LatentStore(tmp_path, windows, IDENTITY, four), ToyEncoders()),
    )
    per_bucket = Counter(clip.bucket for clip in windows.usable).values()
    assert set(singly.sizes) == {1}
    assert Counter(together.sizes)[4] == sum(count // 4 for count in per_bucket)
    assert sum(together.sizes) == sum(per_bucket) and len(together.sizes) == sum(-(-count // 4) for count in per_bucket)
    for clip in windows.usable:
        torch.testing.assert_close(memory.clip(clip)["latents"], one.clip(clip)["latents"], rtol=0, atol=1e-5)
        assert same(memory.clip(clip), disk.clip(clip))  # of one batch size they are equal


def test_windows_have_entries_of_their_own_and_the_first_is_that_of_the_whole_clip(windows, clips, tmp_path):
    disk = LatentStore(tmp_path, windows, IDENTITY)
    assert len({disk.path_of(clip) for clip in windows.usable}) == len(windows.usable)
    fields = {"sources": [{"path": clips}], "buckets": {"sides": [64], "frames": [5]}}
    head = VideoData.model_validate(fields).survey(TINY)
    filled(LatentStore(tmp_path, head, IDENTITY), ToyEncoders())
    assert disk.status().present == len(head.usable) + len({"", *(clip.caption for clip in head.usable)})


@pytest.mark.parametrize("encoder_batch", [1, 4])
def test_a_clip_that_is_there_under_two_names_is_encoded_once(tmp_path, encoder_batch):
    one = captioned(make_video(tmp_path / "clips" / "a.mp4"))
    shutil.copy(one, captioned(tmp_path / "clips" / "b.mp4"))
    fields = {"sources": [{"path": one.parent}], "buckets": {"sides": [64], "frames": [9]}}
    survey = VideoData.model_validate(fields).survey(TINY)
    encoders = ToyEncoders()
    store = filled(LatentStore(tmp_path / "cache", survey, IDENTITY, Hands(2, encoder_batch)), encoders)
    assert encoders.clips_encoded == 1 and same(*map(store.clip, survey.usable))


def test_another_stride_or_declared_rate_is_another_entry(clips, tmp_path):
    def paths(**source: object) -> set[Path]:
        fields = {"sources": [{"path": clips, "only": "video", **source}], "buckets": {"sides": [64], "frames": [1]}}
        survey = VideoData.model_validate(fields).survey(TINY)
        disk = LatentStore(tmp_path, survey, IDENTITY)
        return {disk.path_of(clip) for clip in survey.usable}

    found = [paths(), paths(stride=2), paths(source_fps=30), paths(stride=2, source_fps=30)]
    assert len(set.union(*found)) == sum(map(len, found)) == 4 * 7


def test_a_clip_that_ends_early_loses_only_the_windows_behind_its_end(tmp_path):
    captioned(make_video(tmp_path / "clips" / "a.mp4", Recipe(frames=20)))
    fields = {"sources": [{"path": tmp_path / "clips"}], "buckets": {"sides": [64], "frames": [5]}}
    survey = VideoData.model_validate({**fields, "extraction": {"kind": "chunk"}}).survey(TINY)
    make_video(tmp_path / "clips" / "a.mp4", Recipe(frames=12))  # overwritten after the survey
    store = MemoryStore(survey)
    result = store.fill(ToyEncoders, lambda event: None)
    assert sorted(result.failed) == ["a.mp4@10", "a.mp4@15"] and "ends after 12" in result.failed["a.mp4@10"]
    survey.without(result.failed).refuse_when_unusable(1)  # one clip, whatever the number of its windows


@pytest.mark.parametrize(("workers", "expected"), [(3, 3), (1, 1)])
def test_the_workers_are_as_many_as_asked(workers, expected):
    assert Hands.of(workers, 1).workers == expected


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (2, 2), (6, 6), (64, 8)])
def test_auto_is_one_worker_for_each_core_from_2_to_8(cores, workers, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert Hands.of("auto", 1).workers == workers
