"""One adapter of several: the average of the changes that they make, or their sum."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from weft import plugins
from weft.durable import write_folder
from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import CausalLM
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.assemble import find_adapter
from weft.run.summed import Part, Sum, common_step_list, kind_of, refuse_other_sizes, refuse_without_sum, summed

# Of a sum's header, what the first parent that says it says: where they can differ, other things refuse it.
OF_ANY = ("weft.config", "weft.base", "weft.expert", "weft.times", "weft.family", "base_model", STEP_LIST)


def read_parents(paths: Sequence[Path], weights: Sequence[float] | None) -> list[Part]:
    """The adapters at paths (or of the runs there) and their shares, which sum to 1. Raises WeftError for those that
    have no common average."""
    parents = _read(paths, weights, "average")
    whole = sum(parent.weight for parent in parents)
    for parent in parents:
        _refuse_other_kinds(parent)
        _refuse_other_layers(parents[0], parent)
        refuse_other_sizes(parents[0], parent)
        _refuse_strangers(parents[0], parent)
    _refuse_half_a_student(parents)
    return [Part(parent.path, parent.adapter, parent.weight / whole) for parent in parents]


def read_summands(paths: Sequence[Path], weights: Sequence[float] | None) -> list[Part]:
    """The adapters at paths (or of the runs there) and how much each counts, 1 where no weights are given. Raises
    WeftError for those that have no sum."""
    parts = _read(paths, weights, "stack")
    refuse_without_sum(parts)
    common_step_list([(part.path, part.adapter) for part in parts])
    for first in parts:
        for other in parts:
            _refuse_strangers(first, other)
    return parts


def _read(paths: Sequence[Path], weights: Sequence[float] | None, option: str) -> list[Part]:
    if len(paths) < 2:
        what = {"average": "an average", "stack": "a sum"}[option]
        raise ConfigError(f"--{option}: {what} needs two adapters at least. Name more.")
    weights = [1.0] * len(paths) if weights is None else weights
    if len(weights) != len(paths) or min(weights) <= 0:
        raise ConfigError(
            f"--weights: expected {len(paths)} numbers above 0, one for each adapter, got {len(weights)}."
        )
    found = [find_adapter(path) for path in paths]
    return [Part(path, read_adapter(path), weight) for path, weight in zip(found, weights, strict=True)]


def average(parents: Sequence[Part], rank: int | None = None) -> Sum:
    """The mean of the changes, exact, or of a given rank the nearest to it."""
    return summed(parents, provenance(parents, rank), rank)


def stacked(parts: Sequence[Part], rank: int | None = None) -> Sum:
    """The sum of the changes, exact, or of a given rank the nearest to it; a few-step student among them keeps its
    times."""
    return summed(parts, provenance(parts, rank, "sum of changes", OF_ANY), rank)


def provenance(
    parents: Sequence[Part], rank: int | None, method: str = "average of changes", of_any: Sequence[str] = ()
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
    return {**common, "weft.merged": json.dumps({"method": method, "rank": rank, "parents": who})}


def write_merged(folder: Path, adapter: SavedAdapter) -> None:
    """Write the adapter for PEFT, and one of a video model for diffusers. Raises ConfigError for a folder that holds
    something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} is there already and not empty. Name a new folder.")
    write_folder(folder, partial(_fill, adapter))


def _fill(adapter: SavedAdapter, folder: Path) -> None:
    PeftFolder().write(folder, adapter)
    if medium_of(adapter) == "video":
        DiffusersFile().write(folder, adapter)


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
