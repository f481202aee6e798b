"""The file that ComfyUI loads: official names behind `diffusion_model.`, and an alpha for each layer."""

from pathlib import Path

import torch

from weft.formats.adapter_file import SavedAdapter
from weft.formats.single_file import file_at, known_modules, read_file, refuse_kind, write_file, written_layers

NO_DORA = (
    ", whose rows ComfyUI would divide by their lengths in the base (comfy/weight_adapter/base.py), where DoRA divides "
    "by those of the changed rows"
)


class ComfyUiFile:
    """Keys `diffusion_model.OFFICIAL.lora_A.weight` and `.alpha`; LoHa and LoKr by LyCORIS's names.

    Source: ComfyUI's comfy/lora.py (model_lora_keys_unet) and comfy/weight_adapter. diffusers loads it too, where it
    adapts blocks of Wan alone.
    """

    file: str | None = "lora_comfyui.safetensors"

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write a file, or one into a folder; returns it. Raises ModelError for a DoRA or OFT."""
        refuse_kind(adapter, "comfyui", ("lora", "loha", "lokr"), NO_DORA if adapter.dora else "")
        known = known_modules(adapter, "comfyui")
        tensors = {}
        for layer in written_layers(adapter, known):
            path = f"diffusion_model.{known.comfyui(layer.name)}"
            tensors |= {path + end: tensor for end, tensor in layer.tensors.items()}
            tensors[f"{path}.alpha"] = torch.tensor(layer.alpha or 1.0, dtype=torch.float32)
        return write_file(file_at(target, str(self.file)), adapter, tensors)

    def read(self, path: Path) -> SavedAdapter:
        """Read such a file, or the folder that holds it."""
        return read_file(path, "comfyui")
