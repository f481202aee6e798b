"""One adapter of several: the average of the changes that they make, or their sum."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from weft import plugins
from weft.contracts import DEFAULT
from weft.durable import write_folder
from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import CausalLM
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.assemble import adapter_folder
from weft.run.block_strengths import BlockStrengths, at_blocks
from weft.run.summed import Part, Sum, common_step_list, kind_of, refuse_other_sizes, refuse_without_sum, summed

# Of a sum's header, what the first parent that says it says: where they can differ, other things refuse it.
OF_ANY = ("weft.config", "weft.base", "weft.expert", "weft.times", "weft.family", "base_model", STEP_LIST)

Groups = dict[str, list[Part]]  # name of a network -> the adapters that are for it


def read_parents(paths: Sequence[Path], weights: Sequence[float] | None) -> Groups:
    """The adapters at paths (or of the runs there) and their shares, which sum to 1. Raises WeftError for those that
    have no common average."""
    groups = _read(paths, weights, "average")
    return {expert: _shares(parents, len(paths)) for expert, parents in groups.items()}


def _shares(parents: Sequence[Part], runs: int) -> list[Part]:
    whole = sum(parent.weight for parent in parents)
    for parent in parents:
        _refuse_other_kinds(parent)
        _refuse_other_layers(parents[0], parent)
        refuse_other_sizes(parents[0], parent)
        _refuse_strangers(parents[0], parent)
    if len(parents) != runs:
        raise ModelError(
            f"{parents[0].path} is for an expert that not every one of the {runs} has an adapter for. Average runs "
            "that trained the same experts."
        )
    _refuse_half_a_student(parents)
    return [Part(parent.path, parent.adapter, parent.weight / whole) for parent in parents]


def read_summands(
    paths: Sequence[Path], weights: Sequence[float] | None, blocks: BlockStrengths | None = None
) -> Groups:
    """The adapters at paths (or of the runs there) and how much each counts, 1 where no weights are given; blocks: in
    which blocks. Raises WeftError for those that have no sum."""
    groups = _read(paths, weights, "stack")
    for expert, parts in groups.items():
        refuse_without_sum(parts)
        common_step_list([(part.path, part.adapter) for part in parts])
        for first in parts:
            for other in parts:
                _refuse_strangers(first, other)
        if blocks is not None:
            blocks.check(path for part in parts for path in part.adapter.paths)
            groups[expert] = [replace(part, adapter=at_blocks(part.adapter, blocks)) for part in parts]
    return groups


def _read(paths: Sequence[Path], weights: Sequence[float] | None, option: str) -> Groups:
    if len(paths) < 2:
        what = {"average": "an average", "stack": "a sum"}[option]
        raise ConfigError(f"--{option}: {what} needs two adapters at least. Name more.")
    weights = [1.0] * len(paths) if weights is None else weights
    if len(weights) != len(paths) or min(weights) <= 0:
        raise ConfigError(
            f"--weights: expected {len(paths)} numbers above 0, one for each adapter, got {len(weights)}."
        )
    inside = [folders_of(path) for path in paths]
    parts = [
        Part(folder, read_adapter(folder), weight)
        for folders, weight in zip(inside, weights, strict=True)
        for folder in folders
    ]
    return grouped(parts) if any(len(folders) > 1 for folders in inside) else {DEFAULT.name: parts}


def folders_of(path: Path, stem: str = "adapter") -> list[Path]:
    """A run's adapters, of all its experts; or else the path itself."""
    inside = [path / adapter_folder(stem, name) for name in (DEFAULT.name, "high", "low")]
    return [folder for folder in inside if folder.is_dir()] or [path]


def grouped(parts: Sequence[Part]) -> Groups:
    """Those for one network together. Raises ModelError for one beside adapters of two experts that is for neither."""
    groups: Groups = {}
    for part in parts:
        expert = part.adapter.metadata.get("weft.expert", DEFAULT.name)
        if expert == DEFAULT.name:
            raise ModelError(
                f"{part.path} does not say which expert it is for, and there are adapters of two. Merge those of each "
                "expert by themselves."
            )
        groups.setdefault(expert, []).append(part)
    return groups


def average(parents: Sequence[Part], rank: int | None = None) -> Sum:
    """The mean of the changes, exact, or of a given rank the nearest to it."""
    return summed(parents, provenance(parents, rank), rank)


