"""ai-toolkit's datasets as sources of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import ConfigError
from weft.importers.ai_toolkit_keys import DATASET_REASONS
from weft.importers.draft import Draft, ReadFile
from weft.importers.nested import dotted, leave, settle, whole_frames
from weft.importers.values import Theirs
from weft.importers.writing import FILL_IN

PROGRAM = "ai-toolkit"
SIDE = 512  # its resolution when none is given
Part = tuple[str, Theirs]  # what the names of a dataset's keys begin with, and its keys
LONGEST = 81  # frames of a clip that is taken whole, as the models were trained


def put_data(file: ReadFile, path: Sequence[str | int], train: Theirs, draft: Draft, trigger: str | None) -> None:
    """`data` from process.datasets, and from what of process.train is about data. Raises ConfigError."""
    draft.assume("data.kind", "video", "Clips with captions.")
    listed: Any = train.take("datasets")
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        if listed:
            raise ConfigError(
                f"{train.place('datasets')}: 'datasets' is a list of sections in {PROGRAM}, each a folder."
            )
        draft.ask("data.sources.0.path", f"{FILL_IN}-folder", "The job names no dataset.")
        listed = []
    sources: list[Part] = []
    for number in range(len(listed)):
        one = dotted(file, PROGRAM, *path, "datasets", number, named=f"datasets.{number}.")
        if one.take(f"datasets.{number}.is_reg"):
            why = "Images for regularisation; Weft's loss has no second part. It was left out."
            draft.drop(f"datasets.{number}", one.take(f"datasets.{number}.folder_path"), why)
            continue
        sources.append((f"datasets.{number}.", one))
    if not sources and listed:
        draft.ask("data.sources.0.path", f"{FILL_IN}-folder", "The job trains on no dataset but those left out.")
    shapes = [_source(part, draft, place) for place, part in enumerate(sources)]
    _put_shapes(draft, shapes)
    settle(train, draft, "train.batch_size", "data.batch_size", train.whole("train.batch_size", 1))
    _captions(sources, train, draft, trigger)
    for at, one in sources:
        reasons = {at + key: why for key, why in DATASET_REASONS.items()}
        leave(one, draft, reasons, ())


def _source(part: Part, draft: Draft, place: int) -> tuple[str, dict[str, Any]]:
    """Put one source; its shapes with the key that they come from."""
    at, one = part
    ours = f"data.sources.{place}"
    of = at + ("dataset_path" if one.text(f"{at}dataset_path") else "folder_path")
    folder = one.text(of)
    one.take(f"{at}folder_path")
    if folder is None:
        draft.ask(f"{ours}.path", f"{FILL_IN}-folder", "The dataset names no folder.")
    else:
        draft.set(f"{ours}.path", folder, of)
    frames = one.whole(f"{at}num_frames", 1) or 1
    whole = one.flag(f"{at}auto_frame_count")
    video = frames > 1 or whole
    if not video:
        draft.warn(
            f"{at}num_frames is 1: ai-toolkit looks for images alone there and passes by videos, and so does the "
            "config. For clips write frames such as [81] and take 'only' out."
        )
    of_only = f"{at}auto_frame_count" if whole else f"{at}num_frames"
    settle(one, draft, of_only, f"{ours}.only", "video" if video else "image", shown=True if whole else frames)
    repeats = one.number(f"{at}num_repeats", 1) or 1
    if repeats != 1:
        note = "" if repeats == round(repeats) else "Rounded."
        draft.set(f"{ours}.repeats", max(1, round(repeats)), f"{at}num_repeats", theirs=repeats, note=note)
    _caption_files(one, draft, at, ours)
    if video:
        _windows(one, draft, at, ours, whole)
    elif f"{at}fps" in one:
        one.take(f"{at}fps")
    if whole and frames == 1:
        frames = LONGEST
    counted = whole_frames(frames)
    note = "" if counted == frames else f"{frames} frames are no whole latent frames; counts have the form 4k+1."
    return note, {"sides": _sides(one, at), "frames": [counted]}


def _sides(one: Theirs, at: str) -> list[int]:
    sides = sorted({int(side) for side in one.numbers(f"{at}resolution")}, reverse=True)
    return sides or [SIDE]


def _caption_files(one: Theirs, draft: Draft, at: str, ours: str) -> None:
    ending = one.text(f"{at}caption_ext")
    legacy = one.text(f"{at}caption_type")
    of = f"{at}caption_type" if legacy else f"{at}caption_ext"
    if not (ending := legacy or ending):
        return
    dotted_ending = ending if ending.startswith(".") else f".{ending}"
    if dotted_ending == ".json":
        draft.drop(of, ending, "Weft reads captions from text files or one manifest; write a .jsonl of them.")
    elif dotted_ending != ".txt":
        draft.set(f"{ours}.caption_extension", dotted_ending, of, theirs=ending)
    else:
        draft.set(f"{ours}.caption_extension", ".txt", of, theirs=ending)


def _windows(one: Theirs, draft: Draft, at: str, ours: str, whole: bool) -> None:
    """Which frames of a clip are used. toolkit/dataloader_mixins.py, load_and_process_video."""
    rate = one.number(f"{at}fps")
    shrink = one.flag(f"{at}shrink_video_to_frames", True)
    if whole:
        draft.set(f"{ours}.extraction.kind", "full", f"{at}auto_frame_count", theirs=True)
    elif shrink:
        draft.drop(
            f"{at}shrink_video_to_frames", True,
            "ai-toolkit draws a whole clip together into its frames, which makes long clips fast. Weft keeps the "
            "model's rate and takes the first frames; see data.extraction.",
        )  # fmt: skip
        return
    else:
        window = {"kind": "random", "count": 1}
        note = "One window anywhere, drawn once for the run and not anew in each epoch."
        draft.set(f"{ours}.extraction", window, f"{at}shrink_video_to_frames", theirs=False, note=note)
    if rate is not None:
        draft.set("data.fps", rate, f"{at}fps", note="One rate for all sources.")


def _put_shapes(draft: Draft, shapes: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Shapes that all sources share stand once."""
    plain = [dict(shape) for _, shape in shapes]
    same = all(shape == plain[0] for shape in plain)
    for place, (note, shape) in enumerate(shapes):
        key = "data.buckets" if same else f"data.sources.{place}.buckets"
        if place and same:
            break
        of = f"datasets.{place}"
        draft.set(f"{key}.sides", shape["sides"], f"{of}.resolution")
        draft.set(f"{key}.frames", shape["frames"], f"{of}.num_frames", note=note)
        if len(shape["sides"]) > 1:
            draft.assume(f"{key}.choice", "each_size", "ai-toolkit shows each clip at each of its resolutions.")
    if not plain:
        draft.assume("data.buckets", {"sides": [SIDE], "frames": [LONGEST]}, "The job says no shape.")


