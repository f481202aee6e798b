"""The way from two checkpoints on the disk to an adapter file: opened, checked, extracted, told apart, written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weft import __version__, plugins
from weft.adapters.targets import match_targets
from weft.durable import write_folder
from weft.errors import ConfigError, ModelError
from weft.families.hunyuan_video import aliases_of
from weft.formats.adapter_file import SavedAdapter
from weft.run.base_weights import BaseWeights, open_weights
from weft.run.exporting import OF_PEFT
from weft.run.extract import Extraction, Rule, extract
from weft.run.folder import environment

DEFAULT_TARGETS: Mapping[str, Sequence[str]] = {
    "wan": ("attention+ffn",),
    "hunyuan-video": ("attention+ffn",),
    "causal-lm": ("attention", "mlp"),
}


@dataclass(frozen=True)
class Pair:
    """A base model, one that was made from it, and the paths of the layers that an adapter may stand on."""

    base: BaseWeights
    tuned: BaseWeights
    targets: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """What is known of the files that makes the difference another one than training made."""
        return [
            f"{one.path} is in {one.precision}: what that lost of its numbers goes into the difference too."
            for one in (self.base, self.tuned)
            if one.precision.startswith("fp8")
        ]


def open_pair(base: str, tuned: str, expert: str | None = None, targets: Sequence[str] = ()) -> Pair:
    """Two models by their headers. targets: patterns as in adapter.targets; none: the family's attention and MLPs.

    Raises: ModelError for files that cannot be compared, ConfigError for targets that match nothing.
    """
    one, other = open_weights(base, expert), open_weights(tuned, expert)
    if bare := [name for name in other.shapes if other.source.in_8_bits(name) and not other.decoded(name)]:
        raise ModelError(
            f"{tuned} is in fp8 without scales ('{bare[0]}'): its rounding is far larger than what training changes. "
            "Name the tuned model in bf16, fp16 or fp32."
        )
    return Pair(one, other, target_paths(one, targets or DEFAULT_TARGETS[one.family]))


def target_paths(base: BaseWeights, patterns: Sequence[str]) -> tuple[str, ...]:
    """The linear layers of a network that patterns name. Raises ConfigError."""
    layers = {path: base.shapes[f"{path}.weight"] for path in base.linear}
    family = plugins.find("family", base.family)
    aliases = dict(aliases_of(64, 64)) if base.family == "hunyuan-video" else family.aliases
    try:
        return match_targets(patterns, (), layers, family.targets, aliases).paths
    except ConfigError as error:
        raise ConfigError(*(each.replace("adapter.targets:", "--targets:") for each in error.problems)) from error


def extracted(
    pair: Pair, rule: Rule, device: torch.device, seen: Callable[[str], None] = lambda name: None
) -> Extraction:
    """The adapter of a pair, with where it comes from in its header. Raises ModelError."""
    made = extract(pair.base, pair.tuned, pair.targets, rule, device, seen)
    for one in (pair.base, pair.tuned):
        one.close()
    return replace(made, adapter=replace(made.adapter, metadata=provenance(pair, rule, made)))


def provenance(pair: Pair, rule: Rule, made: Extraction) -> dict[str, str]:
    """Safetensors metadata: the keys of a trained adapter, and what was taken from which files by which rule."""
    base, tuned = pair.base, pair.tuned
    facts: dict[str, Any] = {
        "base": {"path": base.path, "identity": base.identity, "precision": base.precision},
        "tuned": {"path": tuned.path, "identity": tuned.identity, "precision": tuned.precision},
        "rank": rule.most if rule.share is None else {"energy": rule.share, "most": rule.most},
        "layers": len(made.layers),
        "captured": made.captured,
        "captured_of_all": made.captured_of_all,
        "left_out": {kind: {"tensors": len(of.names), "norm": of.energy**0.5} for kind, of in made.left_out.items()},
    }
    return {
        "weft.version": __version__,
        "weft.versions": json.dumps(environment("cpu")["versions"]),
        "weft.extracted": json.dumps(facts),
        "weft.base": base.identity,
        "weft.family": base.family,
        "weft.expert": base.expert or "default",
        "base_model": base.path,
    }


def check_place(out: Path, formats: Sequence[str], overwrite: bool) -> None:
    """Raises ConfigError for a place that is taken, or that the formats cannot be written to."""
    if out.suffix == ".safetensors" and list(formats) == ["peft"]:
        raise ConfigError(f"--out: PEFT's format is a folder, and '{out}' is a file's name. Name a folder.")
    if out.suffix == ".safetensors" and len(formats) > 1:
        raise ConfigError(f"--out: {len(formats)} formats go into a folder, and '{out}' is a file's name.")
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not overwrite:
        raise ConfigError(f"--out: {out} is there already. Name another place, or write --overwrite.")
    written = {plugins.find("format", name)().file for name in plugins.table("format")} | OF_PEFT
    others = {path.name for path in out.iterdir()} - written if out.is_dir() else set()
    if others:
        raise ConfigError(
            f"--out: {out} holds more than an adapter, such as {min(others)}, and all of it would go. "
            "Name another place."
        )


def write_extracted(out: Path, adapter: SavedAdapter, formats: Sequence[str]) -> None:
    """Write the adapter: a folder in all of the formats, or one file."""
    if out.suffix == ".safetensors":
        plugins.find("format", formats[0])().write(out, adapter)
    else:
        write_folder(out, partial(_fill, adapter, formats))


def _fill(adapter: SavedAdapter, formats: Sequence[str], folder: Path) -> None:
    for name in formats:
        plugins.find("format", name)().write(folder, adapter)
