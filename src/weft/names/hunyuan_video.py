"""The official names of HunyuanVideo's weights -> those of diffusers. Its fused projections are cut into their rows.

ComfyUI repackages the same weights under slightly other names; these are translated to the official ones first.
"""

import re

from weft.names.rules import Names, Piece, Rule, Shapes, translated

_ENDS = r"(weight|bias)"
_DOUBLE, _SINGLE = r"double_blocks\.(\d+)", r"single_blocks\.(\d+)"
_TO_DOUBLE, _TO_SINGLE = r"transformer_blocks.\1", r"single_transformer_blocks.\1"
_REFINER = r"txt_in\.individual_token_refiner\.blocks\.(\d+)"
_TO_REFINER = r"context_embedder.token_refiner.refiner_blocks.\1"

TRANSFORMER = (
    Rule(rf"img_in\.proj\.{_ENDS}", r"x_embedder.proj.\1"),
    Rule(rf"time_in\.mlp\.0\.{_ENDS}", r"time_text_embed.timestep_embedder.linear_1.\1"),
    Rule(rf"time_in\.mlp\.2\.{_ENDS}", r"time_text_embed.timestep_embedder.linear_2.\1"),
    Rule(rf"guidance_in\.mlp\.0\.{_ENDS}", r"time_text_embed.guidance_embedder.linear_1.\1"),
    Rule(rf"guidance_in\.mlp\.2\.{_ENDS}", r"time_text_embed.guidance_embedder.linear_2.\1"),
    Rule(rf"vector_in\.in_layer\.{_ENDS}", r"time_text_embed.text_embedder.linear_1.\1"),
    Rule(rf"vector_in\.out_layer\.{_ENDS}", r"time_text_embed.text_embedder.linear_2.\1"),
    # ---- the refiner of text tokens
    Rule(rf"txt_in\.input_embedder\.{_ENDS}", r"context_embedder.proj_in.\1"),
    Rule(rf"txt_in\.t_embedder\.mlp\.0\.{_ENDS}", r"context_embedder.time_text_embed.timestep_embedder.linear_1.\1"),
    Rule(rf"txt_in\.t_embedder\.mlp\.2\.{_ENDS}", r"context_embedder.time_text_embed.timestep_embedder.linear_2.\1"),
    Rule(
        rf"txt_in\.c_embedder\.linear_([12])\.{_ENDS}", r"context_embedder.time_text_embed.text_embedder.linear_\1.\2"
    ),
    Rule(rf"{_REFINER}\.norm([12])\.{_ENDS}", rf"{_TO_REFINER}.norm\2.\3"),
    Rule(
        rf"{_REFINER}\.self_attn_qkv\.{_ENDS}",
        *(rf"{_TO_REFINER}.attn.to_{each}.\2" for each in "qkv"),
    ),
    Rule(rf"{_REFINER}\.self_attn_proj\.{_ENDS}", rf"{_TO_REFINER}.attn.to_out.0.\2"),
    Rule(rf"{_REFINER}\.mlp\.fc1\.{_ENDS}", rf"{_TO_REFINER}.ff.net.0.proj.\2"),
    Rule(rf"{_REFINER}\.mlp\.fc2\.{_ENDS}", rf"{_TO_REFINER}.ff.net.2.\2"),
    Rule(rf"{_REFINER}\.adaLN_modulation\.1\.{_ENDS}", rf"{_TO_REFINER}.norm_out.linear.\2"),
    # ---- blocks with two streams
    Rule(rf"{_DOUBLE}\.img_mod\.linear\.{_ENDS}", rf"{_TO_DOUBLE}.norm1.linear.\2"),
    Rule(rf"{_DOUBLE}\.txt_mod\.linear\.{_ENDS}", rf"{_TO_DOUBLE}.norm1_context.linear.\2"),
    Rule(rf"{_DOUBLE}\.img_attn_qkv\.{_ENDS}", *(rf"{_TO_DOUBLE}.attn.to_{each}.\2" for each in "qkv")),
    Rule(rf"{_DOUBLE}\.txt_attn_qkv\.{_ENDS}", *(rf"{_TO_DOUBLE}.attn.add_{each}_proj.\2" for each in "qkv")),
    Rule(rf"{_DOUBLE}\.img_attn_([qk])_norm\.weight", rf"{_TO_DOUBLE}.attn.norm_\2.weight"),
    Rule(rf"{_DOUBLE}\.txt_attn_([qk])_norm\.weight", rf"{_TO_DOUBLE}.attn.norm_added_\2.weight"),
    Rule(rf"{_DOUBLE}\.img_attn_proj\.{_ENDS}", rf"{_TO_DOUBLE}.attn.to_out.0.\2"),
    Rule(rf"{_DOUBLE}\.txt_attn_proj\.{_ENDS}", rf"{_TO_DOUBLE}.attn.to_add_out.\2"),
    Rule(rf"{_DOUBLE}\.img_mlp\.fc1\.{_ENDS}", rf"{_TO_DOUBLE}.ff.net.0.proj.\2"),
    Rule(rf"{_DOUBLE}\.img_mlp\.fc2\.{_ENDS}", rf"{_TO_DOUBLE}.ff.net.2.\2"),
    Rule(rf"{_DOUBLE}\.txt_mlp\.fc1\.{_ENDS}", rf"{_TO_DOUBLE}.ff_context.net.0.proj.\2"),
    Rule(rf"{_DOUBLE}\.txt_mlp\.fc2\.{_ENDS}", rf"{_TO_DOUBLE}.ff_context.net.2.\2"),
    # ---- blocks with one stream; linear1 is cut in `transformer`
    Rule(rf"{_SINGLE}\.modulation\.linear\.{_ENDS}", rf"{_TO_SINGLE}.norm.linear.\2"),
    Rule(rf"{_SINGLE}\.([qk])_norm\.weight", rf"{_TO_SINGLE}.attn.norm_\2.weight"),
    Rule(rf"{_SINGLE}\.linear2\.{_ENDS}", rf"{_TO_SINGLE}.proj_out.\2"),
    Rule(rf"final_layer\.linear\.{_ENDS}", r"proj_out.\1"),
)

