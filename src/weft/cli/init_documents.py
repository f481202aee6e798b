"""weft init for encoders: a folder of configs for dated documents, the columns guessed from the header alone."""

import csv
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.config.ready import ENDING, HERE, PARTS, SHIPPED, experiments
from weft.config.show import inline
from weft.errors import ConfigError, DataError
from weft.families.encoder_kinds import is_encoder

# Names that fetch themselves; every other encoder is named by its folder.
ENCODERS = {
    "bert-base": "google-bert/bert-base-uncased",
    "clinical-bert": "emilyalsentzer/Bio_ClinicalBERT",
    "distilbert-base": "distilbert/distilbert-base-uncased",
    "modernbert-base": "answerdotai/ModernBERT-base",
    "roberta-base": "FacebookAI/roberta-base",
}
USUAL = "bert-base"  # what `weft init encoder` takes
ANY = "encoder"
# What a column is called that is one, best first.
TEXTS = ("text", "note", "note_text", "document", "body", "content", "report", "narrative", "message", "abstract")
LABELS = ("label", "labels", "target", "class", "category", "outcome", "diagnosis", "code", "codes", "y")
YEARS = ("year", "note_year", "admission_year")
DATES = ("date", "timestamp", "datetime", "note_date", "charttime", "chartdate", "admission_date", "admittime",
         "discharge_date", "dischtime", "created_at", "time")  # fmt: skip
GROUPS = ("patient", "patient_id", "subject_id", "subject", "person_id", "mrn", "group", "group_id", "author")
IDS = ("id", "note_id", "document_id", "doc_id", "row_id", "hadm_id")
SPLITS = ("split", "fold")
OF_YEARS = "2019_2024"  # in the names of the shipped experiments, and as 2019..2024 in them


@dataclass(frozen=True)
class Columns:
    """What the columns of the documents are called; None: there is no such column. first, last: years."""

    text: str
    label: str
    time: str  # the key of data: year or date
    year: str
    group: str | None
    id: str | None
    split: str | None
    first: int
    last: int


def wants_documents(model: str) -> bool:
    """Whether what `weft init` was asked for is an encoder: a known name, `encoder`, or a folder that holds one."""
    folder = Path(model).expanduser()
    return model.lower() in (ANY, *ENCODERS) or is_encoder(folder)


def write_configs(model: str, data: Path, out: Path | None, named: dict[str, str]) -> int:
    """Write model, paths and experiments, and say what comes next. named: columns by their key, as they were said."""
    folder = out or HERE
    if there := next((file for part in PARTS if (file := folder / f"{part}{ENDING}").exists()), None):
        raise ConfigError(f"{there} is already there. Choose another folder with --out, or delete it.")
    source, fetch = source_of(model)
    columns = look_at(data, named)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"model{ENDING}").write_text(model_text(source), encoding="utf-8")
    (folder / f"paths{ENDING}").write_text(paths_text(data, columns), encoding="utf-8")
    names = copy_experiments(folder, columns)
    print(f"wrote {folder}: {len(names)} experiments on {data}, {columns.first} to {columns.last}. Next:")
    first = next(name for name in names if name.startswith("replay_"))
    word = first if folder == HERE else shlex.quote(str(folder / f"{first}{ENDING}"))
    for command in (*fetch, f"weft plan {word}", f"weft train {word} --seed 0"):
        print(f"  {command}")
    print("All experiments:\n  " + "\n  ".join(names))
    return 0


def source_of(model: str) -> tuple[str, tuple[str, ...]]:
    """The folder of a model, and the command that brings it, if it must be brought."""
    if Path(model).expanduser().exists():
        return Path(model).expanduser().as_posix(), ()
    repository = ENCODERS[USUAL if model.lower() == ANY else model.lower()]
    local = Path("models") / repository.rpartition("/")[2]
    fetch = () if local.is_dir() else (f"hf download {repository} --local-dir {local.as_posix()}",)
    return local.as_posix(), fetch


# ---- The columns --------------------------------------------------------------------------------------------------


