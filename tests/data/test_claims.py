"""Processes that fill one cache at once divide the work; what a killed one was at is taken over."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from torch import Tensor

from tests.data.clips import TINY
from tests.data.conftest import ToyEncoders
from tests.multi import PRELOADED
from weft.data import claims
from weft.data.claims import Claims, claim_of
from weft.data.disk import LatentStore
from weft.data.filling import Hands
from weft.data.video import VideoData
from weft.events import Event, Notice

IDENTITY = {"network": "n", "latents": "vae-1", "text": "t5-1"}


class Slow(ToyEncoders):
    def latents(self, pixels: Tensor) -> Tensor:
        time.sleep(0.1)
        return super().latents(pixels)


def fill(clips: Path, folder: Path, barrier: Barrier, counts: "Queue[tuple[int, int, int]]") -> None:
    fields = {"sources": [{"path": clips}], "buckets": {"sides": [64], "frames": [5]}, "cache_folder": folder}
    survey = VideoData.model_validate({**fields, "extraction": {"kind": "chunk"}}).survey(TINY)
    store, encoders = LatentStore(folder, survey, IDENTITY, Hands(workers=2)), Slow()
    barrier.wait()
    store.fill(lambda: encoders, lambda event: None)
    counts.put((encoders.clips_encoded, store.status().missing, len(survey.usable)))


@pytest.mark.slow
def test_two_processes_that_fill_one_folder_encode_each_clip_once(clips, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    barrier, counts = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fill, args=(clips, tmp_path, barrier, counts)) for _ in range(2)]
    for process in processes:
        process.start()
    (one, missing, total), (other, also_missing, _) = counts.get(timeout=60), counts.get(timeout=60)
    for process in processes:
        process.join(30)
    assert one + other == total and min(one, other) >= 2
    assert missing == also_missing == 0
    assert not list(tmp_path.rglob("*.claim*"))


def claim(entry: Path, process: int, host: str) -> None:
    claim_of(entry).parent.mkdir(parents=True, exist_ok=True)
    claim_of(entry).write_text(json.dumps({"host": host, "process": process}))


def test_what_an_ended_process_was_making_is_taken_over_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim(tmp_path / "a.safetensors", ended.pid, socket.gethostname())
    with Claims() as own:
        assert own.take(tmp_path / "a.safetensors")


def test_what_a_running_process_is_making_is_left_to_it_until_it_gives_no_sign_for_long(tmp_path):
    entry = tmp_path / "a.safetensors"
    claim(entry, os.getpid(), "another machine")
    with Claims() as own:
        assert not own.take(entry)
        long_ago = time.time() - claims.STALE_SECONDS - 1
        os.utime(claim_of(entry), (long_ago, long_ago))
        assert own.take(entry)
    assert not claim_of(entry).exists()


def test_claims_are_kept_fresh_while_the_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    entry = tmp_path / "a.safetensors"
    with Claims() as own:
        assert own.take(entry) and not own.take(entry)
        os.utime(claim_of(entry), (0, 0))
        time.sleep(0.3)
        assert time.time() - claim_of(entry).stat().st_mtime < 10


def test_claims_are_given_up_when_the_work_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), Claims() as own:
        own.take(tmp_path / "a.safetensors")
        raise KeyboardInterrupt
    assert not claim_of(tmp_path / "a.safetensors").exists()


def test_a_fill_waits_for_what_another_process_is_making_and_uses_it(clips, tmp_path):
    fields = {"sources": [{"path": clips}], "buckets": {"sides": [64], "frames": [5]}, "cache_folder": tmp_path}
    survey = VideoData.model_validate(fields).survey(TINY)
    clip = survey.usable[0]
    theirs = LatentStore(tmp_path, survey, IDENTITY)
    assert theirs.take(clip) == "ours"
    encoders = ToyEncoders()
    made = {"latents": ToyEncoders().latents(Tensor(1, 3, 5, 64, 64).zero_())[0].detach()}
    own = LatentStore(tmp_path, survey, IDENTITY)
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Notice):  # it waits
            theirs.keep(clip, made)

    filled = own.fill(lambda: encoders, hear)
    assert [event.text for event in heard if isinstance(event, Notice)] == [
        "cache: waiting for 1 that another process makes"
    ]
    assert encoders.clips_encoded == len(survey.usable) - 1 and not filled.failed
    assert own.clip(clip)["latents"].equal(made["latents"])
