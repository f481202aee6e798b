"""Text data from Hugging Face `datasets`: of the hub or of a local folder, whole or as a stream."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from weft.data.tapes import Row, Tape
from weft.errors import DataError, did_you_mean

SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk and DatasetDict.save_to_disk leave


class Table:
    """A dataset whose rows are numbered."""

    def __init__(self, dataset: "datasets.Dataset", name: str) -> None:
        self._dataset, self._name = dataset, name
        self._done = 0

    def count(self) -> int:
        return len(self._dataset)

    def rows(self, at: Mapping[str, Any]) -> Iterator[Row]:
        self._done = at.get("row", 0)
        for value in self._dataset.skip(self._done) if self._done else self._dataset:
            self._done += 1
            yield Row(f"{self._name}:{self._done}", f"{self._name}, row {self._done}", value)

    def here(self) -> dict[str, Any]:
        return {"row": self._done}


class Shard:
    """One shard of a dataset that is streamed. Its places are the library's own, and the number of the row."""

    def __init__(self, dataset: "datasets.IterableDataset", name: str) -> None:
        self._dataset, self._name = dataset, name
        self._done = 0

    def count(self) -> None:
        return None

    def rows(self, at: Mapping[str, Any]) -> Iterator[Row]:
        self._done = at.get("row", 0)
        if at.get("state"):
            self._dataset.load_state_dict(at["state"])
        stream = iter(self._dataset)
        while True:
            try:
                value = next(stream)
            except StopIteration:
                return
            except (OSError, ValueError, DatasetsError) as error:
                raise DataError(f"{self._name}: the stream broke after row {self._done}: {error}") from error
            self._done += 1
            yield Row(f"{self._name}:{self._done}", f"{self._name}, row {self._done}", value)

    def here(self) -> dict[str, Any]:
        return {"row": self._done, "state": json.loads(json.dumps(self._dataset.state_dict())) if self._done else {}}


def dataset_tapes(source: str, name: str | None, split: str, streaming: bool) -> tuple[list[Tape], str]:
    """A dataset's tapes, and a fingerprint of what they hold. Raises DataError when it cannot be opened."""
    found = opened(source, name, split, streaming)
    label = source if split == "train" else f"{source}[{split}]"
    if isinstance(found, datasets.Dataset):
        # The library's own hash of how the table came to be: of files, their version and every transform.
        return [Table(found, label)], found._fingerprint
    shards = [found.shard(found.num_shards, number) for number in range(found.num_shards)]
    labels = [label if len(shards) == 1 else f"{label}/{number}" for number in range(len(shards))]
    version = found.info.version
    return [Shard(shard, f"{label}") for shard, label in zip(shards, labels, strict=True)], f"{label} {version}"


def opened(source: str, name: str | None, split: str, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
    """One split of a dataset."""
    folder = Path(source)
    try:
        if any((folder / file).is_file() for file in SAVED):
            found = datasets.load_from_disk(source)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    choices = sorted(map(str, found))
                    raise DataError(f"{source} has no split '{split}'. {did_you_mean(split, choices)}")
                found = found[split]
            return found
        found = datasets.load_dataset(source, name, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"The dataset '{source}' (name {name}, split {split}) cannot be opened: {reason}") from error
    assert isinstance(found, datasets.Dataset | datasets.IterableDataset)
    return found
