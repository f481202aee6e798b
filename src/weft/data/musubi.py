"""Dataset files of musubi-tuner: TOML with [general] and [[datasets]], read as sources of ours. No torch."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from weft.data.buckets import Buckets
from weft.data.video import Source
from weft.data.windows import Chunk, Extraction, Full, Head, Slide, Uniform
from weft.errors import ConfigError, DataError, did_you_mean

STEP = 16  # pixels: musubi's grid of sides, and that of most of its models
TIME_STRIDE = 4  # frames per latent frame of its video models

NO_CONTROL = "Weft trains without control signals"
ONE_FRAME = "it belongs to FramePack's one-frame training, which Weft does not have"
REFUSED = {
    "control_directory": NO_CONTROL,
    "multiple_target": "Weft has no models of several target layers",
    "no_resize_control": NO_CONTROL,
    "control_resolution": NO_CONTROL,
    "fp_1f_clean_indices": ONE_FRAME,
    "fp_1f_target_index": ONE_FRAME,
    "fp_1f_no_post": ONE_FRAME,
}
UNUSED = {
    "cache_directory": "entries lie in data.cache_folder, found by what they were made of",
    "fp_latent_window_size": "it is FramePack's",
}
Place = tuple[str, str]  # "general" or the number of a dataset, and a key
SOURCES = ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")


class Dataset(BaseModel):
    """One [[datasets]] with what it inherits from [general]; names and defaults are musubi's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    video_directory: Path | None = None
    video_jsonl_file: Path | None = None
    image_directory: Path | None = None
    image_jsonl_file: Path | None = None
    caption_extension: str | None = None
    batch_size: PositiveInt = 1
    num_repeats: PositiveInt = 1
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt] = (960, 544)
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    target_frames: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1)
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = "head"
    frame_stride: PositiveInt = 1
    frame_sample: PositiveInt = 1
    max_frames: PositiveInt = 129
    source_fps: PositiveFloat | None = None

    @property
    def is_video(self) -> bool:
        return bool(self.video_directory or self.video_jsonl_file)

    @property
    def frames(self) -> tuple[int, ...]:
        """Its frame counts, rounded down to whole latent frames as musubi does."""
        if not self.is_video:
            return (1,)
        asked = (self.max_frames,) if self.frame_extraction == "full" else self.target_frames
        return tuple(dict.fromkeys((count - 1) // TIME_STRIDE * TIME_STRIDE + 1 for count in asked))


@dataclass(frozen=True)
class Translated:
    """A dataset file as sources of ours, one for each of its datasets. notices: what it asks that is done otherwise."""

    sources: tuple[Source, ...]
    batch_sizes: tuple[int, ...]
    notices: tuple[str, ...]


def translated(path: Path) -> Translated:
    """Read a dataset file. Raises DataError with all its problems, each with its line."""
    try:
        text = path.read_text("utf-8-sig")
        content = tomllib.loads(text)
    except OSError as error:
        raise DataError(f"data.sources: there is no '{path}' that can be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no TOML: {error}.") from error
    lines = line_numbers(text)
    problems, notices = list(_wrong_tables(path, content)), []
    if problems:
        raise DataError("\n".join(problems))
    found: list[Dataset] = []
    for number, own in enumerate(content["datasets"]):
        given = {**{key: ("general", key) for key in content.get("general", {})}, **{k: (str(number), k) for k in own}}
        values = {**content.get("general", {}), **own}
        where = {key: f"{path}, line {lines.get(place, 1)}" for key, place in given.items()}
        wrong, dataset = _read(values, where, f"{path}, datasets {number}")
        problems += wrong
        notices += [f"{where[key]}: '{key}' is not used: {UNUSED[key]}." for key in values if key in UNUSED]
        if dataset:
            found.append(dataset)
            notices += _changed(dataset, where, f"{path}, datasets {number}")
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    sizes = tuple(dataset.batch_size for dataset in found)
    return Translated(tuple(map(source_of, found)), sizes, tuple(dict.fromkeys(notices)))


def expanded(source: Source, where: str, batch_size: int) -> tuple[list[Source], list[str]]:
    """The sources that stand for one whose path is a dataset file, its repeats multiplied in, and what is to be said.

    Raises ConfigError for further keys beside the path, DataError for the file.
    """
    others = sorted(source.model_fields_set - {"path", "repeats"})
    if others:
        raise ConfigError(
            f"{where}.{others[0]}: {source.path} says this itself, for each of its datasets. Take it out."
        )
    read = translated(source.path)
    notices = list(read.notices)
    if set(read.batch_sizes) != {batch_size}:
        asked = ", ".join(map(str, sorted(set(read.batch_sizes))))
        notices.append(f"{source.path}: its batch_size is {asked}; data.batch_size is {batch_size}, and counts.")
    return [one.model_copy(update={"repeats": one.repeats * source.repeats}) for one in read.sources], notices


def data_section(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The `data` section that a dataset file stands for, as plain data for a config, and what is done otherwise.

    Buckets that all its datasets share stand once.
    """
    read = translated(path)
    sources = [source.model_dump(mode="json", exclude_unset=True) for source in read.sources]
    section: dict[str, Any] = {"kind": "video", "sources": sources, "batch_size": max(read.batch_sizes)}
    if all(source["buckets"] == sources[0]["buckets"] for source in sources):
        section["buckets"] = sources[0]["buckets"]
        section["sources"] = [{k: v for k, v in source.items() if k != "buckets"} for source in sources]
    return section, read.notices


def source_of(dataset: Dataset) -> Source:
    """One dataset as a source; only what it says is set, so that it can be written out briefly."""
    videos, images = dataset.video_directory or dataset.video_jsonl_file, dataset.image_directory
    path = videos or images or dataset.image_jsonl_file
    fields: dict[str, Any] = {"path": path, "only": "video" if dataset.is_video else "image"}
    if path in (dataset.video_jsonl_file, dataset.image_jsonl_file):
        fields["root"] = Path()  # musubi opens a row's path as it stands
    if dataset.caption_extension:
        fields["caption_extension"] = dataset.caption_extension
    if dataset.num_repeats > 1:
        fields["repeats"] = dataset.num_repeats
    if dataset.is_video and dataset.source_fps:
        fields["source_fps"] = dataset.source_fps
    if dataset.is_video and dataset.frame_extraction != "head":
        fields["extraction"] = _extraction(dataset)
    return Source(**fields, buckets=_buckets(dataset))


def _extraction(dataset: Dataset) -> Extraction:
    return {
        "head": Head(kind="head"),
        "chunk": Chunk(kind="chunk"),
        "slide": Slide(kind="slide", step=dataset.frame_stride),
        "uniform": Uniform(kind="uniform", count=dataset.frame_sample),
        "full": Full(kind="full"),
    }[dataset.frame_extraction]


def _size(dataset: Dataset) -> tuple[int, int]:
    return dataset.resolution if isinstance(dataset.resolution, tuple) else (dataset.resolution, dataset.resolution)


def _buckets(dataset: Dataset) -> Buckets:
    """With aspect buckets an area, given as the side of its square; else exactly one size, which all are scaled to."""
    width, height = _size(dataset)
    fields: dict[str, Any] = {"frames": dataset.frames}
    if dataset.enable_bucket:
        fields |= {"sides": (isqrt(width * height - 1) + 1,), "upscale": not dataset.bucket_no_upscale}
    else:
        fields |= {"sizes": ((width // STEP * STEP, height // STEP * STEP),), "upscale": True}
    if len(dataset.frames) > 1:
        fields["choice"] = "each_frames"  # each target is an item of its own
    return Buckets(**fields)


# ---- What is wrong, and what is done otherwise --------------------------------------------------------------------


def _wrong_tables(path: Path, content: Mapping[str, Any]) -> Iterator[str]:
    for name in content:
        if name not in ("general", "datasets"):
            yield f"{path}: there is no table '{name}'. {did_you_mean(name, ('general', 'datasets'))}"
    datasets = content.get("datasets")
    if not isinstance(datasets, list) or not datasets or not all(isinstance(one, dict) for one in datasets):
        yield f"{path} has no [[datasets]]. Write one for each folder of clips."
    if not isinstance(content.get("general", {}), dict):
        yield f"{path}: 'general' is no table. Write [general]."


def _read(values: Mapping[str, Any], where: Mapping[str, str], name: str) -> tuple[list[str], Dataset | None]:
    """The problems of one dataset, or it."""
    problems = [
        f"{where[key]}: '{key}' cannot be followed: {REFUSED[key]}. Take it out to train without."
        for key in values
        if key in REFUSED
    ]
    if not problems:
        sources = [key for key in SOURCES if values.get(key)]
        if len(sources) != 1:
            there = f"has {' and '.join(sources)}" if sources else "names no clips"
            problems.append(f"{name} {there}. Write exactly one of: {', '.join(SOURCES)}.")
    if problems:
        return problems, None
    try:
        return [], Dataset.model_validate({key: value for key, value in values.items() if key not in UNUSED})
    except ValidationError as wrong:
        return [_sentence(error, where) for error in wrong.errors()], None


def _sentence(error: Any, where: Mapping[str, str]) -> str:
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        known = [*Dataset.model_fields, *UNUSED, *REFUSED]
        return f"{where[key]}: there is no key '{key}'. {did_you_mean(key, known)}"
    said = error["msg"][0].lower() + error["msg"][1:]
    return f"{where[key]}: '{key}' is {error['input']!r}: {said}."


def _changed(dataset: Dataset, where: Mapping[str, str], name: str) -> Iterator[str]:
    """Where the values of a dataset are not taken as they stand."""
    if dataset.is_video and dataset.source_fps is None:
        yield (
            f"{name} has no source_fps, and then musubi takes every frame whatever its rate. Here clips are resampled "
            "to the training rate by their own timestamps."
        )
    asked = (dataset.max_frames,) if dataset.frame_extraction == "full" else dataset.target_frames
    if dataset.is_video and tuple(asked) != dataset.frames:
        key = "max_frames" if dataset.frame_extraction == "full" else "target_frames"
        yield f"{where.get(key, name)}: {list(asked)} frames become {list(dataset.frames)}, whole latent frames."
    width, height = _size(dataset)
    if not dataset.enable_bucket and (width % STEP or height % STEP):
        near = f"{width // STEP * STEP}x{height // STEP * STEP}"
        yield f"{where.get('resolution', name)}: {width}x{height} becomes {near}, whose sides are multiples of {STEP}."


def line_numbers(text: str) -> dict[Place, int]:
    """Where each key of [general] and of the n-th [[datasets]] stands; TOML parsers do not tell."""
    found: dict[Place, int] = {}
    table, datasets = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*\[\[\s*datasets\s*\]\]", line):
            table, datasets = str(datasets), datasets + 1
        elif header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line):
            table = header[1]
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line):
            found.setdefault((table, key[1]), number)
    return found