# ComfyUI's word -> the official one, in whole parts of a name.
_COMFY = (
    (r"\.(img|txt)_mod\.lin\.", r".\1_mod.linear."),
    (r"\.modulation\.lin\.", ".modulation.linear."),
    (r"\.(img|txt)_attn\.(qkv|proj)\.", r".\1_attn_\2."),
    (r"\.(img|txt)_attn\.norm\.query_norm\.scale$", r".\1_attn_q_norm.weight"),
    (r"\.(img|txt)_attn\.norm\.key_norm\.scale$", r".\1_attn_k_norm.weight"),
    (r"\.norm\.query_norm\.scale$", ".q_norm.weight"),
    (r"\.norm\.key_norm\.scale$", ".k_norm.weight"),
    (r"^((?:double_blocks|txt_in)\..*mlp)\.0\.", r"\1.fc1."),
    (r"^((?:double_blocks|txt_in)\..*mlp)\.2\.", r"\1.fc2."),
    (r"\.self_attn\.(qkv|proj)\.", r".self_attn_\1."),
    (r"^(time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"^(time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
    (r"^txt_in\.t_embedder\.in_layer\.", "txt_in.t_embedder.mlp.0."),
    (r"^txt_in\.t_embedder\.out_layer\.", "txt_in.t_embedder.mlp.2."),
    (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
)


def official_name(name: str) -> str:
    """The official name of a tensor that may have ComfyUI's."""
    if name.startswith("txt_in.t_embedder.mlp."):
        return name
    for theirs, official in _COMFY:
        name = re.sub(theirs, official, name)
    return name


def transformer(shapes: Shapes) -> Names:
    """Pieces of a HunyuanVideoTransformer3DModel."""
    file_names = {official_name(name): name for name in shapes}
    renamed = {official: shapes[name] for official, name in file_names.items()}
    cut = {name for name in renamed if name.startswith("final_layer.adaLN_modulation.1.") or ".linear1." in name}
    found = translated({name: shape for name, shape in renamed.items() if name not in cut}, TRANSFORMER)
    for name in cut:
        end = name.rpartition(".")[2]
        if name.startswith("final_layer"):
            half = renamed[name][0] // 2  # shift then scale; diffusers has scale then shift
            found[f"norm_out.linear.{end}"] = Piece(name, ((half, 2 * half), (0, half)))
        else:
            found |= _single_linear1(name, renamed)
    return {target: Piece(file_names[p.source], p.rows, p.shape) for target, p in found.items()}


def _single_linear1(name: str, shapes: Shapes) -> Names:
    """q, k, v and the MLP's first layer: for each of the three as many rows as linear2 has outputs, then the rest."""
    head, _, end = name.partition(".linear1.")
    width = shapes[f"{head}.linear2.weight"][0]
    block = head.replace("single_blocks", "single_transformer_blocks")
    pieces = {f"{block}.attn.to_{q}.{end}": Piece(name, ((i * width, (i + 1) * width),)) for i, q in enumerate("qkv")}
    return {**pieces, f"{block}.proj_mlp.{end}": Piece(name, ((3 * width, shapes[name][0]),))}


def vae(shapes: Shapes) -> Names:
    """Pieces of an AutoencoderKLHunyuanVideo: the official file has the same names behind a prefix."""
    return {name.removeprefix("vae."): Piece(name) for name in shapes}
