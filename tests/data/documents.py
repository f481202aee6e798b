"""Files of dated documents in invented words, and what data asks of a family of encoders."""

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests.small_encoders import invented, word_tokenizer
from weft.contracts import Batch
from weft.data.documents import DocumentsData
from weft.data.documents_loader import DocumentsDataset
from weft.data.documents_survey import DocumentsSurvey
from weft.events import Event

WORDS = invented(200)
YEARS = ("2019", "2020", "2021", "2022")
COLUMNS = ("note", "outcome", "year", "patient")


@cache
def tokenizer(model_type: str = "bert") -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS, model_type)


@dataclass
class Reader:
    """What data asks of a family of encoders."""

    labels: tuple[str, ...] = ()
    trained_labels: tuple[str, ...] = ()
    context: int = 64
    model_type: str = "bert"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer(self.model_type)


def rows_of(count: int, seed: int = 0, per_patient: int = 4, years: Sequence[str] = YEARS) -> list[dict[str, str]]:
    """Documents of random words, their years at random."""
    chance = random.Random(seed)
    return [
        {
            "note": " ".join(chance.choices(WORDS, k=chance.randint(4, 20))),
            "outcome": chance.choice(("no", "no", "yes")),
            "year": chance.choice(years),
            "patient": f"p{chance.randrange(max(1, count // per_patient))}",
        }
        for _ in range(count)
    ]


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def section(path: Path, **fields: Any) -> DocumentsData:
    plain = {"path": path, "text": "note", "label": "outcome", "year": "year", "group": "patient", "batch_size": 4,
             "labels": ("no", "yes")}  # fmt: skip
    return DocumentsData.model_validate({**plain, **fields})


def surveyed(data: DocumentsData, family: Any = None, heard: list[Event] | None = None) -> DocumentsSurvey:
    return data.survey(family or Reader(), (heard if heard is not None else []).append)


def opened(data: DocumentsData, survey: DocumentsSurvey | None = None, seed: int = 11, **more: Any) -> DocumentsDataset:
    survey = survey or surveyed(data)
    ends = {name: 100 * (1 + i) for i, name in enumerate(survey.stretches)}
    return data.open(survey, lambda event: None, seed=seed, last_steps=more.pop("last_steps", ends), **more)


def drawn(experience: Any, start: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(experience.batches(start, rank, world), count))


def equal(one: Batch, other: Batch) -> bool:
    return (
        one.keys == other.keys
        and set(one.tensors) == set(other.tensors)
        and all(torch.equal(one[name], other[name]) for name in one.tensors)
    )


def words_of(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """The texts of rows of a batch."""
    return [tokenizer().decode(row[own], skip_special_tokens=True) for row, own in zip(ids, mask, strict=True)]
