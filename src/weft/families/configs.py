"""Configs of networks whose files bring none: from the shapes of their tensors, under diffusers' names."""

from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import Any

from weft.errors import ModelError
from weft.families.known import (
    CLIP_TEXT_L,
    CLIP_VISION_H,
    HEAD_WIDTH,
    HUNYUAN_NETWORK,
    LLAVA_LLAMA_3_8B,
    UMT5_XXL,
    VAES,
    VISION_HEAD_WIDTH,
)

Shapes = Mapping[str, tuple[int, ...]]


def wan(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of a WanTransformer3DModel. heads: where another file says how many; else each is 128 wide."""
    inner, channels, *patch = shapes["patch_embedding.weight"]
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    position = shapes.get("condition_embedder.image_embedder.pos_embed")
    heads = heads or _heads(inner, HEAD_WIDTH, label)
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": inner // heads,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": added[1] if added else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": position[1] if position else None,
    }


def hunyuan_video(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of a HunyuanVideoTransformer3DModel, whose norms show the width of a head."""
    inner, channels, time_patch, patch, _ = shapes["x_embedder.proj.weight"]
    width = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    if width % 16:
        raise ModelError(f"{label}: heads {width} wide are of no HunyuanVideo. Name its config in a .json beside it.")
    return {
        **HUNYUAN_NETWORK,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // (time_patch * patch * patch),
        "num_attention_heads": heads or inner // width,
        "attention_head_dim": width,
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": count(shapes, "context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / inner,
        "patch_size": patch,
        "patch_size_t": time_patch,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_axes_dim": [width // 8, 7 * width // 16, 7 * width // 16],
        "image_condition_type": None if channels == 16 else "latent_concat",
    }


def wan_vae(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of an AutoencoderKLWan; its constants are those of the release with as many channels."""
    channels = shapes["post_quant_conv.weight"][0]
    known = {16: "wan-2.1", 48: "wan-2.2"}.get(channels)
    if known is None:
        raise ModelError(
            f"{label}: an autoencoder of {channels} latent channels, whose normalisation is unknown. "
            "Wan 2.1 has 16, Wan 2.2 has 48. Use a folder in diffusers layout, which says it."
        )
    config = {**VAES[known], "base_dim": shapes["encoder.conv_in.weight"][0]}
    decoder = shapes["decoder.norm_out.gamma"][0]
    return config if decoder == config["base_dim"] else {**config, "decoder_base_dim": decoder}


def hunyuan_vae(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of an AutoencoderKLHunyuanVideo: released in one size."""
    return dict(VAES["hunyuan-video"])


def umt5(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of a UMT5EncoderModel."""
    table = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        **UMT5_XXL,
        "vocab_size": table[0],
        "d_model": table[1],
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "num_heads": heads,
        "num_layers": count(shapes, "encoder.block"),
        "relative_attention_num_buckets": buckets,
    }


def clip_vision(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of a CLIPVisionModel with ViT-H's heads of 80."""
    names = {name.removeprefix("vision_model."): shape for name, shape in shapes.items()}
    width, _, patch, _ = names["embeddings.patch_embedding.weight"]
    return {
        **CLIP_VISION_H,
        "hidden_size": width,
        "num_attention_heads": heads or _heads(width, VISION_HEAD_WIDTH, label),
        "num_hidden_layers": count(names, "encoder.layers"),
        "intermediate_size": names["encoder.layers.0.mlp.fc1.weight"][0],
        "patch_size": patch,
        "image_size": patch * isqrt(names["embeddings.position_embedding.weight"][0] - 1),
    }


def clip_text(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of HunyuanVideo's CLIP: released in one size."""
    return dict(CLIP_TEXT_L)


def llama(shapes: Shapes, heads: int | None, label: str) -> dict[str, Any]:
    """Of HunyuanVideo's Llama: released in one size, but for the words that were added to it."""
    names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    return {**LLAVA_LLAMA_3_8B, "vocab_size": names["embed_tokens.weight"][0]}


Infer = Callable[[Shapes, int | None, str], dict[str, Any]]

INFERRED: Mapping[tuple[str, str], Infer] = {
    ("wan", "network"): wan,
    ("wan", "vae"): wan_vae,
    ("wan", "text_encoder"): umt5,
    ("wan", "image_encoder"): clip_vision,
    ("hunyuan-video", "network"): hunyuan_video,
    ("hunyuan-video", "vae"): hunyuan_vae,
    ("hunyuan-video", "text_encoder"): llama,
    ("hunyuan-video", "text_encoder_2"): clip_text,
}


def count(shapes: Shapes, blocks: str) -> int:
    """How many blocks a list has."""
    numbers = (name[len(blocks) + 1 :].partition(".")[0] for name in shapes if name.startswith(f"{blocks}."))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _heads(inner: int, width: int, label: str) -> int:
    if inner % width:
        raise ModelError(
            f"{label}: {inner} wide, which is no whole number of heads of {width}, as every release has them. "
            "Put the model's config.json beside it, under the name of the file."
        )
    return inner // width
