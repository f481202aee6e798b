"""diffusion-pipe's dataset files (utils/dataset.py) as sources of ours."""

from collections.abc import Collection, Mapping, Sequence
from math import inf, isqrt
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.importers.diffusion_pipe_keys import DATA_REASONS
from weft.importers.draft import Draft, ReadFile
from weft.importers.nested import beside, dotted, leave, listed, settle, whole_frames
from weft.importers.reading import read
from weft.importers.values import Same, Theirs, carry
from weft.importers.writing import FILL_IN

PROGRAM = "diffusion-pipe"
GRID = 16  # pixels, of explicit sizes
LISTS = ("resolutions", "size_buckets", "frame_buckets", "ar_buckets", "directory")


def dataset_file(named: str | None, main: ReadFile, others: Sequence[ReadFile]) -> ReadFile | None:
    """The dataset file that a main file names: among those given, or where it lies. None: it is not there."""
    if named is None:
        raise ConfigError(f"{main.path}: 'dataset' is missing, and {PROGRAM} asks for it.")
    for file in others:
        if file.path.name == Path(named).name:
            return file
    found = beside(main.path, named) or beside(main.path, Path(named).name)
    return read(found) if found else None


def put_data(file: ReadFile | None, main: Theirs, draft: Draft, named: str | None) -> list[int]:
    """`data` from a dataset file and from what of the main file is about data; the sides in pixels."""
    draft.assume("data.kind", "video", "Clips with captions.")
    sides: list[int] = []
    if file is None:
        draft.ask("data.sources.0.path", f"{FILL_IN}-folder", f"The dataset file '{named}' was not found.")
        draft.ask("data.buckets", {"sides": [512], "frames": [33]}, "The shapes stand in the dataset file.")
        main.take("dataset")
    else:
        draft.drop("dataset", str(file.path), "Its folders and shapes stand in the config itself.")
        sides = _put_sources(file, draft, "data.sources", shared=True)
    _batches(main, draft)
    mode = main.choice("video_clip_mode", ("single_beginning", "single_middle"), "single_beginning")
    if mode == "single_middle":
        draft.drop("video_clip_mode", mode, "Weft has no window in the middle; it takes the first: data.extraction.")
    elif "video_clip_mode" in main:
        draft.set("data.extraction.kind", "head", "video_clip_mode", theirs=mode)
    rate = main.number("uncond_fraction", 0.0)
    settle(main, draft, "uncond_fraction", "data.caption_dropout", rate)
    carry(main, draft, [Same("caching_batch_size", "data.encoder_batch", "whole")])
    return sides


def _batches(main: Theirs, draft: Draft) -> None:
    size: Any = main.take("micro_batch_size_per_gpu", 1)
    of = "micro_batch_size_per_gpu"
    if isinstance(size, list):
        sizes = [pair[1] for pair in size if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)]
        if not sizes:
            raise main.refused(of, "a number, or pairs of resolution and number")
        note = "Weft's batches are of one size; the smallest."
        draft.set("data.batch_size", min(sizes), of, theirs=size, note=note)
        return
    settle(main, draft, of, "data.batch_size", main.whole(of, 1))


def put_evaluated(main: Theirs, draft: Draft, file: ReadFile, others: Sequence[ReadFile]) -> None:
    """`data.validation_sources` from eval_datasets."""
    for number, one in enumerate(listed(main, "eval_datasets")):
        named = one if isinstance(one, str) else one.get("config") if isinstance(one, dict) else None
        if not isinstance(named, str):
            raise main.refused("eval_datasets", "a list of files, or of {name, config}")
        found = dataset_file(named, file, others)
        if found is None:
            draft.drop(f"eval_datasets.{number}", named, "The file was not found; name it behind the main file.")
            continue
        draft.drop(f"eval_datasets.{number}", named, "Its folders stand under data.validation_sources.")
        _put_sources(found, draft, "data.validation_sources", shared=False)
    every = main.whole("eval_every_n_steps")
    if every:
        draft.set("validation.every", every, "eval_every_n_steps")


# ---- Sources --------------------------------------------------------------------------------------------------------


def _put_sources(file: ReadFile, draft: Draft, under: str, shared: bool) -> list[int]:
    """Put the folders of a dataset file behind those that are there; all their sides."""
    folders: Any = file.content.get("directory")
    if not isinstance(folders, list) or not folders or not all(isinstance(folder, dict) for folder in folders):
        raise ConfigError(
            f"{file.place('directory')}: {PROGRAM}'s dataset file has [[directory]] tables, each with a path."
        )
    whole = dotted(file, PROGRAM, whole=LISTS)
    whole.take("directory")
    already = len(draft.config().get("data", {}).get(under.rpartition(".")[2], []))
    shapes: list[dict[str, Any]] = []
    for number in range(len(folders)):
        one = dotted(file, PROGRAM, "directory", number, whole=LISTS, named=f"directory.{number}.")
        at, ours = f"directory.{number}.", f"{under}.{already + number}"
        path = one.text(f"{at}path")
        if path is None:
            raise ConfigError(f"{file.place('directory', number)}: this [[directory]] has no path.")
        draft.set(f"{ours}.path", path, f"{at}path")
        general, own = whole.number("num_repeats", 1), one.number(f"{at}num_repeats")
        repeats = own or general or 1
        if repeats != 1:
            note = "" if float(repeats).is_integer() else "Rounded."
            draft.set(f"{ours}.repeats", max(1, round(repeats)), f"{at}num_repeats", theirs=repeats, note=note)
        shape = _shape(one, whole, at, file)
        if shape["frames"] == [1]:
            draft.assume(f"{ours}.only", "image", f"{PROGRAM} leaves videos out where frame_buckets has none for them.")
        shapes.append(shape)
        one.take(f"{at}caption_prefix")
        leave(one, draft, {at + key: why for key, why in DATA_REASONS.items()}, ())
    _put_shapes(shapes, draft, under, already, shared)
    _captions(whole, folders, draft)
    leave(whole, draft, DATA_REASONS, ())
    return [side for shape in shapes for side in shape.get("sides", ())]