def stacked(parts: Sequence[Part], rank: int | None = None, blocks: BlockStrengths | None = None) -> Sum:
    """The sum of the changes, exact, or of a given rank the nearest to it; a few-step student among them keeps its
    times. blocks: by which the parts were multiplied, for the header."""
    return summed(parts, provenance(parts, rank, "sum of changes", OF_ANY, blocks), rank)


def provenance(
    parents: Sequence[Part],
    rank: int | None,
    method: str = "average of changes",
    of_any: Sequence[str] = (),
    blocks: BlockStrengths | None = None,
) -> dict[str, str]:
    """What all parents say alike, of some keys what any says, the first one's config (for the family and the samples),
    and who the parents are."""
    headers = [parent.adapter.metadata for parent in parents]
    common = {key: value for key, value in headers[0].items() if all(h.get(key) == value for h in headers)}
    for header in headers[::-1]:
        common |= {key: header[key] for key in of_any if key in header}
    if "weft.config" in headers[0]:
        common["weft.config"] = headers[0]["weft.config"]
    who = [
        {
            "adapter": str(parent.path),
            "share": parent.weight,
            "rank": parent.adapter.rank,
            "scale": parent.adapter.scale,
            "run": json.loads(header.get("weft.config", "{}")).get("name"),
            **{key.removeprefix("weft."): header[key] for key in ("weft.step", "weft.data") if key in header},
        }
        for parent, header in zip(parents, headers, strict=True)
    ]
    told = {"method": method, "rank": rank, **({"blocks": str(blocks)} if blocks else {}), "parents": who}
    return {**common, "weft.merged": json.dumps(told)}


def write_merged(folder: Path, made: Mapping[str, SavedAdapter]) -> None:
    """Write adapters for PEFT, and those of a video model that others can hold for diffusers: one in the folder itself,
    those of two experts in adapter_high and adapter_low there. Raises ConfigError for a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} is there already and not empty. Name a new folder.")
    write_folder(folder, partial(_fill, made))


def _fill(made: Mapping[str, SavedAdapter], folder: Path) -> None:
    for expert, adapter in made.items():
        own = folder if len(made) == 1 else folder / adapter_folder("adapter", expert)
        PeftFolder().write(own, adapter)
        if adapter.kind == "lora" and medium_of(adapter) == "video":
            DiffusersFile().write(own, adapter)


def medium_of(adapter: SavedAdapter) -> str:
    """video or text: as its header says, else as the layers are called that it stands on."""
    named = plugins.section_types("family").get(adapter.metadata.get("weft.family", ""))
    if named is not None:
        return named.medium
    patterns = [CausalLM.targets[name] for name in ("attention", "mlp")]
    decoder = any(re.fullmatch(pattern, path) for pattern in patterns for path in adapter.paths)
    return "text" if decoder else "video"


def _refuse_other_kinds(parent: Part) -> None:
    adapter = parent.adapter
    if adapter.kind != "lora" or adapter.dora:
        raise ModelError(
            f"{parent.path} is of kind {kind_of(adapter)}, and the mean of several such changes is none of that kind. "
            "Only LoRA adapters can be averaged."
        )


def _refuse_other_layers(first: Part, other: Part) -> None:
    ours, theirs = first.adapter, other.adapter
    if odd := sorted(set(ours.paths) ^ set(theirs.paths)):
        where = other.path if odd[0] in theirs.paths else first.path
        raise ModelError(
            f"{first.path} and {other.path} stand on other layers: {len(odd)} are in one alone, such as '{odd[0]}' in "
            f"{where}. Average adapters that were trained with the same adapter.targets."
        )


def _refuse_half_a_student(parents: Sequence[Part]) -> None:
    """Half of a few-step student's change needs as many steps as the base does."""
    steps = common_step_list([(parent.path, parent.adapter) for parent in parents])
    others = [parent.path for parent in parents if STEP_LIST not in parent.adapter.metadata]
    if steps is not None and others:
        raise ModelError(
            f"{others[0]} is no few-step student, and another one here is, for {len(steps.times)} steps: their average "
            "would be neither. Add them up: weft merge --stack."
        )


def _refuse_strangers(first: Part, other: Part) -> None:
    for key, what in (("weft.base", "on other base weights"), ("weft.expert", "for another expert")):
        values = [parent.adapter.metadata.get(key) for parent in (first, other)]
        if None not in values and values[0] != values[1]:
            raise ModelError(
                f"{other.path} was trained {what} than {first.path} ({key} in their files: {values[1]} and "
                f"{values[0]}), so their changes do not add up."
            )
