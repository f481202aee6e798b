"""A base with adapters in it, written beside the base: its weight files anew, and all else of a folder linked."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from weft.durable import whole_file, write_folder, write_whole
from weft.errors import ConfigError, RunError
from weft.families.layouts import beside, in_known_words
from weft.families.stored import entries_of
from weft.run.merged_files import MergedFile, Progress
from weft.run.merging import Merge

INDEX = ".safetensors.index.json"
OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
NOT_OF_A_MODEL = (".git", ".cache")  # what fetching leaves in folders
LINKED = 1 << 20  # bytes from which on a file is linked: smaller ones are edited in place now and then
SPARE = 64 << 20  # bytes of the disk that stay free
TOLD = "weft.merged"


@dataclass
class Written:
    """What was written. files: anew. linked: of the base, as they are. left_out: the base's own weights under other
    names, which would be without the change. compared: tensors that were read back."""

    path: Path
    bytes: int = 0
    files: int = 0
    linked: int = 0
    copied: int = 0
    compared: int = 0
    left_out: list[str] = field(default_factory=list)


def merged_files(merge: Merge) -> dict[Path, MergedFile]:
    """The base's weight files -> how they are written. Raises ConfigError for a tensor that two of them hold."""
    found: dict[Path, MergedFile] = {}
    for network in merge.networks:
        source = network.weights.source
        told = {TOLD: json.dumps(merge.record(network), ensure_ascii=False)}
        for path in source.weights.files:
            found[path] = MergedFile(path, source, network.edits, merge.asked.dtype, told)
        _refuse_twice(list(source.weights.files))
    return found


def write(merge: Merge, out: Path, tell: Progress, copy: bool = False, overwrite: bool = False) -> Written:
    """Write the merged base to a folder, or to a file where the base is one: whole, or nothing.

    Raises: ConfigError for an --out that cannot be, RunError for a disk that is too small, ModelError for numbers that
    the precision cannot hold, and for a file that does not read back as it was written.
    """
    base, files = merge.asked.base, merged_files(merge)
    _check_out(base, out, overwrite)
    written = Written(out)
    if base.is_file():
        _check_room(out, sum(file.data_bytes for file in files.values()))
        with whole_file(out) as draft:
            _write_file(files[base], draft, tell, written)
        if (config := beside(base)) is not None:
            write_whole(out.with_suffix(".json"), config.read_bytes())
        return written
    linked = [path for path in walked(base) if path not in files and not copy and _is_linked(path, out)]
    copied = [path for path in walked(base) if path not in files and path not in linked]
    sizes = [file.data_bytes for file in files.values()] + [path.stat().st_size for path in copied]
    _check_room(out, sum(sizes))
    write_folder(out, partial(_fill, merge, files, frozenset(linked), tell, written))
    return written


def walked(base: Path) -> Iterator[Path]:
    """Every file of a model's folder."""
    for folder, inside, names in os.walk(base, followlinks=True):
        inside[:] = sorted(name for name in inside if name not in NOT_OF_A_MODEL)
        yield from (Path(folder) / name for name in sorted(names))


# ---- A folder -------------------------------------------------------------------------------------------------------


def _fill(
    merge: Merge,
    files: Mapping[Path, MergedFile],
    linked: frozenset[Path],
    tell: Progress,
    written: Written,
    draft: Path,
) -> None:
    base = merge.asked.base
    changed = {path.parent for path in files}
    for path in walked(base):
        target = draft / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in files:
            _write_file(files[path], target, tell, written)
        elif _is_stale(path, base, changed):
            written.left_out.append(str(path.relative_to(base)))
        elif path.parent in changed and path.name.endswith(INDEX):
            target.write_text(json.dumps(_index(path, files), indent=2) + "\n", encoding="utf-8")
        elif path.parent in changed and path.name == "config.json" and merge.asked.dtype is not None:
            target.write_text(_config(path, merge.asked.dtype), encoding="utf-8")
        elif path in linked:
            os.link(path.resolve(), target)
            written.linked += 1
        else:
            shutil.copyfile(path, target)
            written.copied += 1


def _write_file(file: MergedFile, target: Path, tell: Progress, written: Written) -> None:
    file.write(target, tell)
    written.compared += file.check(target)
    written.bytes += file.data_bytes
    written.files += 1


def _is_stale(path: Path, base: Path, changed: set[Path]) -> bool:
    """Whether a file holds weights of a merged network as they were, in another format or precision. In the makers'
    directories of Wan other networks lie beside the weights."""
    if path.suffix not in OF_WEIGHTS:
        return False
    folder = base if path.relative_to(base).parts[0] == "original" else path.parent
    config = folder / "config.json"
    return folder in changed and config.is_file() and in_known_words(json.loads(config.read_text(encoding="utf-8")))


def _index(path: Path, files: Mapping[Path, MergedFile]) -> dict[str, object]:
    """An index of shards without the tensors that are written no more."""
    index = json.loads(path.read_text(encoding="utf-8"))
    own = {name: file for file in files.values() if file.path.parent == path.parent for name in file.entries}
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name in own}
    if "total_size" in index.get("metadata", {}):
        shards = {path.parent / shard for shard in index["weight_map"].values()}
        index["metadata"]["total_size"] = sum(files[shard].data_bytes for shard in shards)
    return index


def _config(path: Path, dtype: str) -> str:
    """A config that says the precision that the weights now have, where it says one."""
    words = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {key: words[dtype] for key in ("dtype", "torch_dtype") if key in config}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _is_linked(path: Path, out: Path) -> bool:
    """Whether a file of the base may be linked: it is large, and on the disk of what is written."""
    state, there = path.stat(), _there(out)
    return state.st_size >= LINKED and state.st_dev == there.stat().st_dev


# ---- Refusals -------------------------------------------------------------------------------------------------------


def _refuse_twice(paths: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        for name in entries_of(path):
            if name in seen:
                raise ConfigError(
                    f"--into: {seen[name].name} and {path.name} in {path.parent} both hold '{name}'. Take the variant "
                    "that is not meant out of the folder, or name the other file itself."
                )
            seen[name] = path


def _check_out(base: Path, out: Path, overwrite: bool) -> None:
    if base.is_file() and out.suffix != ".safetensors":
        raise ConfigError(f"--out: the base is one file, so expected is a .safetensors file, got {out}.")
    if base.is_dir() and out.suffix == ".safetensors":
        raise ConfigError(f"--out: the base is a folder, so expected is a new folder, got {out}.")
    if base.is_dir() and out.resolve().is_relative_to(base.resolve()):
        raise ConfigError(f"--out: {out} is the base, or in it. Name a place outside of {base}.")
    if out.resolve() == base.resolve():
        raise ConfigError(f"--out: {out} is the base itself, which is left as it is. Name another file.")
    there = out.exists() and (out.is_file() or any(out.iterdir()))
    if there and not overwrite:
        raise ConfigError(f"--out: {out} is there already. Name another, or add --overwrite.")
    ours = {path.relative_to(base) for path in walked(base)} if base.is_dir() else set()
    others = {path.relative_to(out) for path in walked(out)} - ours if out.is_dir() else set()
    if others:
        raise ConfigError(
            f"--out: {out} holds what the base has not, such as {min(others)}, and all of it would go. "
            "Name another place."
        )


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(_there(out)).free
    if free < needed + SPARE:
        raise RunError(
            f"--out: {out} takes {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. Name a place on a "
            "larger one."
        )


def _there(out: Path) -> Path:
    """The nearest folder above a new path that exists."""
    return next(parent for parent in out.absolute().parents if parent.is_dir())
