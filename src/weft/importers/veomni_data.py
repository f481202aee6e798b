"""VeOmni's data section as sources of ours, for texts and for clips."""

from math import ceil
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.nested import mapping, popped, put_frames, settle
from weft.importers.values import Theirs
from weft.importers.writing import FILL_IN

PROGRAM = "VeOmni"
LENGTH = 2048
SHIFT = 5.0  # configuration_wan_condition.py
SIDE = 480  # of Wan 2.1, as its recipes are named


def put_texts(theirs: Theirs, draft: Draft) -> int | None:
    """`data` of a language model; steps of an epoch where its tokens tell them."""
    draft.assume("data.kind", "chat", "Conversations or texts.")
    draft.assume("objective.kind", "next-token", "The loss of language models.")
    plain = theirs.choice("data.data_type", ("conversation", "plaintext"), "conversation") == "plaintext"
    column = theirs.text("data.text_keys") or ("content_split" if plain else "messages")
    streamed = theirs.text("data.datasets_type") == "iterable"
    _put_paths(theirs, draft, "data.train_path", "data.sources", (plain, column, streamed))
    if theirs.text("data.eval_path"):
        _put_paths(theirs, draft, "data.eval_path", "data.validation_sources", (plain, column, False))
    length = theirs.whole("data.max_seq_len", LENGTH) or LENGTH
    settle(theirs, draft, "data.max_seq_len", "data.length", length)
    packed = any((
        theirs.flag("train.dyn_bsz", True),
        theirs.flag("train.rmpad", False),
        theirs.flag("train.rmpad_with_pos_ids", False),
    ))  # fmt: skip
    of = next((key for key in ("train.rmpad", "train.rmpad_with_pos_ids") if key in theirs), "train.dyn_bsz")
    settle(theirs, draft, of, "data.pack", packed, shown=theirs.take(of))
    size = theirs.whole("train.micro_batch_size", 1) or 1
    settle(theirs, draft, "train.micro_batch_size", "data.batch_size", size, note="Rows of data.length tokens.")
    draft.assume("data.truncate", "cut_end", f"{PROGRAM} cuts what is longer than data.max_seq_len.")
    tokens, batch = theirs.number("data.train_size"), theirs.whole("train.global_batch_size")
    if tokens and batch and packed and "data.max_seq_len" in theirs:
        warmup = theirs.number("train.bsz_warmup_ratio", 0.0) or 0.0
        return max(1, ceil(int(tokens * (1 + warmup / 2)) / (batch * length)))
    if tokens:
        draft.drop("data.train_size", tokens, "Weft counts the tokens of the data itself.")
    return None


def _put_paths(theirs: Theirs, draft: Draft, of: str, under: str, kind: tuple[bool, str, bool]) -> None:
    plain, column, streamed = kind
    paths = [path.strip() for path in (theirs.text(of) or "").split(",") if path.strip()]
    if not paths:
        draft.ask(f"{under}.0.path", f"{FILL_IN}.jsonl", f"{of} names no file.")
    for number, path in enumerate(paths):
        at = f"{under}.{number}"
        if path.endswith((".yaml", ".yml")):
            draft.ask(f"{at}.path", f"{FILL_IN}.jsonl", f"'{path}' is a list of sources; write each as one of ours.")
        elif "hdfs://" in path:
            draft.ask(f"{at}.path", f"{FILL_IN}.jsonl", f"'{path}' lies in HDFS; Weft reads files of this machine.")
        else:
            draft.set(f"{at}.path", path, of, note="A file or a folder of .jsonl, .json or .parquet.")
        if plain:
            draft.set(f"{at}.format", "text", "data.data_type", theirs="plaintext")
            if column != "text":
                draft.set(f"{at}.columns", {"text": column}, "data.text_keys", theirs=column)
        elif column not in ("messages", "conversations"):
            draft.set(f"{at}.columns", {"messages": column}, "data.text_keys", theirs=column)
        if streamed and not path.endswith(".json"):
            draft.set(f"{at}.streaming", True, "data.datasets_type", theirs="iterable")


def put_clips(theirs: Theirs, draft: Draft) -> int | None:
    """`data` of a video model; steps of an epoch, which are never known before the data is."""
    draft.assume("data.kind", "video", "Clips with captions.")
    draft.assume("objective.kind", "flow-matching", "The loss of these models.")
    encoders = mapping(theirs, "model.condition_model_cfg")
    own = popped(theirs, "model.condition_model_cfg", encoders, "shift")
    shifted = {"kind": "shift", "shift": own or SHIFT, "scale": None}
    if own:
        draft.set("objective.timesteps", shifted, "model.condition_model_cfg.shift", theirs=own)
    else:
        draft.assume("objective.timesteps", shifted, f"{PROGRAM} draws from its scheduler's times alike.")
    for key, value in encoders.items():
        draft.drop(f"model.condition_model_cfg.{key}", value, "Weft takes the configs that lie with the encoders.")
    task = theirs.text("train.training_task") or "online_training"
    path = theirs.text("data.train_path")
    if task == "offline_embedding":
        raise ConfigError(
            f"{theirs.place('train.training_task')}: this encodes data and trains nothing. Weft encodes into its own "
            "cache when it trains; 'weft cache' does so beforehand."
        )
    theirs.take("data.text_keys")
    why = (
        "VeOmni's parquet holds pickled embeddings or videos as bytes, which Weft does not read; it encodes clips into "
        "its own cache. Name the folder of the clips with captions beside them, or a manifest."
    )
    draft.drop("data.train_path", path, why)
    draft.ask("data.sources.0.path", f"{FILL_IN}-folder", "The clips that the parquet was made of.")
    if "train.training_task" in theirs:
        done = "Weft encodes each clip once, and trains on what it keeps: the same as offline, in one command."
        draft.drop("train.training_task", task, done)
    at = "data.mm_configs."
    if rate := theirs.number(f"{at}fps"):
        draft.set("data.fps", rate, f"{at}fps")
    if most := theirs.whole(f"{at}max_frames"):
        put_frames(draft, "data.buckets.frames", [most], f"{at}max_frames")
    else:
        draft.ask("data.buckets.frames", [81], "VeOmni takes what the parquet has.")
    draft.ask("data.buckets.sides", [SIDE], "VeOmni trains on clips in the size that they have; say one.")
    size: Any = theirs.whole("train.micro_batch_size", 1)
    settle(theirs, draft, "train.micro_batch_size", "data.batch_size", size)
    for key in ("data.max_seq_len", "data.train_size", "data.datasets_type", "data.datasets_repeat", "data.data_type",
                "train.dyn_bsz", "train.rmpad", "train.rmpad_with_pos_ids", "data.shuffle"):  # fmt: skip
        if (value := theirs.take(key)) not in (None, False, "diffusion"):
            draft.drop(key, value, "It is of texts, or of how the parquet is read.")
    draft.assume("data.caption_dropout", 0.0, f"{PROGRAM} drops no captions.")
    return None