def _own(one: Theirs, whole: Theirs, at: str, key: str, default: Any = None) -> Any:
    """A setting of a folder, or of the file for all folders."""
    general, own = whole.take(key), one.take(f"{at}{key}")
    return next((value for value in (own, general) if value is not None), default)


def _numbers(one: Theirs, whole: Theirs, at: str, key: str, lengths: Collection[int]) -> list[Any]:
    """A list of numbers from 1 on, or of lists of them. lengths: of these lists; 0 is a number alone."""
    value = _own(one, whole, at, key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(_fits(item, lengths) for item in value):
        place = one if f"{at}{key}" in one else whole
        kinds = " or ".join(f"lists of {length}" if length else "numbers" for length in lengths)
        raise place.refused(f"{at}{key}" if place is one else key, f"a list of {kinds}")
    return value


def _fits(item: Any, lengths: Collection[int]) -> bool:
    if isinstance(item, list):
        return bool(item) and len(item) in lengths and all(_fits(part, (0,)) for part in item)
    return 0 in lengths and isinstance(item, (int, float)) and not isinstance(item, bool) and 1 <= item < inf


def _shape(one: Theirs, whole: Theirs, at: str, file: ReadFile) -> dict[str, Any]:
    """The buckets of a folder."""
    boxes = _numbers(one, whole, at, "size_buckets", (3,))
    resolutions = _numbers(one, whole, at, "resolutions", (0, 2))
    counts = _numbers(one, whole, at, "frame_buckets", (0,))
    aspects = _own(one, whole, at, "enable_ar_bucket", False)
    if boxes:
        sizes = sorted({(_whole_side(box[0]), _whole_side(box[1])) for box in boxes})
        return {"sizes": [list(size) for size in sizes], "frames": _frames([box[2] for box in boxes]), "upscale": True}
    if not resolutions:
        raise ConfigError(f"{file.path}: {PROGRAM} asks for 'resolutions' or 'size_buckets', and neither is given.")
    sides = sorted({_side(resolution) for resolution in resolutions}, reverse=True)
    shape: dict[str, Any] = {"frames": _frames(counts), "upscale": True}
    if aspects:
        shape["sides"] = sides
    else:  # one ratio for all: squares
        shape["sizes"] = [[_whole_side(side), _whole_side(side)] for side in sides]
    if len(sides) > 1:
        shape["choice"] = "each_size"
    return shape


def _side(resolution: Any) -> int:
    """The side of the square of a resolution, which is one number or a (width, height) that stands for its area."""
    return isqrt(int(resolution[0]) * int(resolution[1])) if isinstance(resolution, list) else int(resolution)


def _whole_side(side: float) -> int:
    return max(GRID, round(side / GRID) * GRID)


def _frames(counts: Sequence[int]) -> list[int]:
    """Frame counts of clips, longest first; 1 is for images, which need no count of their own."""
    found = sorted({whole_frames(int(count)) for count in counts if count > 1}, reverse=True)
    return found or [1]


def _put_shapes(shapes: Sequence[Mapping[str, Any]], draft: Draft, under: str, already: int, shared: bool) -> None:
    """Shapes that all folders share stand once."""
    same = shared and all(shape == shapes[0] for shape in shapes)
    for number, shape in enumerate(shapes):
        if number and same:
            break
        key = "data.buckets" if same else f"{under}.{already + number}.buckets"
        if not shared and shape == draft.config().get("data", {}).get("buckets"):
            continue
        of = "resolutions" if "sides" in shape else "size_buckets"
        note = "Squares, for enable_ar_bucket is off there." if "sizes" in shape and "choice" not in shape else ""
        size = "sides" if "sides" in shape else "sizes"
        draft.set(f"{key}.{size}", shape[size], of, note=note)
        draft.set(f"{key}.frames", shape["frames"], "frame_buckets", note="Of the form 4k+1; images take 1 besides.")
        draft.assume(f"{key}.upscale", True, f"{PROGRAM} enlarges what is smaller.")
        if "choice" in shape:
            draft.assume(f"{key}.choice", shape["choice"], f"{PROGRAM} shows each clip at each of the resolutions.")


def _captions(whole: Theirs, folders: Sequence[Mapping[str, Any]], draft: Draft) -> None:
    general = whole.text("caption_prefix") or ""
    own = [str(folder.get("caption_prefix") or general) for folder in folders]
    if prefix := own[0].strip():
        note = "" if len(set(own)) == 1 else "One for all sources: that of the first."
        draft.set("data.caption_prefix", prefix, "caption_prefix", note=note)
    elif any(own):
        draft.drop("caption_prefix", own, "data.caption_prefix is one for all sources, and the first has none.")
    skip = whole.flag("skip_empty_caption", True)
    settle(whole, draft, "skip_empty_caption", "data.missing_captions", "drop" if skip else "empty", shown=skip)
