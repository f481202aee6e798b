"""Packed rows of text per second, from the tokenised cache to a batch, against torch's DataLoader on the same rows.

    python benchmarks/text_path.py --json benchmarks/results/text-path-cpu.json

Texts of 16 to 2,048 tokens lie tokenised in the page cache and are packed into rows of 4,096, four a batch. Every way
gives the same tensors by the same collate function. Times are processor time of the thread that reads, the ways in
turns; the figure is the best round, since whoever else works on the machine slows all of them, and the median stands
beside it. Of a DataLoader with workers it is the processor time of all its processes, which stay for all epochs. Weft
packs an epoch's rows when it begins; that is timed apart, and shared among the epoch's rows in `rows_with_packing`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from time import process_time, thread_time
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from weft.contracts import Batch
from weft.data.chat_loader import ChatExperience, collated
from weft.data.chat_survey import Texts, texts_of
from weft.data.packing import RowSampler
from weft.data.tokens import Text, read_corpus, write_corpus
from weft.run.bench_machine import processor

LONGEST, SHORTEST, CAPACITY, ROWS, PADDING, WORDS = 2048, 16, 4096, 4, 0, 151_936
EPOCHS_OF_WORKERS = 4  # the first, which starts them, is not counted


def texts_in(folder: Path, number: int) -> Texts:
    """Texts whose lengths are even on a logarithmic scale; the second half of each is learned."""
    chance = numpy.random.default_rng(0)
    lengths = (SHORTEST * (LONGEST / SHORTEST) ** chance.random(number)).astype(int)

    def made() -> Iterator[list[Text]]:
        for place, length in enumerate(lengths):
            ids = chance.integers(WORDS, size=length, dtype=numpy.int32)
            yield [Text(f"text {place}", f"{place:024x}", ids, numpy.arange(length) >= length // 2)]

    write_corpus(folder / "corpus", made())
    corpus = read_corpus(folder / "corpus")
    assert corpus is not None
    return texts_of([corpus], [1], LONGEST)


def experience(texts: Texts) -> ChatExperience:
    sampler = RowSampler(texts.lengths[texts.shown].tolist(), CAPACITY, ROWS, seed=0)
    return ChatExperience("rows", 1, texts, sampler, PADDING)


class RowsOfTexts(Dataset[Sequence[Text]]):
    """The same rows for a DataLoader."""

    def __init__(self, texts: Texts, rows: Sequence[Sequence[int]]) -> None:
        self.texts, self.rows = texts, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Sequence[Text]:
        return [self.texts.text(place) for place in self.rows[number]]


def loader_of(rows: RowsOfTexts, workers: int) -> DataLoader[Any]:
    collate = partial(collated, capacity=CAPACITY, padding=PADDING)
    return DataLoader(
        rows, ROWS, shuffle=True, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )  # fmt: skip


def endless(loader: DataLoader[Any]) -> Iterator[Batch]:
    while True:
        yield from loader


def own_time(batches: Iterator[Batch]) -> Callable[[int], float]:
    """Seconds of this thread for so many batches."""
    next(batches)

    def run(number: int) -> float:
        began = thread_time()
        for _ in range(number):
            next(batches)
        return thread_time() - began

    return run


def by_workers(loader: DataLoader[Any]) -> list[float]:
    """Seconds a batch in each epoch of a DataLoader, of this process and its workers together."""
    seconds = []
    for _ in range(EPOCHS_OF_WORKERS):
        known = {child.pid: seconds_of(child.pid) for child in active_children()}
        began = process_time()
        read = sum(1 for _ in loader)
        own = process_time() - began
        theirs = sum(seconds_of(child.pid) - known.get(child.pid, 0.0) for child in active_children())
        seconds.append((own + theirs) / read)
    return seconds[1:]


def seconds_of(process: int | None) -> float:
    """Processor time of all threads of another process, as Linux counts it."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def measured(texts: Texts, rounds: int, number: int) -> dict[str, Any]:
    train = experience(texts)
    began = thread_time()
    batches = train.sampler.epoch(0)
    packing = thread_time() - began
    rows = [row for batch in batches for row in batch]
    filled = sum(int(texts.lengths[place]) for row in rows for place in row) / (len(rows) * CAPACITY)
    # What the loader's thread does, without the thread, so that its own time can be read.
    weft = own_time(map(train._batch, count()))
    runs = {"weft": weft, "DataLoader, 0 workers": own_time(endless(loader_of(RowsOfTexts(texts, rows), 0)))}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(runs[name](number) / number)
    for workers in (1, 2):
        seconds[f"DataLoader, {workers} workers"] = by_workers(loader_of(RowsOfTexts(texts, rows), workers))
    ways = {
        name: {"best": round(ROWS / min(values), 1), "median": round(ROWS / median(values), 1)}
        for name, values in seconds.items()
    }
    shared = min(seconds["weft"]) / ROWS + packing / len(rows)
    return {
        "rows_of": CAPACITY, "rows": len(rows), "filled": round(filled, 4), "packing_seconds": round(packing, 3),
        "rows_with_packing": round(1 / shared, 1), "tokens_per_second": round(CAPACITY / shared),
        "rows_per_second": ways,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, default=20, help="per round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(texts_in(Path(folder), arguments.texts), arguments.rounds, arguments.batches)
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "numpy")},
        "case": f"{arguments.texts} texts of {SHORTEST} to {LONGEST} tokens in rows of {CAPACITY}, {ROWS} rows a batch",
        **found,
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
