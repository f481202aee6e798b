"""Cached clips per second of the training loader, against torch's DataLoader and other ways to read the same files.

    python benchmarks/data_path.py --json benchmarks/results/data-path-cpu.json

Each clip has latents of 81 frames at 480x832 and a text; the files lie in the page cache. All ways give the same
tensors, in the dtypes in which they are kept; one way more is what a run on a CPU does, which widens them to fp32.
Times are processor time of the thread that reads, on one thread, the ways in turns; the figure is the best round, since
whoever else works on the machine takes caches and memory from all of them, and the median stands beside it. Of a
DataLoader with workers it is the processor time of all its processes, which stay for all epochs.

of_the_bytes: the share of a round's time that its bytes alone would have taken, in the median round.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from time import process_time, thread_time
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from weft.contracts import Batch
from weft.data.buckets import Bucket
from weft.data.cache import Keeping
from weft.data.disk import LatentStore
from weft.data.encoding import captions_of
from weft.data.entries import write_entry
from weft.data.loader import Draws, VideoExperience
from weft.data.survey import Clip
from weft.engines.single_device import SingleEngine
from weft.geometry import VideoGeometry
from weft.run.bench_machine import processor

LATENTS = (16, 21, 60, 104)
WIDTH = 4096
EPOCHS_OF_WORKERS = 6  # the first, which starts them, is not counted
CLIPS = 24  # in the cache
EPOCH = 96  # clips of a DataLoader with workers, so that its beginning and end weigh little
BYTES = "bytes alone, unchecked"
GEOMETRY = VideoGeometry(fps=16, space_stride=8, time_stride=4, patch=(1, 2, 2), latent_channels=16)
IDENTITY = {"latents": "vae", "text": "t5"}


@dataclass(frozen=True)
class Items:
    """What a store keeps: clips and their captions."""

    usable: tuple[Clip, ...]
    geometry: Any = GEOMETRY
    fps: float = 16.0
    texts: tuple[str, ...] = ()


def clips_of(folder: Path, count: int) -> tuple[Clip, ...]:
    """Clips whose files say nothing but their number: their entries are written beforehand."""
    bucket, made = Bucket(81, 480, 832, GEOMETRY.tokens(81, 480, 832)), []
    for number in range(count):
        path = folder / f"{number}.mp4"
        path.write_text(str(number))
        made.append(
            Clip(
                key=path.name, name=path.name, path=path, captions=(f"caption {number}",), media="video",
                bucket=bucket, verdict="kept", reason="",
            )
        )  # fmt: skip
    return tuple(made)


@dataclass
class Case:
    """One cache. tokens: length of the texts. dtype: of the latents."""

    folder: Path
    tokens: int
    dtype: str
    count: int

    def __post_init__(self) -> None:
        self.folder.mkdir()
        clips = clips_of(self.folder, self.count)
        self.items = Items(clips, texts=tuple(clip.caption for clip in clips))
        self.single = self.store("single", shards=False)
        self.sharded = self.store("shards", shards=True)
        generator = torch.Generator().manual_seed(0)
        for what in (*clips, *captions_of(self.items)):
            text = isinstance(what, str)
            shape = (self.tokens, WIDTH) if text else LATENTS
            tensor = torch.randn(shape, generator=generator)
            tensor = tensor if self.dtype == "fp32" and not text else tensor.bfloat16()
            for store in (self.single, self.sharded):
                write_entry(store.path_of(what), {"text" if text else "latents": tensor}, str(what)[:40])
        self.sharded.pack(lambda event: None)
        self.files = [(self.single.path_of(clip), self.single.path_of(clip.caption)) for clip in clips]
        for clip, text in self.files:  # what a program with torch.save would have
            torch.save({**load_file(clip), **load_file(text)}, clip.with_suffix(".pt"))

    def store(self, name: str, shards: bool) -> LatentStore:
        keeping = Keeping("bf16" if self.dtype == "bf16" else "fp32", shards)
        return LatentStore(self.folder / name, self.items, IDENTITY, keeping=keeping)  # type: ignore[arg-type]


def experience(case: Case, store: LatentStore) -> VideoExperience:
    return VideoExperience("clips", 1, case.items.usable, store, Draws(batch_size=1, seed=0, caption_dropout=0.0))


def loader_thread(case: Case, store: LatentStore) -> Iterator[Batch]:
    """What the loader's thread does, without the thread, so that its own time can be read."""
    train = experience(case, store)
    return train._drawn(train._sampler(), iter(range(1 << 40)))


