"""Small random networks of every family, with the widths of heads that releases have where files must tell them."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel


def randomized(module: nn.Module, seed: int = 0) -> Any:
    """Every tensor random, so that none can stand in for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.requires_grad_(False).eval()


def wan(channels: int = 16, clip: bool = False, layers: int = 2, out: int = 16, **change: Any) -> WanTransformer3DModel:
    """One head of 128."""
    config: dict[str, Any] = {
        "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": channels, "out_channels": out,
        "text_dim": 32, "freq_dim": 32, "ffn_dim": 192, "num_layers": layers, "cross_attn_norm": True,
        "image_dim": 24 if clip else None, "added_kv_proj_dim": 128 if clip else None,
    }  # fmt: skip
    return randomized(WanTransformer3DModel(**{**config, **change}))


def hunyuan(**change: Any) -> HunyuanVideoTransformer3DModel:
    """Two heads of 32."""
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 16, "rope_axes_dim": (4, 14, 14),
        "guidance_embeds": True,
    }  # fmt: skip
    return randomized(HunyuanVideoTransformer3DModel(**{**config, **change}))


def vae_2_1() -> AutoencoderKLWan:
    return randomized(AutoencoderKLWan(base_dim=4, z_dim=16))


def vae_2_2() -> AutoencoderKLWan:
    return randomized(
        AutoencoderKLWan(
            base_dim=4, decoder_base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
            scale_factor_spatial=16, scale_factor_temporal=4,
        )
    )  # fmt: skip


def umt5() -> UMT5EncoderModel:
    config = UMT5Config(
        d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    return randomized(UMT5EncoderModel(config))


def clip_vision() -> CLIPVisionModel:
    """One head of 80."""
    return randomized(
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=80, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, image_size=28,
                patch_size=14, hidden_act="gelu",
            )
        )
    )  # fmt: skip


def wan_inputs(network: WanTransformer3DModel, items: int = 2) -> dict[str, Any]:
    """A question to a Wan transformer."""
    config: Any = network.config
    torch.manual_seed(3)
    image = torch.randn(items, 5, config.image_dim) if config.image_dim else None
    return {
        "hidden_states": torch.randn(items, config.in_channels, 3, 4, 6),
        "timestep": torch.rand(items) * 1000,
        "encoder_hidden_states": torch.randn(items, 7, config.text_dim),
        "encoder_hidden_states_image": image,
        "return_dict": False,
    }


def hunyuan_inputs(network: HunyuanVideoTransformer3DModel, items: int = 1) -> dict[str, Any]:
    """A question to a HunyuanVideo transformer."""
    config: Any = network.config
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(items, config.in_channels, 2, 4, 4),
        "timestep": torch.rand(items) * 1000,
        "encoder_hidden_states": torch.randn(items, 5, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(items, 5),
        "pooled_projections": torch.randn(items, config.pooled_projection_dim),
        "guidance": torch.full((items,), 1000.0),
        "return_dict": False,
    }
