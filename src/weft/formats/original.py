"""Bare official names with the whole scale in the weights, for loaders that know no alpha."""

from pathlib import Path

from weft.formats.adapter_file import B, SavedAdapter
from weft.formats.layers import multiplied
from weft.formats.single_file import file_at, known_modules, read_file, refuse_kind, write_file, written_layers


class OriginalFile:
    """Keys `blocks.0.self_attn.q.lora_A.weight`, whose B A is the change: for VideoX-Fun's `--use_peft_lora`, loaders
    of the official code and others that leave alpha out. B becomes fp32 where 16 bits would not hold the products."""

    file: str | None = "lora_original.safetensors"

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write a file, or one into a folder; returns it. Raises ModelError for other kinds than LoRA."""
        refuse_kind(adapter, "original", ("lora",))
        tensors = {}
        for layer in written_layers(adapter, known_modules(adapter, "original")):
            scaled = {**layer.tensors, B: multiplied(layer.tensors[B], layer.scale)}
            tensors |= {layer.name + end: tensor for end, tensor in scaled.items()}
        return write_file(file_at(target, str(self.file)), adapter, tensors)

    def read(self, path: Path) -> SavedAdapter:
        """Read such a file, or the folder that holds it."""
        return read_file(path, "original")
