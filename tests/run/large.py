"""Models of real sizes without their weights: config files, and weight files that are holes on the disk."""

import json
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

SIZES = {"1.3b": (30, 12, 8960), "14b": (40, 40, 13824)}  # blocks, heads, width of the feed-forward layers


def large_wan(folder: Path, small: Path, size: str = "1.3b", experts: bool = False) -> Path:
    """A folder in diffusers layout: transformers of a released size beside a small model's other parts."""
    layers, heads, ffn = SIZES[size]
    folder.mkdir(parents=True)
    for part in ("vae", "tokenizer", "text_encoder", "scheduler"):
        (folder / part).symlink_to(small / part)
    index = json.loads((small / "model_index.json").read_text())
    with torch.device("meta"):
        network = WanTransformer3DModel(num_layers=layers, num_attention_heads=heads, ffn_dim=ffn)
    parts = ("transformer", "transformer_2") if experts else ("transformer",)
    for part in parts:
        network.save_config(folder / part)
        write_hole(folder / part / "diffusion_pytorch_model.safetensors", network)
        index[part] = ["diffusers", "WanTransformer3DModel"]
    if experts:
        index["boundary_ratio"] = 0.875
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_hole(path: Path, network: torch.nn.Module) -> None:
    """A safetensors file of a network in bf16 whose numbers are all zeros and take no room."""
    header, start = {}, 0
    for name, tensor in network.state_dict().items():
        end = start + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
