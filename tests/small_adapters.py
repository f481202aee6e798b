"""Adapters with random weights on the layers of small networks, as after training: none is zero."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from weft.formats.adapter_file import SavedAdapter

BLOCKS = r"((single_)?transformer_)?blocks\.\d+\..*"  # linear layers of the blocks of Wan and HunyuanVideo


def lora_on(
    network: nn.Module, pattern: str = BLOCKS, rank: int = 3, alpha: float = 5.0, seed: int = 0, **facts: Any
) -> SavedAdapter:
    """A LoRA, rsLoRA or DoRA on the linear layers whose whole names fit a pattern."""
    chance = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name):
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=chance) / rank
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=chance) / 8
            if facts.get("dora"):
                lengths = layer.weight.detach().norm(dim=1)
                change = 0.8 + 0.4 * torch.rand(lengths.shape, generator=chance)
                tensors[f"{name}.lora_magnitude_vector"] = lengths * change
    return SavedAdapter(tensors, rank, alpha, **facts)


def loha_on(network: nn.Module, pattern: str = BLOCKS, rank: int = 2, alpha: float = 3.0) -> SavedAdapter:
    chance = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name):
            for half in ("w1", "w2"):
                tensors[f"{name}.hada_{half}_a"] = torch.randn(layer.out_features, rank, generator=chance) / 4
                tensors[f"{name}.hada_{half}_b"] = torch.randn(rank, layer.in_features, generator=chance)
    return SavedAdapter(tensors, rank, alpha, kind="loha")


def lokr_on(network: nn.Module, pattern: str = BLOCKS, rank: int = 1, alpha: float = 3.0) -> SavedAdapter:
    """With a factor of 4, the first half whole and the second of two factors."""
    chance = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name):
            tensors[f"{name}.lokr_w1"] = torch.randn(4, 4, generator=chance)
            tensors[f"{name}.lokr_w2_a"] = torch.randn(layer.out_features // 4, rank, generator=chance) / 8
            tensors[f"{name}.lokr_w2_b"] = torch.randn(rank, layer.in_features // 4, generator=chance)
    options = {"decompose_factor": 4, "decompose_both": False}
    return SavedAdapter(tensors, rank, alpha, kind="lokr", options=options)
