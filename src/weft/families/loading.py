"""Finding and identifying the files of a base model without reading the weights."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from hashlib import _Hash as HASH

SHIPPED = {"tiny-wan": "demo/tiny_wan"}  # small pre-trained models inside the package, by the name of their source
SUFFIX = ".drawn"  # of lists of weights that no file holds, see drawn.py
SAMPLED_BLOCKS = 64  # of a weight file, for its fingerprint
BLOCK_BYTES = 1 << 16


def model_folder(source: str) -> Path:
    """The folder of a source: a path, or the name of a model that Weft ships. Raises ModelError."""
    if source in SHIPPED:
        return Path(str(files("weft"))) / SHIPPED[source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    beside = folder.parent.iterdir() if folder.parent.is_dir() else []
    siblings = [path.name for path in beside if path.suffix == ".safetensors" or (path / "transformer").is_dir()]
    raise ModelError(
        f"family.source: there is no folder or file '{source}' (looked from {Path.cwd()}). "
        f"{did_you_mean(folder.name, [*siblings, *SHIPPED])}"
    )


def read_config(folder: Path, part: str, expected_class: str) -> dict[str, Any]:
    """A part's config.json. Raises ModelError when the part is missing, damaged, or another class than the
    expected one (empty: any)."""
    path = folder / part / "config.json"
    if not path.is_file():
        parts = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise ModelError(
            f"family.source: {folder} has no '{part}/config.json'. It holds: {', '.join(parts) or 'no folders'}. "
            "A folder in diffusers layout was expected."
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as damaged:
        raise ModelError(f"{path}: not valid JSON ({damaged}). Fetch the file again.") from damaged
    found = config.get("_class_name", (config.get("architectures") or ["nothing"])[0])
    if expected_class and found != expected_class:
        raise ModelError(
            f"family: {path} describes a {found}, but the config's family expects a {expected_class}. "
            "Choose the family of that model, or another source."
        )
    return config


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a part, sorted and whole. Raises ModelError when there are none, or not all of them."""
    found = sorted((folder / part).glob("*.safetensors"))
    if not found and (drawn := sorted((folder / part).glob(f"*{SUFFIX}"))):
        return drawn
    if not found:
        raise ModelError(
            f"{folder / part} has no .safetensors file. Weft reads weights from safetensors only; "
            "fetch them, or convert .bin or .pth files first."
        )
    for index in (folder / part).glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {path.name for path in found})
        if missing:
            raise ModelError(f"{index}: {len(missing)} of its {len(named)} files are not there, first {missing[0]}.")
    for path in found:
        safetensors_header(path)
    return found


def safetensors_header(path: Path) -> Mapping[str, Any]:
    """Names, dtypes, shapes and offsets in a safetensors file, read from its head alone. Raises ModelError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ModelError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes).")
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError, RecursionError) as damaged:
            raise ModelError(f"{path}: the safetensors header is damaged. Fetch the file again.") from damaged
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ModelError(
            f"{path}: cut off or padded: {size} bytes, {8 + length + max(ends, default=0)} expected. Fetch it again."
        )
    return header


def sampled_digest(digest: "HASH", name: str, path: Path) -> None:
    """Add a file to an identity: name, size, 64 blocks spread over it. Raises ModelError for one that was cut off.

    Reading 11 GB of text encoder at each start would cost a minute; a changed weight file differs in almost every
    block, so the sample finds it.
    """
    if path.suffix == ".safetensors":
        safetensors_header(path)  # refused here, before hours of encoding
    size = path.stat().st_size
    digest.update(f"{name}:{size}\n".encode())
    with path.open("rb") as file:
        step = max(BLOCK_BYTES, size // SAMPLED_BLOCKS)
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