def on_a_cpu(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same as the engine of a CPU hands it over: in fp32."""
    return map(SingleEngine.open("cpu", "fp32").put, batches)


class Files(Dataset):
    """The same single entries for a DataLoader. count: of an epoch."""

    def __init__(self, case: Case, count: int) -> None:
        self.case, self.count = case, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:
        latents, text = (load_file(path) for path in self.case.files[number % len(self.case.files)])
        return item_of({**latents, **text})


def item_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What the loader gives of one clip: its tensors as they are kept, and the text's mask."""
    return {**tensors, "text_mask": torch.ones(1, dtype=torch.bool)}


def by_safetensors(case: Case) -> Iterator[object]:
    while True:
        for paths in case.files:
            latents, text = (load_file(path) for path in paths)
            # Stacked as a batch is, which reads what is still only mapped.
            yield {name: torch.stack([tensor]) for name, tensor in item_of({**latents, **text}).items()}


def bytes_alone(case: Case) -> Iterator[object]:
    """What the machine can do at this moment: an entry's bytes out of the page cache, into memory that is there."""
    # torch's memory begins at a cache line, as a slot does; where it does not, a read takes a tenth longer.
    room = [torch.empty(path.stat().st_size, dtype=torch.uint8).numpy() for path in case.files[0]]
    while True:
        for paths in case.files:
            for path, own in zip(paths, room, strict=True):
                with path.open("rb", buffering=0) as file:
                    file.readinto(own.data)
            yield room


def by_torch_load(case: Case) -> Iterator[object]:
    while True:
        for path, _ in case.files:
            found = torch.load(path.with_suffix(".pt"), weights_only=True)
            yield {name: torch.stack([tensor]) for name, tensor in item_of(found).items()}


def own_time(batches: Iterator[object]) -> Callable[[int], float]:
    """Seconds of this thread for so many batches."""
    next(batches)

    def run(count: int) -> float:
        began = thread_time()
        for _ in range(count):
            next(batches)
        return thread_time() - began

    return run


def in_this_process(case: Case) -> Iterator[object]:
    """A DataLoader without workers, one epoch after the other."""
    loader = DataLoader(Files(case, EPOCH), batch_size=1, shuffle=True)
    while True:
        yield from loader


def by_workers(case: Case, workers: int) -> list[float]:
    """Seconds a clip in each epoch of a DataLoader, of this process and its workers together."""
    loader = DataLoader(Files(case, EPOCH), batch_size=1, shuffle=True, num_workers=workers, persistent_workers=True)
    seconds = []
    for _ in range(EPOCHS_OF_WORKERS):
        known = {child.pid: _seconds_of(child.pid) for child in active_children()}
        began = process_time()
        read = sum(1 for _ in loader)
        own = process_time() - began
        theirs = sum(_seconds_of(child.pid) - known.get(child.pid, 0.0) for child in active_children())
        seconds.append((own + theirs) / read)
    return seconds[1:]


def _seconds_of(process: int | None) -> float:
    """Processor time of all threads of another process, as Linux counts it."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def ways(case: Case) -> dict[str, Callable[[int], float]]:
    """Each way in this thread: seconds for so many clips."""
    made: dict[str, Iterator[object]] = {
        "weft, shards": loader_thread(case, case.sharded),
        "weft, single files": loader_thread(case, case.single),
        "weft, shards, in fp32 on a CPU": on_a_cpu(loader_thread(case, case.sharded)),
        BYTES: bytes_alone(case),
        "safetensors loop": by_safetensors(case),
        "torch.load": by_torch_load(case),
        "DataLoader, 0 workers": in_this_process(case),
    }
    return {name: own_time(batches) for name, batches in made.items()}


def measured(case: Case, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Clips per second of each way, in the best round and in the median one."""
    runs = ways(case)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(runs[name](count) / count)
    of_the_bytes = {
        name: median(least / own for least, own in zip(seconds[BYTES], values, strict=True))
        for name, values in seconds.items()
    }
    for workers in (1, 2):
        seconds[f"DataLoader, {workers} workers"] = by_workers(case, workers)
    return {
        name: {"best": round(1 / min(values), 1), "median": round(1 / median(values), 1)}
        | ({"of_the_bytes": round(of_the_bytes[name], 3)} if name in of_the_bytes else {})
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clips", type=int, default=4, help="per round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        "fp32 latents, 128 tokens of text": (128, "fp32"),
        "fp32 latents, 512 tokens of text": (512, "fp32"),
        "bf16 latents, 128 tokens of text": (128, "bf16"),
        "bf16 latents, 512 tokens of text": (512, "bf16"),
    }
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "safetensors", "numpy")},
        "case": "latents 16x21x60x104, text N x 4096 in bf16, batches of one clip as it is kept, page cache warm",
        "rounds": arguments.rounds,
        "clips_per_round": arguments.clips,
        "clips_per_second": {},
    }
    for title, (tokens, dtype) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder) / "cache", tokens, dtype, CLIPS)
            found = measured(case, arguments.rounds, arguments.clips)
        result["clips_per_second"][title] = found
        print(title)
        for name, value in found.items():
            times = value["best"] / found["DataLoader, 0 workers"]["best"]
            print(f"  {name:<24} {value['best']:8.0f} clips/s   {times:6.2f} x a DataLoader   ({value['median']:.0f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
