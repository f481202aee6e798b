"""The `data` section for encoders: dated documents with labels, their splits, their years, and what is replayed."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date as Day
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from weft.events import Event, Notice
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import EncoderFamily
    from weft.data.documents_loader import DocumentsDataset
    from weft.data.documents_reading import Record
    from weft.data.documents_survey import DocumentsSurvey
    from weft.events import Listener

RANGE = re.compile(r"(.+?)\s*\.\.\s*(.+)")


def unheard(event: Event) -> None:
    """A listener to nothing."""


class ReplayMemory(Section):
    """A memory of documents that were trained on, of which some are shown again beside each batch. It is kept as row
    numbers and recomputed from the seed, so that no checkpoint holds a text."""

    size: PositiveInt = Field(default=200, description="Documents in the memory.")
    batch: PositiveInt = Field(
        default=16, description="Documents that are drawn from it for each batch; each costs as much as one of a batch."
    )
    scope: Literal["all", "past"] = Field(
        default="all",
        description="all: a document enters with its first batch, so that what is replayed may be of the current task "
        "too; past: only documents of earlier tasks, and none in the first.",
    )
    balance: Literal["none", "label", "task", "label_task"] = Field(
        default="none",
        description="none: a uniform sample of all that was shown, in which a rare label is as rare as in the data; "
        "otherwise labels, tasks, or labels within tasks share the memory evenly.",
    )
    with_replacement: bool = Field(
        default=False,
        description="Draw documents that may be the same, as the code published with La-MAML does; for parity only.",
    )
    off_by_one: bool = Field(
        default=False,
        description="Keep the document of age a with probability size / (a + 1), not size / a, as the code published "
        "with La-MAML does; for parity only.",
    )

    @model_validator(mode="after")
    def _quirks_are_of_the_plain_memory(self) -> "ReplayMemory":
        if self.off_by_one and self.balance != "none":
            raise ValueError("off_by_one is of the uniform memory alone; leave it out, or write balance: none")
        return self


class DocumentsData(Section):
    """Dated documents with labels for an encoder."""

    medium: ClassVar[Literal["documents"]] = "documents"
    has_latents: ClassVar[bool] = True  # its batches hold what is learned from
    cache: ClassVar[Literal["memory"]] = "memory"  # tokens are never written: they are the documents
    share: ClassVar[None] = None
    kind: Literal["documents"] = "documents"
    path: Path | tuple[Path, ...] = Field(
        description="A .csv, .tsv, .jsonl or .parquet file with a row for each document, several such files, or a "
        "folder of them; relative to the working directory."
    )
    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1,
        description="What parts the columns of a .csv; null: a comma, and in .tsv a tab.",
    )  # fmt: skip
    text: str | tuple[str, ...] = Field(default="text", description="Column of the text, or several that are joined.")
    template: str | None = Field(
        default=None,
        description="How several columns are joined, such as '{history}\\n{findings}'; null: those that are not blank, "
        "with an empty line between.",
    )
    label: str | tuple[str, ...] = Field(
        default="label",
        description="Column of the label, a word or an integer; or several columns of 0 and 1, each a label of its "
        "own, blank where it is not known.",
    )
    separator: str | None = Field(
        default=None, min_length=1,
        description="What parts several labels in one column, such as ';'. A blank cell then has none of them.",
    )  # fmt: skip
    label_kind: Literal["auto", "classes", "multi-label"] = Field(
        default="auto",
        description="classes: a document has one label; multi-label: any number. auto: multi-label where there is a "
        "separator, several columns, or a list in a row.",
    )
    labels: tuple[str, ...] = Field(
        default=(),
        description="Names of the labels in the order of the model's outputs; any other in the data is an error. "
        "Empty: those found in all tasks, later ones too.",
    )
    absent: Literal["negative", "unknown"] = Field(
        default="negative",
        description="What a label is of documents of a task where none has it. unknown: not yet given then, so that "
        "nothing is learned of it; of multi-label data alone.",
    )
    year: str | None = Field(default=None, description="Column of the year, four digits: each year is a task.")
    date: str | None = Field(default=None, description="Column of a date, as it is written, whatever its time zone.")
    date_format: str | None = Field(
        default=None, description="How dates are written, as strptime reads them, such as '%d/%m/%Y'; null: ISO 8601."
    )
    period: Literal["year", "quarter", "month"] = Field(
        default="year", description="What of a date is a task: 2019, 2019-Q1, or 2019-01."
    )
    periods: Mapping[str, tuple[Day, Day]] = Field(
        default={},
        description="Tasks of your own in place of 'period', each from its first to its last day, such as {before: "
        "[2019-01-01, 2020-03-14]}. Documents of no period are left out, and counted.",
    )
    task: str | None = Field(
        default=None, description="In place of a year or a date: any column, such as a site; each value is a task."
    )
    tasks: str | tuple[str, ...] = Field(
        default=(),
        description="Which tasks, in which order: a list, or '2019..2024'. Empty: all, sorted. Documents of others are "
        "left out, and counted.",
    )
    train_on: str | tuple[str, ...] = Field(
        default=(), description="Those of the tasks that are trained on; the others are only tested. Empty: all."
    )
    group: str | None = Field(
        default=None,
        description="Column of the patient, or of whatever documents must stay together: of all tasks they go to one "
        "split. null: each document goes by itself, and a patient may be in several.",
    )
    id: str | None = Field(default=None, description="Column of the document's own name: only to count doubles.")
    split: str | None = Field(
        default=None, description="Column that says train, validation or test, in place of drawing the splits."
    )
    validation: float = Field(default=0.1, ge=0, lt=1, description="Share of the groups that is validated on.")
    test: float = Field(default=0.2, ge=0, lt=1, description="Share of the groups that is tested on.")
    split_seed: NonNegativeInt = Field(
        default=0,
        description="Draws other splits. A hash of it and the group decides alone, so that added rows move no other, "
        "and seeds of the run do not change what is tested.",
    )
    duplicates: Literal["apart", "keep"] = Field(
        default="apart",
        description="Of a text that stands in several splits. apart: only in the split where it stands first, "
        "elsewhere its rows are left out, and counted; keep: in all of them.",
    )
    unreadable: NonNegativeInt = Field(
        default=0,
        description="So many rows without text, label or date are tolerated, and left out, before training refuses to "
        "start.",
    )
    length: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Tokens of the longest document that is read whole. auto: what the model can take, at most 512. "
        "Memory grows with it, attention with its square.",
    )
    truncate: Literal["head", "tail", "head_tail"] = Field(
        default="head", description="What is kept of longer documents: the beginning, the end, or half of each."
    )
    batch_size: PositiveInt = Field(default=16, description="Documents in one micro-batch on each rank.")
    shuffle: bool = Field(default=True, description="A new order in each epoch; false keeps that of the files.")
    mode: Literal["sequential", "joint"] = Field(
        default="sequential",
        description="sequential: one task after the other, each an experience of its own; joint: all at once, which "
        "knows the future and is what a stream is compared with.",
    )
    glances: PositiveInt = Field(
        default=1, description="How often in a row each batch is shown, each time with another draw of the memory."
    )
    replay: ReplayMemory | None = Field(default=None, description="A memory of documents to replay; null: none.")

    @field_validator("tasks", "train_on", "labels", mode="before")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        """YAML reads 2019 and [0, 1] as integers."""
        if isinstance(value, (list, tuple)):
            return tuple(str(each) if isinstance(each, int) and not isinstance(each, bool) else each for each in value)
        return (str(value),) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("tasks", "train_on")
    @classmethod
    def _is_a_range_or_a_list(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return value if RANGE.fullmatch(value) else (value,)
        return distinct(value)

    @field_validator("labels")
    @classmethod
    def _are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return distinct(value)

    @field_validator("date_format")
    @classmethod
    def _has_a_whole_year(cls, value: str | None) -> str | None:
        if value is not None and ("%y" in value or not any(code in value for code in ("%Y", "%G", "%c", "%x"))):
            raise ValueError("a date needs its year in four digits, %Y: two leave its century open")
        return value

    @model_validator(mode="after")
    def _columns_go_together(self) -> "DocumentsData":
        named = [name for name in ("year", "date", "task") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: documents have their tasks from one column. Leave the others out")
        if self.date is None and (self.date_format or self.periods or self.period != "year"):
            raise ValueError("date_format, period and periods are of a date. Name its column under 'date'")
        if self.periods and self.period != "year":
            raise ValueError("period and periods: write one of the two")
        if wrong := [name for name, (first, last) in self.periods.items() if last < first]:
            raise ValueError(f"periods.{wrong[0]}: it ends before it begins")
        if self.template is not None:
            unnamed = set(self.columns_of_text) ^ set(re.findall(r"\{([^{}]*)\}", self.template))
            if unnamed:
                raise ValueError(f"template: it and 'text' differ in the column '{min(unnamed)}'. Name the same ones")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation and test: together {self.validation + self.test:g} of all, which leaves none")
        return self

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> "DocumentsData":
        several = not isinstance(self.label, str)
        if several and self.separator is not None:
            raise ValueError("separator: it parts the labels in one column, and 'label' names several. Leave it out")
        if several and self.labels:
            raise ValueError("labels: they are the names of the columns under 'label', in its order. Leave them out")
        if several and not self.label:
            raise ValueError("label: it names no column. Name one, or several")
        if self.label_kind == "classes" and (several or self.separator is not None):
            raise ValueError("label_kind: several columns, or a separator, are for multi-label data")
        if self.label_kind == "multi-label" and not several and self.separator is None and not self._may_hold_lists():
            raise ValueError("separator: without it a column of text holds one label. Write what parts them, as ';'")
        if self.absent == "unknown" and self.label_kind == "classes":
            raise ValueError("absent: it is of multi-label data. Leave it out")
        return self

    @model_validator(mode="after")
    def _replay_has_a_stream(self) -> "DocumentsData":
        if self.replay is not None and self.mode == "joint":
            raise ValueError("replay: in mode joint all tasks are shown at once, and none is past. Leave it out")
        return self

    def _may_hold_lists(self) -> bool:
        paths = self.path if isinstance(self.path, tuple) else (self.path,)
        return all(path.suffix.lower() not in (".csv", ".tsv") for path in paths)

    @property
    def columns_of_text(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def columns_of_labels(self) -> tuple[str, ...]:
        return (self.label,) if isinstance(self.label, str) else self.label

    def records(self, path: Path, columns: "Sequence[str]") -> "Iterator[Record]":
        """The rows of a file, with these columns of them. Raises DataError for a file that cannot be read at all."""
        from weft.data.documents_reading import csv_records, json_records

        ending = path.suffix.lower()
        if ending == ".parquet":
            from weft.data.documents_parquet import parquet_records

            return parquet_records(path, columns)
        if ending == ".jsonl":
            return json_records(path)
        return csv_records(path, columns, self.delimiter or ("\t" if ending == ".tsv" else ","))

    def survey(self, family: "EncoderFamily", tell: "Listener" = unheard, *, reserved: int = 0) -> "DocumentsSurvey":
        """Read, split, count and tokenise the documents. reserved: places of the model that an adapter's virtual tokens
        take. Raises ConfigError and DataError, which name rows and never what stands in them."""
        from weft.data.documents_surveying import survey

        return survey(self, family, tell, reserved)

    def open(
        self,
        survey: "DocumentsSurvey",
        tell: "Listener",
        *,
        seed: int,
        last_steps: Mapping[str, int],
        per_step: int | None = None,
    ) -> "DocumentsDataset":
        """What training draws from. last_steps: experience -> the step it ends with. per_step: micro-batches of all
        ranks in a step, by which a memory knows how much of an earlier experience was shown; None: all of it. Raises
        DataError beyond the error budget."""
        from weft.data.documents_loader import opened

        for notice in survey.notices:
            tell(Notice(text=notice))
        survey.refuse_when_unusable(self.unreadable)
        return opened(self, survey, seed=seed, last_steps=last_steps, per_step=per_step)


def distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"'{twice}' stands there twice")
    return names
