"""The header of a GGUF file: facts, and the tensors with their shapes and types, without a library and without numbers.

Layout: ggml-org/ggml, docs/gguf.md; the numbers of the types: ggml/include/ggml.h.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weft.errors import ModelError

MAGIC = b"GGUF"
MOST = 1 << 24  # facts, tensors or items of a list, and bytes of a text: more are a damaged file
DIMENSIONS = 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
SHAPE_KEY = "comfy.gguf.orig_shape."  # city96/ComfyUI-GGUF keeps here the shapes that GGUF's dimensions cannot hold


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file says. tensors: name -> (type, shape as PyTorch has it). facts: without long lists."""

    version: int
    facts: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def architecture(self) -> str:
        """Such as wan, hyvid, llama; empty where the file does not say."""
        return str(self.facts.get("general.architecture", ""))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file. Raises ModelError for a damaged one."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except (struct.error, ValueError, KeyError) as damaged:
        raise ModelError(f"{path}: the GGUF header is damaged or cut off ({damaged}). Fetch the file again.") from None


def _read(file: BinaryIO) -> Gguf:
    if file.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, tensors, facts = _unpack(file, "IQQ")
    if version < 2 or max(tensors, facts) > MOST:
        raise ValueError(f"version {version}, {tensors} tensors, {facts} facts")
    said = dict(_fact(file) for _ in range(facts))
    return Gguf(version, said, dict(_tensor(file, said) for _ in range(tensors)))


def _fact(file: BinaryIO) -> tuple[str, Any]:
    return _text(file), _value(file, _unpack(file, "I")[0])


def _value(file: BinaryIO, kind: int) -> Any:
    """A scalar or a text; of a list how long it is, for it may be the words of a tokenizer, unless it is short."""
    if kind == TEXT:
        return _text(file)
    if kind != LIST:
        return _unpack(file, SCALARS[kind])[0]
    inner, count = _unpack(file, "IQ")
    if count > MOST:
        raise ValueError(f"a list of {count}")
    items = [_value(file, inner) for _ in range(count)]
    return items if count <= DIMENSIONS else f"{count} items"


def _tensor(file: BinaryIO, facts: Mapping[str, Any]) -> tuple[str, tuple[str, tuple[int, ...]]]:
    name = _text(file)
    (count,) = _unpack(file, "I")
    if count > DIMENSIONS:
        raise ValueError(f"{count} dimensions")
    dimensions = _unpack(file, "Q" * count)
    kind, _ = _unpack(file, "IQ")
    shape = facts.get(SHAPE_KEY + name) or dimensions[::-1]  # theirs begin with the fastest
    return name, (TYPES.get(kind, f"type {kind}"), tuple(shape))


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > MOST:
        raise ValueError(f"a text of {length} bytes")
    raw = file.read(length)
    if len(raw) < length:
        raise ValueError("a text is cut off")
    return raw.decode(errors="replace")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    """Numbers in little endian, without padding."""
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
