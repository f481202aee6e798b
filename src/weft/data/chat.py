"""The `data` section for language models: conversations and texts, how they become tokens, and how rows are filled."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from weft.errors import did_you_mean
from weft.events import Event, Notice
from weft.section import Section

if TYPE_CHECKING:
    from weft.contracts import TextFamily
    from weft.data.chat_loader import ChatDataset
    from weft.data.chat_store import ChatStore
    from weft.data.chat_survey import ChatSurvey
    from weft.data.tapes import Tape
    from weft.events import Listener

ENDINGS = (".jsonl", ".json", ".parquet")
STREAMED_ENDINGS = (".jsonl", ".parquet")
MOST_PROCESSES = 8
# As conversations.COLUMNS, which a section may not import: it is read without what reads files.
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "history", "text", "tools")


def unheard(event: Event) -> None:
    """A listener to nothing."""


class TextSource(Section):
    """One place that conversations come from: files, or a dataset of Hugging Face's library."""

    path: Path | None = Field(
        default=None,
        description="A .jsonl, .json or .parquet file, or a folder of such files; relative to the working directory.",
    )
    dataset: str | None = Field(
        default=None,
        description="In place of path: a dataset's name on the Hugging Face hub, or a local folder of one. Needs the "
        "extra 'text'.",
    )
    name: str | None = Field(default=None, description="The dataset's configuration, where it has several.")
    split: str = Field(
        default="train", description="The dataset's split; train[:1000] is a slice of one that does not stream."
    )
    streaming: bool = Field(
        default=False,
        description="Read while training instead of tokenising all of it first: for data that is larger than the disk. "
        "All sources or none.",
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "text"] = Field(
        default="auto",
        description="messages: a list of {role, content}; sharegpt: 'conversations' of {from, value}; alpaca: "
        "'instruction', 'input', 'output'; text: 'text', learned whole. auto: by the columns of each row.",
    )
    columns: Mapping[str, str] = Field(
        default={},
        description="Columns that have other names than expected, as OURS: THEIRS, such as {messages: chat}. Ours are "
        f"{', '.join(COLUMNS)}.",
    )
    take: PositiveInt | None = Field(default=None, description="Only so many first rows; null takes all.")
    repeats: PositiveInt = Field(
        default=1, description="How often each conversation is shown per epoch; of a stream, its weight in the mixture."
    )

    @field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: Mapping[str, str]) -> Mapping[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"there is no column '{name}' to rename. {did_you_mean(name, COLUMNS)}")
        return columns

    @model_validator(mode="after")
    def _is_one_place(self) -> "TextSource":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a source has either a path (of files) or a dataset (of Hugging Face's library); give one")
        if self.path is not None and (self.name or self.split != "train"):
            raise ValueError("name and split are of a dataset; leave them out where there is a path")
        if self.streaming and self.path is not None and self.path.suffix.lower() == ".json":
            raise ValueError(f"{self.path}: a .json list cannot be streamed. Write it as .jsonl, one object per line")
        return self

    @property
    def label(self) -> str:
        """What events call the source."""
        return str(self.dataset or self.path)

    def files(self) -> "list[Path]":
        """Its files; a dataset has none of its own."""
        from weft.data.chat_surveying import files_of

        return [] if self.path is None else files_of(self.path, STREAMED_ENDINGS if self.streaming else ENDINGS)

    def tapes(self) -> "tuple[list[Tape], str]":
        """What its rows are read from, each time anew, and what a dataset says of its version. Raises DataError."""
        from weft.data.tapes import JsonLines, JsonList

        if self.dataset is not None:
            from weft.data.hub import dataset_tapes

            return dataset_tapes(self.dataset, self.name, self.split, self.streaming)
        assert self.path is not None
        root = self.path if self.path.is_dir() else self.path.parent
        kinds: dict[str, Any] = {".jsonl": JsonLines, ".json": JsonList}
        files = self.files()
        if any(file.suffix.lower() == ".parquet" for file in files):
            from weft.data.parquet import Parquet

            kinds[".parquet"] = Parquet
        names = [f"{root.resolve().name}/{file.relative_to(root).as_posix()}" for file in files]
        return [kinds[file.suffix.lower()](file, name) for file, name in zip(files, names, strict=True)], ""


class ChatData(Section):
    """Conversations and texts for a language model."""

    medium: ClassVar[Literal["text"]] = "text"
    has_latents: ClassVar[bool] = True  # its batches hold what is learned from, not captions alone
    kind: Literal["chat"] = "chat"
    sources: tuple[TextSource, ...] = Field(
        min_length=1, description="Where the training conversations come from; at least one."
    )
    validation_sources: tuple[TextSource, ...] = Field(
        default=(), description="Conversations that are only measured on; their repeats count for nothing."
    )
    validation_items: NonNegativeInt = Field(
        default=0,
        description="So many conversations are held out of the sources; a hash of what they say chooses them, so that "
        "added ones change the choice as little as possible, and one that stands twice goes whole.",
    )
    share: tuple[NonNegativeInt, PositiveInt] | None = Field(
        default=None,
        description="[i, n]: train on the i-th of n equal shares of the conversations, counted from 0, as independent "
        "processes do; validation is the same for all. null trains on all.",
    )
    length: PositiveInt = Field(
        default=2048, ge=2, description="Tokens of a packed row, and of the longest text that is taken whole."
    )
    pack: bool = Field(
        default=True,
        description="Fill each row with several texts, which do not see each other. false: one text in each row, "
        "beside others of about its length.",
    )
    batch_size: PositiveInt = Field(default=1, description="Rows in one micro-batch on each rank.")
    learn: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="Tokens that are learned: what the assistant says with the token that ends its turn, in every turn "
        "or in the last alone, or everything. Of plain texts always everything.",
    )
    truncate: Literal["drop", "cut_end", "error"] = Field(
        default="drop", description="What becomes of a text longer than 'length': leave it out, cut its end, refuse it."
    )
    system: str = Field(default="", description="System prompt of conversations that have none of their own.")
    template: Path | None = Field(
        default=None, description="A jinja file in place of the tokenizer's own chat template."
    )
    shuffle: bool = Field(
        default=True, description="A new order in each epoch; false keeps that of the files as far as packing lets it."
    )
    shuffle_buffer: PositiveInt = Field(
        default=2000, description="Rows of a stream that are read, shuffled and packed together."
    )
    unreadable: NonNegativeInt = Field(
        default=0, description="So many rows that give no conversation are tolerated before training refuses to start."
    )
    cache: Literal["disk", "memory"] = Field(
        default="disk",
        description="Where tokens are kept: on disk, made once and mapped by all processes, or in each one's memory.",
    )
    cache_folder: Path = Field(
        default=Path("weft-cache"), description="Folder of the disk cache; runs may share it, also at the same time."
    )
    workers: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Processes that tokenise sources of many thousand rows; auto: the number of cores, at most 8.",
    )

    @field_validator("share")
    @classmethod
    def _is_a_share(cls, share: tuple[int, int] | None) -> tuple[int, int] | None:
        if share is not None and share[0] >= share[1]:
            raise ValueError(f"[i, n] counts from 0, so that i is below n; got {list(share)}")
        return share

    @model_validator(mode="after")
    def _streams_are_read_as_streams(self) -> "ChatData":
        if self.streams and not all(source.streaming for source in self.sources):
            raise ValueError("streaming: some sources stream and others do not; give it to all of them or to none")
        if self.streams and (self.validation_items or self.share):
            key = "validation_items" if self.validation_items else "share"
            raise ValueError(
                f"{key}: conversations of a stream cannot be chosen before they are read. For validation name "
                "validation_sources, with 'take' if they stream; for independent processes give each its own sources"
            )
        for number, source in enumerate(self.validation_sources):
            if source.streaming and source.take is None:
                raise ValueError(f"validation_sources.{number}: a stream that is measured on needs 'take', its length")
        return self

    @property
    def streams(self) -> bool:
        """Whether training data is read while training."""
        return any(source.streaming for source in self.sources)

    def processes(self) -> int:
        """Processes that tokenise."""
        return min(MOST_PROCESSES, os.cpu_count() or 1) if self.workers == "auto" else self.workers

    def survey(self, family: "TextFamily", tell: "Listener" = unheard) -> "ChatSurvey":
        """Tokenise what the cache lacks, look into streams, and count. Raises ConfigError and DataError."""
        from weft.data.chat_surveying import survey

        return survey(self, family, tell)

    def store(self, survey: "ChatSurvey", identity: Mapping[str, str]) -> "ChatStore":
        """What the cache holds of a survey, which has filled it. identity: fingerprints of a family's weights, on which
        tokens do not depend."""
        from weft.data.chat_store import ChatStore

        return ChatStore(survey)

    def open(
        self,
        survey: "ChatSurvey",
        tell: "Listener",
        *,
        seed: int,
        last_step: int,
        name: str = "conversations",
    ) -> "ChatDataset":
        """What training draws from. Raises DataError beyond the error budget."""
        from weft.data.chat_loader import opened

        for notice in survey.notices:
            tell(Notice(text=notice))
        survey.refuse_when_unusable(self.unreadable)
        return opened(self, survey, tell, seed=seed, last_step=last_step, name=name)
