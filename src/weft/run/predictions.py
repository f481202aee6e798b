"""What a run answered of each test document after each experience: predictions/NUMBER-AFTER.safetensors, and no text.

Everything else (the matrix, averages, calibration, intervals) is derived from these files. Without torch, so that the
dashboard reads them. A document is known by its key, a row's number; the files are for their owner alone (mode 0600).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from weft.durable import remove_drafts, whole_file
from weft.errors import RunError
from weft.math.scores import Array, Scores, Truth, best_threshold, scores_of

FOLDER = "predictions"
UNTRAINED = "(untrained)"  # the row before any training
JOINT = "joint"  # the experience that holds all tasks at once
HEAD = "weft.predictions"
FORMAT = 1
KINDS = ("tests", "validations")
Matrix = dict[str, dict[str, float | None]]  # metric -> task -> score


@dataclass(frozen=True)
class Answers:
    """Of one task's documents, in a fixed order. probabilities: (N, C). labels: (N,) or (N, C), as in math/scores.py.
    keys: (N,), references to rows. groups: (N,) int64, equal for documents of one patient; None where none are known.
    """

    probabilities: Array
    labels: Truth
    keys: NDArray[np.bytes_]
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Row:
    """What was answered after one experience. number: 0 for the untrained model, then 1, 2, ... as they were learned.
    validations: of the tasks that had been learned by then."""

    number: int
    after: str
    step: int
    tests: Mapping[str, Answers]
    validations: Mapping[str, Answers] = field(default_factory=dict)

    @cached_property
    def threshold(self) -> float | None:
        """Of F1 of two classes: the best on the validation documents of what was learned by then."""
        past = [one for one in self.validations.values() if len(one)]
        if not past or past[0].labels.ndim == 2 or past[0].probabilities.shape[1] != 2:
            return None
        probabilities = np.concatenate([one.probabilities[:, 1] for one in past])
        return best_threshold(probabilities, np.concatenate([one.labels for one in past]) == 1)

    @cached_property
    def scores(self) -> Matrix:
        """Each metric of each task, the main metric first. A task without documents has none."""
        each: dict[str, Scores] = {
            task: scores_of(one.probabilities, one.labels, self.threshold) for task, one in self.tests.items()
        }
        metrics = dict.fromkeys(metric for scores in each.values() for metric in scores)
        return {metric: {task: scores.get(metric) for task, scores in each.items()} for metric in metrics}


def file_of(run: Path, number: int, after: str) -> Path:
    """Where a row lies; letters that a file's name may not have are left out of it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", after).strip("-.")[:60] or "experience"
    return run / FOLDER / f"{number:03}-{plain}.safetensors"


def write_row(run: Path, row: Row) -> Path:
    """Write a row whole, for its owner alone. Rows of later experiences are of an earlier life of the run, which went
    on from here otherwise: they are removed, as is an older file of this row."""
    path = file_of(run, row.number, row.after)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(path.parent)
    head = {"format": FORMAT, "number": row.number, "after": row.after, "step": row.step,
            **{kind: list(getattr(row, kind)) for kind in KINDS}}  # fmt: skip
    content = save(dict(_tensors(row)), {HEAD: json.dumps(head)})
    private = partial(os.open, mode=0o600)
    with whole_file(path) as draft, open(draft, "wb", opener=private) as file:
        file.write(content)
    for other in _files(run):
        if other != path and _number(other) >= row.number:
            other.unlink()
    return path


def _tensors(row: Row) -> Iterator[tuple[str, NDArray[Any]]]:
    for kind in KINDS:
        for i, answers in enumerate(getattr(row, kind).values()):
            yield f"{kind}/{i}/probabilities", np.ascontiguousarray(answers.probabilities)
            yield f"{kind}/{i}/labels", np.ascontiguousarray(answers.labels)
            yield f"{kind}/{i}/keys", _letters(answers.keys)
            if answers.groups is not None:
                yield f"{kind}/{i}/groups", np.ascontiguousarray(answers.groups)


def keys_of(keys: Sequence[str]) -> NDArray[np.bytes_]:
    """Keys as an array of bytes."""
    return np.asarray([key.encode() for key in keys], dtype=np.bytes_) if keys else np.zeros(0, "S1")


def _letters(keys: NDArray[np.bytes_]) -> NDArray[np.uint8]:
    """(N, width) bytes: safetensors has no words."""
    return np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), keys.dtype.itemsize)


def read_row(path: Path) -> Row:
    """A row from its file. Raises RunError for a file that is none."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            head = json.loads((file.metadata() or {})[HEAD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if head["format"] != FORMAT:
            raise RunError(
                f"{path}: predictions of format {head['format']}, and this weft reads {FORMAT}. Update weft."
            )
        parts = {kind: {t: _answers(tensors, f"{kind}/{i}/") for i, t in enumerate(head[kind])} for kind in KINDS}
        return Row(head["number"], head["after"], head["step"], parts["tests"], parts["validations"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as odd:
        raise RunError(f"{path}: these are no predictions of a run ({type(odd).__name__}). Remove the file.") from None


def _answers(tensors: Mapping[str, Any], prefix: str) -> Answers:
    letters = tensors[f"{prefix}keys"]
    keys = np.ascontiguousarray(letters).view(f"S{letters.shape[1]}").reshape(-1) if letters.size else keys_of(())
    of = {name: tensors[f"{prefix}{name}"] for name in ("probabilities", "labels")}
    return Answers(of["probabilities"], of["labels"], keys, tensors.get(f"{prefix}groups"))


def read_rows(run: Path) -> list[Row]:
    """All rows of a run in the order of learning; none for a run that was not scored. Raises RunError."""
    return [read_row(path) for path in _files(run)]


def is_scored(run: Path) -> bool:
    """Whether a run has predictions."""
    return bool(_files(run))


def _files(run: Path) -> list[Path]:
    found = [path for path in (run / FOLDER).glob("*-*.safetensors") if path.name.split("-")[0].isdecimal()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])
