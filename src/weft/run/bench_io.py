"""How many cached clips a second the training loader reads: real entries of a released size, random numbers in them."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from weft.data.buckets import Bucket
from weft.data.cache import Keeping
from weft.data.disk import LatentStore
from weft.data.entries import write_entry
from weft.data.loader import Draws, VideoExperience
from weft.data.survey import Clip
from weft.geometry import VideoGeometry
from weft.run.bench_figures import SCHEMA, spread
from weft.run.bench_machine import processor, software

GEOMETRY = VideoGeometry(fps=16, space_stride=8, time_stride=4, patch=(1, 2, 2), latent_channels=16)
SIZE = (81, 480, 832)
TEXT = (512, 4096)
CLIPS, ROUNDS = 24, 10


@dataclass(frozen=True)
class Items:
    """What a store keeps."""

    usable: tuple[Clip, ...]
    texts: tuple[str, ...]
    geometry: VideoGeometry = field(default=GEOMETRY)
    fps: float = 16.0


def read_cache() -> dict[str, Any]:
    """Write a cache of clips of 81 frames at 480x832 and read it through, once to warm and then in rounds.

    Times are processor time of all threads: what a disk adds is not in them, for the files lie in the page cache.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = items_of(folder)
        known, keeping = {"latents": "bench", "text": "bench"}, Keeping("fp32", True)
        store = LatentStore(folder / "cache", items, known, keeping=keeping)  # type: ignore[arg-type]
        fill(store, items)
        draws = Draws(batch_size=1, seed=0, caption_dropout=0.0)
        batches = VideoExperience("clips", 1, items.usable, store, draws).batches(0, 0, 1)
        seconds = []
        for _ in range(ROUNDS + 1):
            began = process_time()
            for _ in range(CLIPS):
                next(batches)
            seconds.append((process_time() - began) / CLIPS)
    rates = [1 / max(each, 1e-9) for each in seconds[1:]]
    frames, height, width = SIZE
    return {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"device": "cpu", "processor": processor(), "threads": torch.get_num_threads()},
        "software": software("diffusers"),
        "case": {
            "name": "cached clips",
            "frames": frames,
            "height": height,
            "width": width,
            "batch": 1,
            "text": TEXT[0],
        },
        "step_seconds": {"median": median(seconds[1:]), **spread(seconds[1:]), "steps": ROUNDS * CLIPS},
        "clips_per_second": median(rates),
        "memory_bytes": {"peak": None, "by": "process"},
        "extrapolated": False,
    }


def items_of(folder: Path) -> Items:
    """Clips that stand for files that were read before."""
    frames, height, width = SIZE
    bucket, clips = Bucket(*SIZE, GEOMETRY.tokens(frames, height, width)), []
    for number in range(CLIPS):
        path = folder / f"{number}.mp4"
        path.write_text(str(number))
        clips.append(
            Clip(
                key=path.name, name=path.name, path=path, captions=(f"caption {number}",), media="video",
                bucket=bucket, verdict="kept", reason="",
            )
        )  # fmt: skip
    return Items(tuple(clips), tuple(clip.caption for clip in clips))


def fill(store: LatentStore, items: Items) -> None:
    """Entries as encoding writes them."""
    chance, shape = torch.Generator().manual_seed(0), GEOMETRY.latent_shape(*SIZE)
    for clip in items.usable:
        latents = torch.randn(shape, generator=chance)
        write_entry(store.path_of(clip), {"latents": latents}, clip.key)
        text = torch.randn(TEXT, generator=chance).bfloat16()
        write_entry(store.path_of(clip.caption), {"text": text}, clip.caption)
    store.pack(lambda event: None)