def look_at(data: Path, named: dict[str, str]) -> Columns:
    """The columns of a file of documents, by its header; of its rows only the years are looked at. Raises DataError,
    which names no column that was not asked for: in a file without a header they would be a document."""
    from weft.data.documents_reading import files_of

    file = files_of([data])[0]
    header = header_of(file)
    for key, name in named.items():
        if name not in header:
            raise DataError(f"--{key}: none of the {len(header)} columns of {file} is called '{name}'.")
    found = {
        key: named.get(key) or known_as(header, known)
        for key, known in (("text", TEXTS), ("label", LABELS), ("year", YEARS), ("date", DATES), ("group", GROUPS),
                           ("id", IDS), ("split", SPLITS))
    }  # fmt: skip
    time = "date" if "date" in named or found["year"] is None else "year"
    for key, known in (("text", TEXTS), ("label", LABELS), (time, (*YEARS, *DATES))):
        if found[key] is None:
            raise DataError(
                f"--data: none of the {len(header)} columns of {file} has a usual name of the {key}, such as "
                f"{', '.join(known[:3])}. Say it: --{key} COLUMN."
            )
    text, label, when = (str(found[key]) for key in ("text", "label", time))
    years = sorted({year for file in files_of([data]) for year in years_in(file, when, header)})
    if not years:
        raise DataError(f"--{time}: the column '{when}' of {file} begins with no year of four digits in any row.")
    return Columns(text, label, time, when, found["group"], found["id"], found["split"], years[0], years[-1])


def known_as(header: Sequence[str], known: Sequence[str]) -> str | None:
    """The column that has the first of these names that there is, whatever its capitals and spaces."""
    by_name = {re.sub(r"[\s-]+", "_", name.strip().casefold()): name for name in reversed(header)}
    return next((by_name[name] for name in known if name in by_name), None)


def header_of(file: Path) -> list[str]:
    """Names of the columns. Raises DataError."""
    from weft.data.documents_reading import any_size, json_records, opened

    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(file).names)
    if file.suffix.lower() == ".jsonl":
        first = next((row for row in json_records(file) if not row.problem), None)
        if first is None:
            raise DataError(f"--data: '{file}' has no row that is a JSON object.")
        return list(first.cells)
    with opened(file) as text, any_size():
        header = next(csv.reader(text, delimiter=delimiter_of(file)), None)
    if header is None:
        raise DataError(f"--data: '{file}' is empty. Expected a header and a row for each document.")
    return header


def years_in(file: Path, column: str, header: Sequence[str]) -> set[int]:
    """The years that a column of years or dates begins with."""
    return {int(match[0]) for cell in cells_of(file, column) if (match := re.match(r"(19|20)\d\d", str(cell).strip()))}


def cells_of(file: Path, column: str) -> Iterator[Any]:
    from weft.data.documents_reading import csv_records, json_records

    if file.suffix.lower() == ".parquet":
        from weft.data.documents_parquet import parquet_records

        rows = parquet_records(file, [column])
    elif file.suffix.lower() == ".jsonl":
        rows = json_records(file)
    else:
        rows = csv_records(file, [column], delimiter_of(file))
    return (row.cells.get(column, "") for row in rows if not row.problem)


def delimiter_of(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


# ---- The text -----------------------------------------------------------------------------------------------------


def model_text(source: str) -> str:
    return f"""\
# The encoder that sorts the documents; every experiment extends this file.
family:
  kind: encoder
  source: {inline(source)}
"""


def paths_text(data: Path, columns: Columns) -> str:
    """Where the documents are, and what was guessed of their columns."""
    lines = [
        "# Where the documents are, what their columns are called, and where runs go. Every experiment extends this.",
        "# The columns were guessed from the header: look them through. weft plan counts years, labels and splits.",
        "output: runs",
        "data:",
        "  kind: documents",
        f"  path: {inline(data.as_posix())}",
        f"  text: {inline(columns.text)}",
        f"  label: {inline(columns.label)}",
        f"  {columns.time}: {inline(columns.year)}",
    ]
    if columns.group is None:
        lines.append(
            "  group: null  # no column of a patient was found: a patient's documents may be in several splits"
        )
    else:
        lines.append(f"  group: {inline(columns.group)}  # all documents of one go to the same split")
    if columns.id is not None:
        lines.append(f"  id: {inline(columns.id)}")
    if columns.split is not None:
        lines.append(f"  split: {inline(columns.split)}")
    else:
        lines += ["  validation: 0.1", "  test: 0.2"]
    return "\n".join(lines) + "\n"


def copy_experiments(folder: Path, columns: Columns) -> list[str]:
    """The shipped experiments and their parts, for the years of these data."""
    years = f"{columns.first}_{columns.last}"
    names = []
    for file in (*experiments(SHIPPED), *sorted((SHIPPED / "parts").glob(f"*{ENDING}"))):
        name = str(file.relative_to(SHIPPED)).replace(OF_YEARS, years)
        text = file.read_text(encoding="utf-8").replace(OF_YEARS, years)
        text = text.replace(OF_YEARS.replace("_", ".."), years.replace("_", ".."))
        target = folder / name
        if target.exists():
            raise ConfigError(f"{target} is already there. Choose another folder with --out, or delete it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        if target.parent == folder:
            names.append(target.stem)
    return names
