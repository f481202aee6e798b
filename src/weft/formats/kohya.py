"""The files of musubi-tuner and VideoX-Fun: names with underscores, lora_down, lora_up and alpha."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weft.formats.adapter_file import A, B, SavedAdapter
from weft.formats.layers import Layer
from weft.formats.single_file import (
    file_at,
    known_modules,
    read_file,
    refuse_convolutions,
    refuse_kind,
    write_file,
    written_layers,
)

HALVES = {A: ".lora_down.weight", B: ".lora_up.weight"}
NETWORKS = {"wan": "networks.lora_wan", "hunyuan-video": "networks.lora"}


class MusubiFile:
    """Keys `lora_unet_OFFICIAL_WITH_UNDERSCORES.lora_down.weight`, for musubi-tuner, and for ComfyUI with Wan.

    Source: musubi-tuner's networks/lora.py, loha.py and lokr.py, whose LoKr has a whole w1.
    """

    file: str | None = "lora_musubi.safetensors"

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write a file, or one into a folder; returns it. Raises ModelError for kinds that musubi-tuner has not."""
        refuse_kind(adapter, "musubi", ("lora", "loha", "lokr"))
        refuse_convolutions(adapter, "musubi", "musubi-tuner")
        known = known_modules(adapter, "musubi")
        layers = [_with_whole_w1(layer) for layer in written_layers(adapter, known)]
        network = NETWORKS[known.family] if adapter.kind == "lora" else f"networks.{adapter.kind}"
        tensors, names = _underscored("lora_unet_", layers)
        return write_file(file_at(target, str(self.file)), adapter, tensors, network, names)

    def read(self, path: Path) -> SavedAdapter:
        """Read such a file, or the folder that holds it."""
        return read_file(path, "musubi")


class VideoXFunFile:
    """Keys `lora_unet__NAME_WITH_UNDERSCORES.lora_down.weight`, as VideoX-Fun's own LoRANetwork has them: official
    names of Wan, those of diffusers of HunyuanVideo, whose network is built so there.

    Source: VideoX-Fun's videox_fun/utils/lora_utils.py and models.
    """

    file: str | None = "lora_videox_fun.safetensors"

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write a file, or one into a folder; returns it. Raises ModelError for kinds that VideoX-Fun has not."""
        refuse_kind(adapter, "videox-fun", ("lora",))
        refuse_convolutions(adapter, "videox-fun", "VideoX-Fun")
        known = known_modules(adapter, "videox-fun")
        layers = written_layers(adapter, known if known.family == "wan" else None)
        tensors, names = _underscored("lora_unet__", layers)
        return write_file(file_at(target, str(self.file)), adapter, tensors, "", names)

    def read(self, path: Path) -> SavedAdapter:
        """Read such a file, or the folder that holds it."""
        return read_file(path, "videox-fun")


def _underscored(beginning: str, layers: Iterable[Layer]) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors by kohya's names, and which of those stands for which name with dots."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for layer in layers:
        plain = layer.name.replace(".", "_")
        names[plain] = layer.name
        tensors |= {f"{beginning}{plain}{HALVES.get(end, end)}": tensor for end, tensor in layer.tensors.items()}
        tensors[f"{beginning}{plain}.alpha"] = torch.tensor(layer.alpha or 1.0, dtype=torch.float32)
    return tensors, names


def _with_whole_w1(layer: Layer) -> Layer:
    if ".lokr_w1_a" not in layer.tensors:
        return layer
    tensors = dict(layer.tensors)
    a, b = tensors.pop(".lokr_w1_a"), tensors.pop(".lokr_w1_b")
    return Layer(layer.name, {".lokr_w1": (a.float() @ b.float()), **tensors}, layer.scale)
