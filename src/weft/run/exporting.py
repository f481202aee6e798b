"""Writing an adapter for another program: found, cast, written beside its place, read back as that program reads it,
and given its name only when it does there what it did here."""

import json
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from weft import plugins
from weft.contracts import DEFAULT
from weft.durable import HALF_WRITTEN, draft_of, force_to_disk, take_place
from weft.errors import ConfigError, ModelError, did_you_mean
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.formats.canonical import tensors_at_scale
from weft.formats.casting import cast
from weft.formats.consumers import CONSUMERS, VIDEO, use_of
from weft.formats.header import read_header
from weft.formats.reading import experts_in, read_adapter
from weft.formats.sniff import DIFFUSERS_METADATA, PEFT_CONFIG, PEFT_PICKLE, PEFT_WEIGHTS
from weft.names.modules import family_of
from weft.run.assemble import adapter_folder
from weft.run.folder import is_disk_full
from weft.run.verifying import TOLERANCE, Verified, check_export, compare

Kept = Literal["full", "short", "none"]
EXPERTS = (DEFAULT.name, "high", "low")
PRECISIONS: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OTHER_FILES = (".bin", ".ckpt", ".gguf", ".json", ".pt", ".pth", ".sft", ".yaml")  # of names that are meant for files
OF_FORMATS = {"format", DIFFUSERS_METADATA}  # header keys without which other programs cannot read a file
OF_PEFT = {PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE, "README.md"}  # what may lie in a folder that is replaced
RECEIPT = "weft.verified"
# What a short header keeps: what is needed to apply the adapter, and to know what it fits; no paths, no prompts.
SHORT = ("weft.version", "weft.family", "weft.base", "weft.expert", "weft.times", "weft.step", STEP_LIST)


@dataclass(frozen=True)
class Order:
    """What is wanted. out: a file or folder; None: beside the source. dtype: fp32, bf16 or fp16; None: as stored."""

    to: str
    out: Path | None = None
    dtype: str | None = None
    metadata: Kept = "full"
    overwrite: bool = False
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Origin:
    """An adapter that was read. expert: high, low or default. stem: beside this a result is put, and named after it."""

    path: Path
    adapter: SavedAdapter
    expert: str
    stem: Path


@dataclass(frozen=True)
class Result:
    """What came of one order. path: None where the check failed, of this file or of the other expert's, and nothing was
    left. rounding: what casting changed; None where nothing was cast. keys: in the file. adapter: as it was written."""

    path: Path | None
    verified: Verified
    adapter: SavedAdapter
    rounding: Verified | None
    keys: int
    size: int
    notes: tuple[str, ...]


# ---- Where adapters come from --------------------------------------------------------------------------------------


def origins(source: Path, expert: str | None = None, step: int | None = None) -> list[Origin]:
    """The adapter at a path, or those of all experts of a run: the finished ones, or those of a step.

    Raises ConfigError for an expert or step that is not there, ModelError for what is no adapter.
    """
    if not source.exists():
        raise ModelError(f"there is no adapter at {source}: no such file or folder.")
    finished = [source / adapter_folder("adapter", name) for name in EXPERTS]
    is_run = source.is_dir() and ((source / "config.yaml").is_file() or any(map(Path.is_dir, finished)))
    if step is not None and not is_run:
        raise ConfigError(f"--step: {source} is no run's folder, which alone has adapters of several steps.")
    if not is_run:
        each = (expert,) if expert is not None else experts_in(source) or (None,)
        return [_of_file(source, one) for one in each]
    stem = "adapter" if step is None else f"global_step_{step}"
    found = {name: source / adapter_folder(stem, name) for name in EXPERTS}
    found = {name: folder for name, folder in found.items() if folder.is_dir()}
    if not found:
        there = sorted(path.name for path in source.glob("global_step_*"))
        what = "no finished adapter" if step is None else f"no adapter of step {step}"
        raise ConfigError(f"{source}: there is {what}. Saved are: {', '.join(there) or 'none'}. Choose one by --step.")
    if expert is not None and list(found) == [DEFAULT.name]:
        raise ConfigError(f"--expert: {source} trained a model without experts. Leave --expert out.")
    if expert is not None and expert not in found:
        raise ConfigError(f"--expert: {source} has no adapter for '{expert}'. {did_you_mean(expert, list(found))}")
    name = source.name if step is None else f"{source.name}-{step}"
    return [Origin(folder, read_adapter(folder), one, source / name) for one, folder in found.items()
            if expert in (None, one)]  # fmt: skip


