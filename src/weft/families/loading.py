"""Finding and identifying the files of a base model in diffusers' folder layout, without reading the weights."""

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from weft.errors import ModelError, did_you_mean

SHIPPED = {"tiny-wan": "demo/tiny_wan"}  # small pre-trained models inside the package, by the name of their source
SAMPLED_BLOCKS = 64  # of a weight file, for its fingerprint
BLOCK_BYTES = 1 << 16
FILE_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def model_folder(source: str) -> Path:
    """The folder of a source: a path, or the name of a model that Weft ships. Raises ModelError."""
    if source in SHIPPED:
        return Path(str(files("weft"))) / SHIPPED[source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(
            f"family.source: '{source}' is a file. A folder in diffusers layout was expected "
            "(transformer/, vae/, text_encoder/, tokenizer/, scheduler/)."
        )
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    raise ModelError(
        f"family.source: there is no folder '{source}' (looked from {Path.cwd()}). "
        f"{did_you_mean(folder.name, [*siblings, *SHIPPED])}"
    )


def read_config(folder: Path, part: str, expected_class: str) -> dict[str, Any]:
    """A part's config.json. Raises ModelError when the part is missing, damaged, or another class."""
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
    if found != expected_class:
        raise ModelError(
            f"family: {path} describes a {found}, but the config's family expects a {expected_class}. "
            "Choose the family of that model, or another source."
        )
    return config


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a part, sorted and whole. Raises ModelError when there are none, or not all of them."""
    found = sorted((folder / part).glob("*.safetensors"))
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
            header = json.loads(file.read(length))
        except ValueError as damaged:
            raise ModelError(f"{path}: the safetensors header is damaged. Fetch the file again.") from damaged
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ModelError(
            f"{path}: cut off or padded: {size} bytes, {8 + length + max(ends, default=0)} expected. Fetch it again."
        )
    return header


def stored_dtype(folder: Path, part: str) -> str:
    """fp32, bf16 or fp16: the precision of most bytes in a part's weight files; norms are often kept wider.

    Raises ModelError for any other.
    """
    sizes: dict[str, int] = {}
    for path in weight_files(folder, part):
        for name, entry in safetensors_header(path).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - start
    most = max(sizes, key=lambda name: sizes[name])
    if most not in FILE_DTYPES:
        raise ModelError(f"{folder / part}: weights in {most}. This version of Weft reads F32, BF16 and F16.")
    return FILE_DTYPES[most]


def fingerprint(folder: Path, *parts: str) -> str:
    """Identity of the parts' weights and configs: their sizes, headers and 64 blocks spread over each weight file.
    Raises ModelError for a weight file that was cut off.

    Reading 11 GB of text encoder at each start would cost a minute; a changed weight file differs in almost every
    block, so the sample finds it.
    """
    digest = sha256()
    for part in parts:
        for path in sorted(p for p in (folder / part).iterdir() if p.is_file()):
            if path.suffix == ".safetensors":
                safetensors_header(path)  # a file that was cut off is refused here, before hours of encoding
            size = path.stat().st_size
            digest.update(f"{part}/{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                step = max(BLOCK_BYTES, size // SAMPLED_BLOCKS)
                for start in range(0, size, step):
                    file.seek(start)
                    digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]
