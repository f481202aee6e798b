"""The synthetic documents as files: CSV or JSONL, a notice beside them, and the truth apart from what learners read."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from weft.demo.drift import BANNER, Drift, Note, notes, notes_before, truth
from weft.durable import write_whole

COLUMNS = ("id", "patient", "date", "year", "label", "text")
BEFORE = 1200  # documents of the first year's kind that the base model is trained on


@dataclass(frozen=True)
class DriftFiles:
    """documents: of all years. before: of the first year's kind, for the base model. truth: what the generator knows.
    checksum: SHA-256 of the documents, equal wherever the same dials and seed are."""

    documents: Path
    before: Path
    truth: Path
    checksum: str


def write_drift(folder: Path, drift: Drift, ending: str = "csv", before: int = BEFORE) -> DriftFiles:
    """Write all files of a drift. ending: csv or jsonl."""
    as_text = {"csv": as_csv, "jsonl": as_jsonl}[ending]
    files = folder / f"documents.{ending}", folder / f"before.{ending}", folder / "truth" / "truth.json"
    content = as_text(notes(drift))
    checksum = hashlib.sha256(content.encode()).hexdigest()
    write_whole(files[0], content)
    write_whole(files[1], as_text(notes_before(drift, before)))
    write_whole(files[2], json.dumps({**truth(drift), "sha256": checksum}, indent=1) + "\n")
    write_whole(folder / "SYNTHETIC.txt", f"{BANNER}\nAll words in this folder are invented.\n")
    return DriftFiles(*files, checksum)


def as_csv(rows: Iterable[Note]) -> str:
    """Documents under a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(row, name) for name in COLUMNS] for row in rows)
    return text.getvalue()


def as_jsonl(rows: Iterable[Note]) -> str:
    """A document a line."""
    return "".join(json.dumps({name: asdict(row)[name] for name in COLUMNS}) + "\n" for row in rows)