def _of_file(source: Path, expert: str | None) -> Origin:
    adapter = read_adapter(source, expert)
    told = adapter.metadata.get("weft.expert", DEFAULT.name)
    if expert is not None and told not in (DEFAULT.name, expert):
        raise ConfigError(f"--expert: {source} says that it is for '{told}' noise, not '{expert}'.")
    if expert is not None and told == DEFAULT.name:
        adapter = replace(adapter, metadata={**adapter.metadata, "weft.expert": expert})
    is_part = source.is_file() and (source.parent / PEFT_CONFIG).is_file()
    stem = source.parent if is_part else source.with_suffix("") if source.is_file() else source
    return Origin(source, adapter, expert or told, stem)


def targets(found: Sequence[Origin], order: Order) -> list[Path]:
    """Where each result goes: a file ending in .safetensors, or of peft a folder; several get their expert's name.

    Raises ConfigError for a place that cannot be written, or where something is already.
    """
    if order.to not in CONSUMERS:
        raise ConfigError(f"--to: no format is called '{order.to}'. {did_you_mean(order.to, list(CONSUMERS))}")
    usual = plugins.find("format", order.to)().file
    placed = []
    for origin in found:
        expert = f"_{origin.expert}" if origin.expert != DEFAULT.name else ""
        if order.out is None:
            name = f"{origin.stem.name.removesuffix(expert)}-{order.to}{expert}"
            target = origin.stem.with_name(name if usual is None else f"{name}.safetensors")
        else:
            target = _named(order.out, expert if len(found) > 1 else "", usual)
        placed.append(target)
        refuse_to_replace(target, order.overwrite, usual is None)
    return placed


def refuse_to_replace(target: Path, overwrite: bool, is_folder: bool) -> None:
    """Raise ConfigError where something is already; of a folder also when told to replace it, if it holds more than an
    adapter, for all of it would go."""
    inside = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not target.exists() or (is_folder and target.is_dir() and not inside):
        return
    if not overwrite:
        raise ConfigError(f"--out: {target} is there already. Choose another name, or add --overwrite.")
    if target.is_dir() != is_folder or inside - OF_PEFT:
        what = f"a folder with {min(inside - OF_PEFT)} in it" if inside - OF_PEFT else "no adapter of this format"
        raise ConfigError(f"--out: {target} is {what}, and is not replaced. Choose another name.")


def _named(out: Path, expert: str, usual: str | None) -> Path:
    if usual is None:
        if out.suffix == ".safetensors":
            raise ConfigError(f"--out: '{out}' names a file, and the format peft is a folder. Leave .safetensors away.")
        return out.with_name(out.name + expert)
    if out.suffix == ".safetensors":
        return out.with_name(f"{out.stem}{expert}.safetensors")
    if out.suffix in OTHER_FILES:
        raise ConfigError(f"--out: '{out}' should end in .safetensors, or name a folder.")
    return out.with_name(out.name + expert) / usual


# ---- Writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A file that is written and checked, and has not its name yet."""

    path: Path
    target: Path
    result: Result


def export(found: Sequence[Origin], places: Sequence[Path], order: Order) -> list[Result]:
    """Write, read back, compare, and only when all are right give the files their names: all of them or none.

    Raises WeftError for what the format cannot hold, and for a disk that is full.
    """
    with ExitStack() as stack:
        drafts = [
            stack.enter_context(_drafted(origin.adapter, target, order))
            for origin, target in zip(found, places, strict=True)
        ]
        if not all(draft.result.verified.is_equal for draft in drafts):
            return [draft.result for draft in drafts]
        made = []
        for draft in drafts:
            with _told_of_the_disk(draft.target):
                made.append(replace(draft.result, path=_place(draft.path, draft.target)))
        return made


@contextmanager
def _drafted(source: SavedAdapter, target: Path, order: Order) -> Iterator[Draft]:
    """A file in a folder of its own beside its place; what was made for it and is empty afterwards goes again."""
    adapter, rounding = prepared(replace(source, metadata=metadata_of(source, order.metadata)), order)
    with ExitStack() as stack:
        with _told_of_the_disk(target):
            stack.enter_context(_with_parents(target))
            folder = draft_of(target)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            draft = _written(adapter, folder / target.name, target, order, rounding)
        yield draft


