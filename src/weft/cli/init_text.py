"""weft init for language models: what a folder and a file of conversations are, and the config written for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from weft.config.show import inline
from weft.data.chat import ENDINGS, TextSource
from weft.errors import DataError, did_you_mean

Lines = list[tuple[str, str]]

# Names that fetch themselves; every other model is named by its folder.
LANGUAGE_MODELS: Mapping[str, str] = {
    f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")
}
QUESTIONS = ("prompt", "question", "query", "input")
ANSWERS = ("response", "answer", "completion", "output", "chosen")
COUNTED = 20_000  # rows; of more data the exact number changes nothing here
LOOKED_AT = 20  # rows that tell the columns
LENGTH = 2048  # tokens of a row
ROWS, EPOCHS = 8, 3  # of a step, and of a run
BYTES_PER_TOKEN = {".parquet": 1.5}  # compressed; of plain text about 4


@dataclass(frozen=True)
class Chats:
    """What a file or a folder of conversations is. rows: at least so many. tokens: about so many."""

    form: str
    columns: Mapping[str, str]
    rows: int
    tokens: int

    def steps(self, length: int) -> int:
        """Of a run, about."""
        return max(1, EPOCHS * self.tokens // (length * ROWS))


def context_of(folder: Path) -> int:
    """Tokens of the longest row that the model in a folder takes. Raises ModelError for what is no decoder of text."""
    from weft.families.causal_lm import CausalLM

    return CausalLM(source=folder.as_posix()).context


def look_at(data: Path) -> Chats:
    """The columns, the rows and the size of a file or folder of conversations. Raises DataError."""
    if not data.exists():
        siblings = [path.name for path in data.parent.iterdir()] if data.parent.is_dir() else []
        near = f" {did_you_mean(data.name, siblings)}" if siblings else ""
        raise DataError(f"--data: there is no '{data}' (in {Path.cwd()}).{near}")
    source = TextSource(path=data)
    tapes, _ = source.tapes()
    rows = list(islice((row for tape in tapes for row in tape.rows({}) if not row.problem), COUNTED))
    values = [row.value for row in rows[:LOOKED_AT] if isinstance(row.value, dict)]
    if not values:
        raise DataError(f"--data: '{data}' holds no row. Expected conversations in {', '.join(ENDINGS)}.")
    columns, form = columns_of(values, data)
    size = sum(int(path.stat().st_size / BYTES_PER_TOKEN.get(path.suffix.lower(), 4)) for path in source.files())
    return Chats(form, columns, len(rows), size)


def columns_of(values: Sequence[Mapping[str, Any]], data: Path) -> tuple[dict[str, str], str]:
    """Our names of columns that have others, and the format that they make. Raises DataError for none that is known."""
    from weft.data.conversations import Unfit, form_of

    try:
        return {}, form_of(values[0], values[0])
    except Unfit as unfit:
        refusal = DataError(f"--data: '{data}': {unfit}")
    for name, value in values[0].items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if "role" in value[0]:
                return {"messages": name}, "messages"
            if "from" in value[0]:
                return {"conversations": name}, "sharegpt"
    asked = next((name for name in QUESTIONS if isinstance(values[0].get(name), str)), None)
    said = next((name for name in ANSWERS if isinstance(values[0].get(name), str)), None)
    if asked is None or said is None:
        raise refusal
    return {ours: theirs for ours, theirs in (("instruction", asked), ("output", said)) if ours != theirs}, "alpaca"


# ---- The text -----------------------------------------------------------------------------------------------------


def text_lines(name: str, source: str, data: Path, chats: Chats, context: int | None) -> Lines:
    """The config, one key a line with its reason behind it. context: None where the model is still to be fetched."""
    length = min(LENGTH, context or LENGTH)
    steps = chats.steps(length)
    return [*_model(name, source), *_learning(steps), *_data(data, chats, length), *_watching(steps)]


def _model(name: str, source: str) -> Lines:
    return [
        (f"name: {inline(name)}", "the run's folder is runs/NAME"),
        ("seed: 0", "decides adapter weights and data order"),
        ("", ""),
        ("family:", ""),
        ("  kind: causal-lm", "a decoder of text"),
        (f"  source: {inline(source)}", "folder with config.json, weights and tokenizer"),
        ("  dtype: auto", "nf4: 4-bit weights (QLoRA), for a model that is too large for the GPU"),
        ("", ""),
        ("adapter:", ""),
        ("  kind: lora", ""),
        ("  rank: 32", "more holds more knowledge; 8 is enough for a style"),
        ("  alpha: 32", "strength is alpha / rank: 1"),
        ("  targets: all", "attention and MLP: adapting the MLP too learns more than a higher rank does"),
        ("", ""),
    ]


def _learning(steps: int) -> Lines:
    return [
        ("objective:", ""),
        ("  kind: next-token", "mean over learned tokens, each counted alike"),
        ("", ""),
        ("optimizer:", ""),
        ("  kind: adamw", "adamw8bit needs less memory and bitsandbytes"),
        ("  lr: 1.0e-4", "about ten times that of full fine-tuning; halve it when the loss jumps"),
        ("", ""),
        ("schedule:", ""),
        (f"  epochs: {EPOCHS}", "passes over the data; watch the validation loss, more learns by heart"),
        (f"  global_batch: {ROWS}", "rows of a step on all processes together, however many there are"),
        ("  curve: cosine", "learning rate falls to floor x lr"),
        (f"  warmup: {min(50, steps // 20)}", "steps in which the learning rate rises"),
        ("  floor: 0.1", "share of lr that is left at the end"),
        ("", ""),
        ("engine:", ""),
        ("  precision: auto", "bf16 where the device has it"),
        ("  recompute: true", "less memory, about a third slower; false where weft plan says that it fits"),
        ("", ""),
        ("parallel:", ""),
        ("  shard: 1", "processes that share one copy of the weights, when it is too large for one GPU"),
        ("", ""),
    ]


def _data(data: Path, chats: Chats, length: int) -> Lines:
    held_out = min(100, chats.rows // 20)
    why = "conversations kept out of training, to measure on" if held_out else "0: too few to spare; give it 1 or more"
    renamed = [(f"      columns: {inline(dict(chats.columns))}", "our names of its columns")] if chats.columns else []
    learned = ("  learn: assistant", "what the assistant says; all: questions too")
    if chats.form == "text":
        learned = ("  learn: all", "plain texts are learned whole")
    return [
        ("data:", ""),
        ("  kind: chat", ""),
        ("  sources:", ""),
        (f"    - path: {inline(data.as_posix())}", "files of conversations, a row each"),
        (f"      format: {chats.form}", "by its columns; auto decides row by row"),
        *renamed,
        (f"  validation_items: {held_out}", why),
        (f"  length: {length}", "tokens of a row: memory grows with it"),
        ("  pack: true", "several conversations in a row, which do not see each other: little padding"),
        ("  truncate: drop", "of longer ones; cut_end learns their beginnings, weft plan counts them"),
        learned,
        ("  batch_size: 1", "rows per micro-batch; a packed row is full, more helps small models alone"),
        ("  cache: disk", "tokens are made once; kept in weft-cache"),
        ("", ""),
    ]


def _watching(steps: int) -> Lines:
    every = max(10, min(100, steps // 5))
    return [
        ("validation:", ""),
        (f"  every: {every}", "steps; on the same conversations each time"),
        ("", ""),
        ("samples:", ""),
        (f"  every: {every}", "steps between replies, once there are prompts"),
        ("  prompts: []", "questions as a user asks them, such as [Who are you?]"),
        ("  tokens: 128", "of the longest reply"),
        ("", ""),
        ("save:", ""),
        (f"  every: {every}", "steps between checkpoints"),
        ("  keep: 3", "newest checkpoints that stay on the disk"),
        ("  formats: [peft]", "of the adapter: transformers, vLLM and others load it"),
    ]
