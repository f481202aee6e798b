"""Small Wan networks to be made lean, questions to them, and adapters that say something."""

from typing import Any

import torch
from torch import nn

from tests.families.networks import wan, wan_inputs
from weft.adapters.lora import Lora
from weft.families.lean_wan import make_lean
from weft.families.precision import keep_fp32, keep_residual_fp32, widen
from weft.families.wan_network import keeps_fp32

HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 12, "ffn_dim": 96}
TEXT_TO_VIDEO: dict[str, Any] = {**HEADS, "layers": 3}


def question(network: Any, items: int = 2) -> dict[str, Any]:
    inputs = wan_inputs(network, items)
    if network.config.image_dim:  # the tokens before the last 512 are the picture's
        inputs["encoder_hidden_states"] = torch.randn(items, 512, 32)
    return inputs


def adapted(network: nn.Module, paths: list[str], **recipe: Any) -> Any:
    options: dict[str, Any] = {"rank": 2, **recipe}
    adapters = Lora(**options).attach(network, paths, ["default"], 0)
    adapters.initialize()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters("default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapters


def prepared(dtype: torch.dtype, lean: bool) -> Any:
    """A network as a family loads it in half precision."""
    network: Any = wan(**TEXT_TO_VIDEO)
    network = network.to(dtype)
    widen(network, keeps_fp32)
    keep_fp32(network.condition_embedder)
    keep_residual_fp32(network.patch_embedding)
    if lean:
        make_lean(network)
    return network