@contextmanager
def _with_parents(target: Path) -> Iterator[None]:
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _told_of_the_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"--out: {target} cannot be written: {why}.") from error


def _written(adapter: SavedAdapter, place: Path, target: Path, order: Order, rounding: Verified | None) -> Draft:
    path = plugins.find("format", order.to)().write(place, adapter)
    weights = path / PEFT_WEIGHTS if path.is_dir() else path
    if order.metadata == "none":
        stamp(weights, {}, keep=OF_FORMATS)
    verified = check_export(path, order.to, adapter, order.tolerance)
    header = read_header(weights)
    notes: tuple[str, ...] = ()
    if verified.is_equal:
        if order.metadata != "none":
            stamp(weights, {RECEIPT: verified.receipt()})
        notes = tuple(notes_on(path, order.to, adapter))
    return Draft(path, target, Result(None, verified, adapter, rounding, len(header.tensors), header.size, notes))


def metadata_of(adapter: SavedAdapter, kept: Kept) -> dict[str, str]:
    """The part of a header's facts that goes into the file."""
    if kept == "full":
        return {key: value for key, value in adapter.metadata.items() if key != RECEIPT}
    return {key: adapter.metadata[key] for key in SHORT if key in adapter.metadata} if kept == "short" else {}


def prepared(adapter: SavedAdapter, order: Order) -> tuple[SavedAdapter, Verified | None]:
    """The adapter in the dtype that is wanted, and how far rounding took it from what it was. A format that knows no
    alpha gets the scale into its factors before they are rounded, and not after."""
    made, stored = adapter, stored_precision(adapter)
    if order.to == "original" and adapter.kind == "lora":
        wide = cast(adapter, "fp32")
        one = {"alpha": float(wide.rank), "rslora": False}
        one |= {"conv_alpha": float(wide.conv_rank)} if wide.conv_rank else {}
        made = replace(wide, tensors=tensors_at_scale(wide, 1.0, 1.0), **one)
    dtype = order.dtype or stored
    if dtype is not None:
        made = cast(made, dtype)
    if dtype in (None, "fp32") or (dtype == stored and order.to != "original"):
        return made, None
    return made, compare(adapter, made)


def stored_precision(adapter: SavedAdapter) -> str | None:
    """The one dtype of all tensors; None where they have several, or another."""
    found = {tensor.dtype for tensor in adapter.tensors.values()}
    return PRECISIONS.get(found.pop()) if len(found) == 1 else None


def stamp(file: Path, facts: Mapping[str, str], keep: Collection[str] | None = None) -> None:
    """Add to a safetensors file's metadata, or of what is there keep some keys alone; its tensors are copied as they
    lie there."""
    draft = file.with_name(f"{HALF_WRITTEN}stamped-{file.name}")
    with file.open("rb") as old, draft.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        entries = json.loads(old.read(length))
        told = entries.get("__metadata__", {})
        entries["__metadata__"] = {**{key: told[key] for key in told if keep is None or key in keep}, **facts}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        new.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(old, new, 1 << 22)
    draft.chmod(file.stat().st_mode)
    draft.replace(file)


def _place(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        take_place(path, target)
    else:
        force_to_disk(path)
        path.replace(target)
        force_to_disk(target.parent)
    return target


def notes_on(path: Path, to: str, adapter: SavedAdapter) -> Iterator[str]:
    """What other programs than the one that is written for make of the file: diffusers converts those of ComfyUI and
    musubi by rules of its own, and transformers reads PEFT's folders without PEFT."""
    family = family_of(adapter.paths)
    if to == "peft" and family == "causal-lm" and adapter.dora:
        yield "transformers' own load_adapter (5.23) leaves a DoRA's lengths out: load it by PEFT"
    if to not in ("comfyui", "musubi") or family not in VIDEO:
        return
    if adapter.kind != "lora":
        yield "not for diffusers, which loads LoRA alone"
        return
    use = use_of("diffusers", path, family)
    if not use.ignored and not use.faults:
        yield "diffusers' load_lora_weights reads this file too"
    else:
        why = use.faults[0] if use.faults else f"it passes over '{use.ignored[0]}'."
        yield f"not for diffusers: {why} Write --to diffusers for it"
