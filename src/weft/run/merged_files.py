"""Weight files of a base written anew with adapters in them: the same tensors in the same order, piece by piece."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from weft.errors import ModelError
from weft.families.loading import safetensors_header
from weft.families.storage import FULL
from weft.families.stored import DTYPE_NAMES, DTYPES, Entry
from weft.families.weights import MARKERS, NOTES, Source
from weft.run.merged_weights import Edits, plain_pieces, row_numbers, stored_rows, wide_rows

Progress = Callable[[int], None]  # bytes that were just written
FLOATING = ("F64", "F32", "BF16", "F16")
IN_8_BITS = ("F8_E4M3", "F8_E5M2")
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # of the numbers before
QUANTIZATION = "_quantization_metadata"  # in which ComfyUI tells the layers that are kept in 8 bits
COMPARED_ROWS = 16
# Where the same sums are taken in pieces of another size, they may be rounded to the neighbour.
ROUNDING = {"F32": 1e-5, "BF16": 2**-7, "F16": 2**-9, "F64": 1e-5}


@dataclass(frozen=True)
class MergedFile:
    """A weight file as it is to be written. dtype: bf16, fp16 or fp32, of the weights; None keeps each as it is.

    metadata: what is added to the header.
    """

    path: Path  # of the base's own file
    source: Source
    edits: Edits
    dtype: str | None
    metadata: Mapping[str, str]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The tensors that are written, in the order of the base's file, with the dtypes that they get."""
        held = {name: e for name, e in self.source.weights.entries.items() if e.file == self.path}
        ordered = sorted(held, key=lambda name: held[name].start)
        kept = [name for name in ordered if not (self.decodes and self._of_8_bits_alone(name))]
        return {name: Entry(self._dtype(name), held[name].shape, self.path) for name in kept}

    @cached_property
    def decodes(self) -> bool:
        """Whether weights in 8 bits are written in a full precision."""
        return self.dtype is not None and any(e.dtype in IN_8_BITS for e in self.source.weights.entries.values())

    @property
    def data_bytes(self) -> int:
        return sum(bytes_of(entry) for entry in self.entries.values())

    def _of_8_bits_alone(self, name: str) -> bool:
        return (
            name in self.source.scales.values() or name.endswith(NOTES) or name.rpartition(".")[2] in MARKERS
        )  # fmt: skip

    def _dtype(self, name: str) -> str:
        """Weights of two dimensions and more change their precision; norms, biases and modulations keep their own."""
        entry = self.source.weights.entries[name]
        wide = entry.dtype in FLOATING and len(entry.shape) > 1 and name.endswith(".weight")
        if self.dtype is not None and (wide or entry.dtype in IN_8_BITS):
            return DTYPE_NAMES[FULL[self.dtype]]
        return entry.dtype

    # ---- Writing --------------------------------------------------------------------------------------------------

    def write(self, target: Path, tell: Progress) -> None:
        """Write it to a path. Raises ModelError for a change that is not finite in the file's precision."""
        with target.open("wb") as file:
            file.write(self._header())
            for name in self.entries:
                for part in self._parts(name):
                    tell(file.write(raw(part)))

    def _header(self) -> bytes:
        told = self._metadata() | dict(self.metadata)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **told}}
        start = 0
        for name, entry in self.entries.items():
            end = start + bytes_of(entry)
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _metadata(self) -> dict[str, str]:
        if self.path.suffix != ".safetensors":
            return {}
        told = dict(safetensors_header(self.path).get("__metadata__", {}))
        gone = (*STALE, *((QUANTIZATION,) if self.decodes else ()))
        return {key: value for key, value in told.items() if key not in gone}

    def _parts(self, name: str) -> Iterator[Tensor]:
        stored, written = self.source.weights.entries[name], self.entries[name]
        if name not in self.edits:
            if stored.dtype == written.dtype:
                yield from stored_rows(self.source.weights, name)
            else:
                yield from self._cast(name, 0, stored.shape[0] if stored.shape else 0)
            return
        at = 0
        for rows in self.edits[name]:
            yield from self._cast(name, at, rows.begin)
            for begin, end in rows.pieces(row_numbers(stored.shape)):
                yield self._changed(name, begin, end)
            at = rows.end
        yield from self._cast(name, at, stored.shape[0])

    def _cast(self, name: str, begin: int, end: int) -> Iterator[Tensor]:
        """Rows that no adapter changes."""
        stored, written = self.source.weights.entries[name], self.entries[name]
        if not stored.shape:
            yield wide_scalar(self.source, name).to(DTYPES[written.dtype])
            return
        for first, last in plain_pieces(stored.shape, begin, end):
            if stored.dtype == written.dtype:
                yield self.source.weights.read(name, ((first, last),))
            else:
                yield wide_rows(self.source, name, first, last).to(DTYPES[written.dtype])

    def _changed(self, name: str, begin: int, end: int) -> Tensor:
        """Changed rows [begin, end), summed in fp32 and rounded once."""
        rows = next(each for each in self.edits[name] if each.begin <= begin < each.end)
        made = rows.applied(wide_rows(self.source, name, begin, end), begin, end)
        dtype = DTYPES[self.entries[name].dtype]
        least, most = torch.aminmax(made)  # either is NaN where any number is
        if not (least >= torch.finfo(dtype).min and most <= torch.finfo(dtype).max):
            told = self.entries[name].dtype
            raise ModelError(
                f"{self.path}: '{name}' with the change in it has numbers that {told} cannot hold. The adapter or the "
                "base is damaged, or the precision too narrow: --dtype bf16."
            )
        return made.to(dtype)

    # ---- Checking -------------------------------------------------------------------------------------------------

    def check(self, written: Path) -> int:
        """Read some tensors of the written file with the safetensors library, and compare them with what they must be.
        Returns how many were compared. Raises ModelError for a difference."""
        edited = [name for name in self.entries if name in self.edits]
        kept = [name for name in self.entries if name not in self.edits]
        chosen = dict.fromkeys([*edited[:1], *edited[len(edited) // 2 :][:1], *edited[-1:], *kept[:1], *kept[-1:]])
        with safe_open(written, "pt") as file:
            for name in chosen:
                if not self._equal(name, file):
                    raise ModelError(
                        f"{written.name}: '{name}' does not read back as it was written. The disk or the memory of "
                        "this machine is at fault; nothing was kept. Merge again."
                    )
        return len(chosen)

    def _equal(self, name: str, file: safe_open) -> bool:
        entry = self.entries[name]
        if not entry.shape:
            return torch.equal(file.get_tensor(name), next(self._cast(name, 0, 0)))
        if name not in self.edits:
            begin = entry.shape[0] // 2
            end = min(begin + COMPARED_ROWS, entry.shape[0])
            found, ours = file.get_slice(name)[begin:end], torch.cat(list(self._cast(name, begin, end)))
            return found.dtype == ours.dtype and torch.equal(found.view(torch.uint8), ours.view(torch.uint8))
        rows = self.edits[name][-1]
        pieces = list(rows.pieces(row_numbers(entry.shape)))
        begin, end = pieces[len(pieces) // 2]
        end = min(end, begin + rows.step * -(-COMPARED_ROWS // rows.step))
        found, ours = file.get_slice(name)[begin:end], self._changed(name, begin, end)
        bound = ROUNDING[entry.dtype]
        near = bound * float(ours.abs().max())
        return found.dtype == ours.dtype and torch.allclose(found.float(), ours.float(), rtol=bound, atol=near)


def wide_scalar(source: Source, name: str) -> Tensor:
    return source.weights.read(name).float()


def bytes_of(entry: Entry) -> int:
    return prod(entry.shape) * DTYPES[entry.dtype].itemsize


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes in order."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