def _captions(sources: Sequence[Part], train: Theirs, draft: Draft, trigger: str | None) -> None:
    """Trigger words, dropout and missing captions, which are one setting for all sources here."""
    of = "trigger_word"
    for at, one in sources:
        own = one.text(f"{at}trigger_word")
        if own and trigger and own != trigger:
            draft.drop(f"{at}trigger_word", own, "data.caption_prefix is one for all sources.")
        elif own and not trigger:
            trigger, of = own, f"{at}trigger_word"
    if trigger:
        note = "Put before every caption; there only where it is missing, and in place of [trigger]."
        draft.set("data.caption_prefix", trigger, of, note=note)
    rates = [one.number(f"{at}caption_dropout_rate", 0.0) or 0.0 for at, one in sources]
    global_rate = train.number("train.prompt_dropout_prob", 0.0) or 0.0
    rate = max([global_rate, *rates])
    note = "" if len(set(rates)) < 2 else "One for all sources; the highest."
    if global_rate or any(f"{at}caption_dropout_rate" in one for at, one in sources):
        of = "train.prompt_dropout_prob" if global_rate == rate and global_rate else "datasets.0.caption_dropout_rate"
        draft.set("data.caption_dropout", rate, of, note=note)
    else:
        draft.assume("data.caption_dropout", 0.0, "ai-toolkit drops no captions unless it is told to.")
    draft.assume("data.missing_captions", "empty", "ai-toolkit trains on clips without a caption too.")
    if train.flag("train.unload_text_encoder"):
        draft.drop("train.unload_text_encoder", True, "Weft encodes captions once and frees the encoder by itself.")
        draft.warn(
            "train.unload_text_encoder: ai-toolkit then leaves all captions out and trains on the trigger word alone. "
            "Weft trains on the captions."
        )
