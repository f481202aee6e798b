"""What the formats of one file have in common: whom they refuse, where they write, what their headers say."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from weft.errors import ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.foreign import read_foreign
from weft.formats.fused import official_layers
from weft.formats.keys import NAMES
from weft.formats.kohya_header import kohya_header, tensor_hashes
from weft.formats.layers import Layer, layers_of, without_scale
from weft.formats.sniff import STALE, sniff
from weft.formats.tensor_file import write_tensors
from weft.names.modules import FAMILIES, Modules, family_of, modules

LARGEST_MAP = 64_000  # bytes of the names that are kept in a header
WORDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}


def file_at(target: Path, usual: str) -> Path:
    """The file to write: the target itself, or in a folder the one with the format's usual name."""
    return target if target.suffix == ".safetensors" else target / usual


def refuse_kind(
    adapter: SavedAdapter, style: str, holds: tuple[str, ...], why: str = "", also: tuple[str, ...] = ()
) -> None:
    """Raise ModelError for an adapter of a kind that a format cannot hold. also: what it holds as a kind of LoRA."""
    kind = "dora" if adapter.dora else adapter.kind
    if kind not in (*holds, *also):
        held = " and ".join(", ".join(WORDS[each] for each in holds).rsplit(", ", 1))
        raise ModelError(
            f"the {style} format holds {held} alone, and this adapter's kind is {WORDS[kind]}{why}; write --to peft, "
            "or merge it into the base: weft merge ADAPTER --into BASE."
        )


def refuse_convolutions(adapter: SavedAdapter, style: str, program: str) -> None:
    """Raise ModelError for an adapter of a convolution, for a program that cannot load one."""
    if adapter.conv_rank:
        path = next(p for p in adapter.paths if adapter.tensors[f"{p}.lora_A.weight"].dim() > 2)
        raise ModelError(
            f"the {style} format holds linear layers alone, since {program} loads no LoRA of a convolution, and this "
            f"one adapts '{path}'; write --to comfyui."
        )


def refuse_language_models(adapter: SavedAdapter, style: str) -> None:
    """Raise ModelError for a language model's adapter, for a format whose programs know video models alone."""
    if "causal-lm" in (adapter.metadata.get("weft.family"), family_of(adapter.paths)):
        raise ModelError(
            f"the {style} format is for video models, and this is the adapter of a language model; write --to peft, "
            "which transformers, vLLM and PEFT load."
        )


def known_modules(adapter: SavedAdapter, style: str) -> Modules:
    """The modules of the adapter's model. Raises ModelError for a language model's adapter, and for unknown models."""
    paths = adapter.paths
    family = adapter.metadata.get("weft.family") or family_of(paths)
    refuse_language_models(adapter, style)
    for each in (family, *FAMILIES):
        if each in FAMILIES and all(path in modules(each).official for path in paths):
            return modules(each)
    if family in FAMILIES:
        return modules(family)  # which says what it does not know
    raise ModelError(
        f"the {style} format is for Wan and HunyuanVideo, and '{paths[0]}' is a layer of neither; write --to peft."
    )


def written_layers(adapter: SavedAdapter, known: Modules | None) -> list[Layer]:
    """The layers as other programs want them: under official names, or canonical ones where known is None."""
    layers = list(layers_of(adapter))
    if adapter.kind == "lokr":
        layers = [without_scale(layer) for layer in layers]
    return layers if known is None else official_layers(layers, adapter.kind, known)


def write_file(
    path: Path,
    adapter: SavedAdapter,
    tensors: Mapping[str, Tensor],
    network_module: str = "",
    names: Mapping[str, str] | None = None,
    implementation: str | None = None,
    more: Mapping[str, str] = {},
) -> Path:
    """Write tensors with the adapter's provenance and kohya's words for it. names: with underscores -> with dots.
    more: entries of the header that the format has of its own."""
    kept = {key: value for key, value in adapter.metadata.items() if key not in STALE}
    metadata = {**kept, **kohya_header(adapter, network_module, implementation), **more}
    written = json.dumps(names, separators=(",", ":")) if names else ""
    if written and len(written) < LARGEST_MAP:
        metadata[NAMES] = written
    separate = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_tensors(path, separate, {**metadata, **tensor_hashes(separate, metadata)})
    return path


def read_file(path: Path, style: str) -> SavedAdapter:
    """Read a file or folder of one format. Raises ModelError for another format."""
    found = sniff(path)
    if found.format != style:
        raise ModelError(f"{path} is a {found.format} adapter, not one in {style} format.")
    return read_foreign(found.weights)
