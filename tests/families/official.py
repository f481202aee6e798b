"""State dicts as the makers of the models publish them, made from diffusers' and transformers' modules: the inverse of
what Weft does when it reads them, written from the makers' code and not from ours."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> State:
    """The state under other names: each regex is replaced where it is found, in order."""
    out: State = {}
    for name, tensor in state.items():
        for ours, theirs in table.items():
            name = re.sub(ours, theirs, name)
        out[name] = tensor.clone()
    return out


WAN = {
    r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"^condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"^condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"^scale_shift_table": "head.modulation",
    r"^proj_out": "head.head",
    r"\.scale_shift_table": ".modulation",
    r"^(blocks\.\d+)\.norm2\.": r"\1.affine_norm_of_cross_attention.",
    r"^(blocks\.\d+)\.norm3\.": r"\1.norm2.",
    r"\.affine_norm_of_cross_attention\.": ".norm3.",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".o.",
    r"\.add_([kv])_proj\.": r".\1_img.",
    r"\.norm_added_k\.": ".norm_k_img.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.",
    r"\.ffn\.net\.2\.": ".ffn.2.",
}


def wan_transformer(state: Mapping[str, Tensor]) -> State:
    return renamed(state, WAN)


RESIDUAL = {
    r"\.norm1\.gamma": ".residual.0.gamma",
    r"\.conv1\.(weight|bias)": r".residual.2.\1",
    r"\.norm2\.gamma": ".residual.3.gamma",
    r"\.conv2\.(weight|bias)": r".residual.6.\1",
    r"\.conv_shortcut\.": ".shortcut.",
}
VAE_ENDS = {
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.attentions\.0": "middle.1",
    r"mid_block\.resnets\.1": "middle.2",
    r"\.conv_in\.": ".conv1.",
    r"\.norm_out\.": ".head.0.",
    r"\.conv_out\.": ".head.2.",
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
}


def wan_vae(state: Mapping[str, Tensor], blocks: int = 3) -> State:
    """Wan 2.1: one list on each side; a level of the decoder has so many residual blocks, then a resampling."""
    levels = {
        rf"^decoder\.up_blocks\.{level}\.resnets\.{place}\.": f"decoder.upsamples.{level * (blocks + 1) + place}."
        for level in range(4)
        for place in range(blocks)
    } | {
        rf"^decoder\.up_blocks\.{level}\.upsamplers\.0\.": f"decoder.upsamples.{level * (blocks + 1) + blocks}."
        for level in range(4)
    }
    return renamed(state, RESIDUAL | levels | {r"^encoder\.down_blocks\.": "encoder.downsamples."} | VAE_ENDS)


def wan_vae_2_2(state: Mapping[str, Tensor], blocks: int = 2) -> State:
    """Wan 2.2: lists in lists; a level ends with its resampling."""
    levels = {
        r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.": r"encoder.downsamples.\1.downsamples.\2.",
        r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.": r"decoder.upsamples.\1.upsamples.\2.",
        r"^encoder\.down_blocks\.(\d+)\.downsampler\.": rf"encoder.downsamples.\1.downsamples.{blocks}.",
        r"^decoder\.up_blocks\.(\d+)\.upsampler\.": rf"decoder.upsamples.\1.upsamples.{blocks + 1}.",
    }
    return renamed(state, RESIDUAL | levels | VAE_ENDS)


UMT5 = {
    r"^shared\.": "token_embedding.",
    r"^encoder\.final_layer_norm\.": "norm.",
    r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias": r"blocks.\1.pos_embedding.embedding",
    r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.": r"blocks.\1.attn.",
    r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm": r"blocks.\1.norm1",
    r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm": r"blocks.\1.norm2",
    r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0": r"blocks.\1.ffn.gate.0",
    r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1": r"blocks.\1.ffn.fc1",
    r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo": r"blocks.\1.ffn.fc2",
}


def umt5(state: Mapping[str, Tensor]) -> State:
    return renamed({n: t for n, t in state.items() if n != "encoder.embed_tokens.weight"}, UMT5)


CLIP = {
    r"^embeddings\.class_embedding": "cls_embedding",
    r"^embeddings\.patch_embedding\.": "patch_embedding.",
    r"^embeddings\.position_embedding\.weight": "pos_embedding",
    r"^pre_layrnorm\.": "pre_norm.",
    r"^post_layernorm\.": "post_norm.",
    r"^encoder\.layers\.": "transformer.",
    r"\.layer_norm([12])\.": r".norm\1.",
    r"\.self_attn\.out_proj\.": ".attn.proj.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    "^": "visual.",
}


def clip(state: Mapping[str, Tensor]) -> State:
    """The whole official CLIP: the visual tower, with tensors of the text tower and the heads beside it."""
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    out = renamed(fused(bare, r"\.self_attn\.q_proj\.", ("q_proj", "k_proj", "v_proj"), ".attn.to_qkv."), CLIP)
    out["visual.cls_embedding"] = out["visual.cls_embedding"].view(1, 1, -1)
    out["visual.pos_embedding"] = out["visual.pos_embedding"].unsqueeze(0)
    width = out["visual.cls_embedding"].shape[-1]
    return {**out, "visual.head": torch.ones(width, 4), "log_scale": torch.ones([]),
            "textual.token_embedding.weight": torch.ones(9, 4)}  # fmt: skip


def fused(state: Mapping[str, Tensor], first: str, parts: tuple[str, ...], name: str) -> State:
    """Layers that stand beside one another, stacked under one name, in the order of parts."""
    out = dict(state)
    for key in state:
        if re.search(first, key):
            keys = [key.replace(parts[0], part) for part in parts]
            out[re.sub(first, name, key)] = torch.cat([out.pop(each) for each in keys])
    return out


HUNYUAN = {
    r"\bff_context\.net\.0\.proj\.": "txt_mlp.fc1.",
    r"\bff_context\.net\.2\.": "txt_mlp.fc2.",
    r"^(context_embedder.*)\bff\.net\.0\.proj\.": r"\1mlp.fc1.",
    r"^(context_embedder.*)\bff\.net\.2\.": r"\1mlp.fc2.",
    r"\bff\.net\.0\.proj\.": "img_mlp.fc1.",
    r"\bff\.net\.2\.": "img_mlp.fc2.",
    r"^x_embedder\.": "img_in.",
    r"^time_text_embed\.timestep_embedder\.linear_1": "time_in.mlp.0",
    r"^time_text_embed\.timestep_embedder\.linear_2": "time_in.mlp.2",
    r"^time_text_embed\.guidance_embedder\.linear_1": "guidance_in.mlp.0",
    r"^time_text_embed\.guidance_embedder\.linear_2": "guidance_in.mlp.2",
    r"^time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"^time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"^context_embedder\.proj_in\.": "txt_in.input_embedder.",
    r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1": "txt_in.t_embedder.mlp.0",
    r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2": "txt_in.t_embedder.mlp.2",
    r"^context_embedder\.time_text_embed\.text_embedder\.": "txt_in.c_embedder.",
    r"^context_embedder\.token_refiner\.refiner_blocks\.": "txt_in.individual_token_refiner.blocks.",
    r"^(txt_in.*)\.norm_out\.linear\.": r"\1.adaLN_modulation.1.",
    r"^(txt_in.*)\.attn\.to_out\.0\.": r"\1.self_attn_proj.",
    r"^transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.linear",
    r"^transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.linear",
    r"^transformer_blocks\.": "double_blocks.",
    r"^(double_blocks.*)\.attn\.norm_([qk])\.": r"\1.img_attn_\2_norm.",
    r"^(double_blocks.*)\.attn\.norm_added_([qk])\.": r"\1.txt_attn_\2_norm.",
    r"^(double_blocks.*)\.attn\.to_out\.0\.": r"\1.img_attn_proj.",
    r"^(double_blocks.*)\.attn\.to_add_out\.": r"\1.txt_attn_proj.",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])\.": r"single_blocks.\1.\2_norm.",
    r"^single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.linear",
    r"^single_transformer_blocks\.(\d+)\.proj_out\.": r"single_blocks.\1.linear2.",
    r"^single_transformer_blocks\.": "single_blocks.",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"^proj_out\.": "final_layer.linear.",
}


def hunyuan_transformer(state: Mapping[str, Tensor]) -> State:
    out = dict(state)
    for end in ("weight", "bias"):  # diffusers has scale before shift in the last layer
        scale, shift = out[f"norm_out.linear.{end}"].chunk(2)
        out[f"norm_out.linear.{end}"] = torch.cat([shift, scale])
    out = fused(out, r"(?<=refiner_blocks\.\d)\.attn\.to_q\.", ("to_q", "to_k", "to_v"), ".self_attn_qkv.")
    singles = {n: t for n, t in out.items() if n.startswith("single_")}
    doubles = {n: t for n, t in out.items() if n not in singles}
    doubles = fused(doubles, r"\.attn\.to_q\.", ("to_q", "to_k", "to_v"), ".img_attn_qkv.")
    doubles = fused(doubles, r"\.attn\.add_q_proj\.", ("add_q_proj", "add_k_proj", "add_v_proj"), ".txt_attn_qkv.")
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    singles = fused(singles, r"\.attn\.to_q\.", parts, ".linear1.")
    return renamed(doubles | singles, HUNYUAN)
