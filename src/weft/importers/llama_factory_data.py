"""LLaMA-Factory's datasets (data/dataset_info.json) as sources of ours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import ConfigError, did_you_mean
from weft.importers.draft import Draft, ReadFile
from weft.importers.nested import beside, settle
from weft.importers.reading import read
from weft.importers.values import Same, Theirs, carry
from weft.importers.writing import FILL_IN

PROGRAM = "LLaMA-Factory"
INFO = "dataset_info.json"
ENDINGS = (".json", ".jsonl", ".parquet")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
ASIDE = {"system": "system", "tools": "tools"}
MEDIA = ("images", "videos", "audios")
PLAIN_TAGS = {"role_tag": "role", "content_tag": "content"}
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value"}


def put_data(theirs: Theirs, draft: Draft, main: ReadFile, others: Sequence[ReadFile]) -> None:
    """`data` and `objective`. Raises ConfigError."""
    plain = theirs.text("stage") == "pt"
    draft.set("data.kind", "chat", "stage", theirs=theirs.text("stage") or "sft")
    draft.assume("objective.kind", "next-token", "The loss of language models.")
    folder = theirs.text("dataset_dir") or "data"
    info = _info(folder, main, others)
    take = theirs.whole("max_samples")
    streamed = theirs.flag("streaming")
    for key, under in (("dataset", "data.sources"), ("eval_dataset", "data.validation_sources")):
        names = [name.strip() for text in theirs.texts(key) for name in text.split(",") if name.strip()]
        if key == "dataset" and not names:
            draft.ask(f"{under}.0.path", f"{FILL_IN}.jsonl", "The config names no dataset.")
        for number, name in enumerate(names):
            source = _Source(draft, f"{under}.{number}", name, plain)
            source.put(info, folder, theirs.place(key))
            if take and not draft.has(f"{source.at}.take"):
                draft.set(f"{source.at}.take", take, "max_samples")
            if streamed and not str(draft.get(f"{source.at}.path", "")).endswith(".json"):
                draft.set(f"{source.at}.streaming", True, "streaming")
    _rows(theirs, draft, plain)
    _held_out(theirs, draft)
    carry(theirs, draft, [
        Same("default_system", "data.system", "text"),
        Same("preprocessing_num_workers", "data.workers", "whole"),
        Same("buffer_size", "data.shuffle_buffer", "whole"),
    ])  # fmt: skip
    if theirs.flag("disable_shuffling"):
        draft.set("data.shuffle", False, "disable_shuffling", theirs=True)


def _info(folder: str, main: ReadFile, others: Sequence[ReadFile]) -> ReadFile | None:
    """The table of datasets: among the files given, or in its folder; None: it is not there, or all are on the hub."""
    for file in others:
        if file.path.name == INFO:
            return file
    found = None if folder in ("ONLINE",) or folder.startswith("REMOTE:") else beside(main.path, f"{folder}/{INFO}")
    return read(found) if found else None


def _rows(theirs: Theirs, draft: Draft, plain: bool) -> None:
    """Length, packing, batch, and which tokens are learned."""
    settle(theirs, draft, "cutoff_len", "data.length", theirs.whole("cutoff_len", 2048))
    neat, packed = theirs.flag("neat_packing"), theirs.take("packing")
    if neat:
        draft.set("data.pack", True, "neat_packing", note="Texts of a row do not see each other.")
    elif packed is not None:
        packed = theirs.flag("packing")
        note = "Texts of a row do not see each other here; there they do." if packed else ""
        draft.set("data.pack", packed, "packing", note=note)
    else:
        draft.assume("data.pack", plain, f"{PROGRAM} packs texts of pre-training alone, unless it is told to.")
    of = "per_device_train_batch_size"
    settle(theirs, draft, of, "data.batch_size", theirs.whole(of, 8))
    draft.assume("data.truncate", "cut_end", f"{PROGRAM} cuts what is longer than cutoff_len.")
    whole, last = theirs.flag("train_on_prompt"), theirs.flag("mask_history")
    if whole and last:
        raise ConfigError(f"{theirs.place('mask_history')}: mask_history and train_on_prompt exclude each other.")
    if whole:
        draft.set("data.learn", "all", "train_on_prompt", theirs=True)
    elif last:
        draft.set("data.learn", "last", "mask_history", theirs=True)


def _held_out(theirs: Theirs, draft: Draft) -> None:
    size = theirs.number("val_size", 0.0) or 0.0
    if size >= 1:
        draft.set("data.validation_items", int(size), "val_size")
    elif size > 0:
        why = f"A share of the rows; Weft takes their number: data.validation_items, {size:g} of all rows."
        draft.drop("val_size", size, why)
        draft.warn(f"{theirs.place('val_size')}: val_size: {why} Nothing is held out until you write it.")


class _Source:
    """One dataset of theirs on its way into a source of ours."""

    def __init__(self, draft: Draft, at: str, name: str, plain: bool) -> None:
        self.draft, self.at, self.name, self.plain = draft, at, name, plain

    def put(self, info: ReadFile | None, folder: str, place: str) -> None:
        """Where it lies and how its rows are read. Raises ConfigError."""
        if folder == "ONLINE":
            self.draft.set(f"{self.at}.dataset", self.name, "dataset", note="A dataset of the hub.")
            return
        if info is None or not isinstance(info.content, dict):
            what = f"'{self.name}' of {folder}/{INFO}, which was not found; name it behind the config."
            self.draft.ask(f"{self.at}.path", f"{FILL_IN}-{self.name}.jsonl", what)
            return
        entry = info.content.get(self.name)
        if not isinstance(entry, dict):
            near = did_you_mean(self.name, sorted(map(str, info.content)))
            raise ConfigError(f"{place}: there is no dataset '{self.name}' in {info.path}. {near}")
        if entry.get("ranking"):
            raise ConfigError(
                f"{info.place(self.name)}: '{self.name}' holds preferences, which Weft does not train on."
            )
        self._where(entry, info)
        self._shape(entry, info)
        count = entry.get("num_samples")
        if isinstance(count, int) and count > 0:
            self.draft.set(f"{self.at}.take", count, f"{self.name}.num_samples")
        elif count:
            raise ConfigError(
                f"{info.place(self.name, 'num_samples')}: num_samples is {count!r}, and no number of rows."
            )

    def _where(self, entry: Mapping[str, Any], info: ReadFile) -> None:
        draft, at, name = self.draft, self.at, self.name
        if hub := entry.get("hf_hub_url"):
            draft.set(f"{at}.dataset", str(hub), f"{name}.hf_hub_url", note="It needs the extra 'text'.")
            for key, ours in (("subset", "name"), ("split", "split")):
                if entry.get(key):
                    draft.set(f"{at}.{ours}", str(entry[key]), f"{name}.{key}")
            if entry.get("folder"):
                draft.drop(f"{name}.folder", entry["folder"], "Weft takes a dataset's configuration by its name.")
        elif file := entry.get("file_name"):
            path = Path(info.path.parent, str(file)).as_posix()
            if Path(path).suffix and Path(path).suffix not in ENDINGS:
                what = f"'{file}' is no {', '.join(ENDINGS)}; write its rows as one of these."
                draft.ask(f"{at}.path", f"{FILL_IN}-{name}.jsonl", what)
            else:
                draft.set(f"{at}.path", path, f"{name}.file_name", theirs=file)
        else:
            kind = next(
                (key for key in ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name") if key in entry), ""
            )
            why = "is a program, and none is run here" if kind == "script_url" else "lies where Weft does not read"
            draft.ask(f"{at}.path", f"{FILL_IN}-{name}.jsonl", f"'{name}' {why}: {kind} {entry.get(kind, '')}")

    def _shape(self, entry: Mapping[str, Any], info: ReadFile) -> None:
        """The format and the columns. data/parser.py, DatasetAttr."""
        draft, at, name = self.draft, self.at, self.name
        form = str(entry.get("formatting") or "alpaca")
        columns: Any = entry.get("columns")
        columns = columns if isinstance(columns, dict) else {}
        for kind in MEDIA:
            if kind in columns:
                raise ConfigError(f"{info.place(name, 'columns', kind)}: '{name}' has {kind}; Weft trains text alone.")
        if self.plain:
            column = columns.get("prompt") or ("instruction" if form == "alpaca" else "text")
            draft.set(f"{at}.format", "text", f"{name}.formatting", theirs=form, note="The prompt, learned whole.")
            self._columns({} if column == "text" else {"text": column})
            return
        if form == "alpaca":
            draft.assume(f"{at}.format", "alpaca", "By formatting in dataset_info.json.")
            self._columns({**_other(ALPACA, columns), **_other(ASIDE, columns)})
            draft.drop(f"{name}: prompt and query", "joined by a line break", "Weft joins them by an empty line.")
            return
        if form not in ("sharegpt", "openai"):
            raise ConfigError(f"{info.place(name, 'formatting')}: '{form}' is no format that {PROGRAM} has.")
        tags: Any = entry.get("tags")
        tags = tags if isinstance(tags, dict) else {}
        turns = {**SHAREGPT_TAGS, **{key: tags[key] for key in SHAREGPT_TAGS if key in tags}}
        column = str(columns.get("messages") or "conversations")
        if turns == PLAIN_TAGS or form == "openai":
            draft.assume(f"{at}.format", "messages", "By the tags in dataset_info.json.")
            self._columns({**({} if column == "messages" else {"messages": column}), **_other(ASIDE, columns)})
        elif turns == SHAREGPT_TAGS:
            draft.assume(f"{at}.format", "sharegpt", "By formatting in dataset_info.json.")
            self._columns(
                {**({} if column == "conversations" else {"conversations": column}), **_other(ASIDE, columns)}
            )
        else:
            what = ", ".join(f"{key} {value}" for key, value in turns.items())
            draft.warn(
                f"{info.place(name, 'tags')}: Weft reads turns of from and value, or role and content; not {what}."
            )
        speakers = {key: value for key, value in tags.items() if key.endswith("_tag") and key not in SHAREGPT_TAGS}
        odd = {key: value for key, value in speakers.items() if value not in KNOWN_SPEAKERS}
        if odd:
            draft.warn(f"{info.place(name, 'tags')}: Weft does not know the speakers {odd}; rename them in the rows.")

    def _columns(self, columns: Mapping[str, str]) -> None:
        if columns:
            self.draft.set(f"{self.at}.columns", dict(columns), f"{self.name}.columns")


KNOWN_SPEAKERS = ("human", "user", "gpt", "assistant", "model", "system", "tool", "observation", "function_call")


def _other(names: Mapping[str, str], columns: Mapping[str, Any]) -> dict[str, str]:
    """Ours: theirs, of the columns that have another name."""
    return {ours: str(columns[key]) for key, ours in names.items() if columns.get(key) and columns[key] != ours}
