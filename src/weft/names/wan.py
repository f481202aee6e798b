"""The official names of the weights of Wan's transformers -> those of diffusers, as regular expressions.

Source: model.py of the official repository.
"""

from weft.names.rules import Names, Rule, Shapes, translated

_ENDS = r"(weight|bias)"

# The norms of a block change their numbers: diffusers counts them in the order of use.
TRANSFORMER = (
    Rule(rf"patch_embedding\.{_ENDS}", r"patch_embedding.\1"),
    Rule(rf"text_embedding\.0\.{_ENDS}", r"condition_embedder.text_embedder.linear_1.\1"),
    Rule(rf"text_embedding\.2\.{_ENDS}", r"condition_embedder.text_embedder.linear_2.\1"),
    Rule(rf"time_embedding\.0\.{_ENDS}", r"condition_embedder.time_embedder.linear_1.\1"),
    Rule(rf"time_embedding\.2\.{_ENDS}", r"condition_embedder.time_embedder.linear_2.\1"),
    Rule(rf"time_projection\.1\.{_ENDS}", r"condition_embedder.time_proj.\1"),
    Rule(rf"img_emb\.proj\.0\.{_ENDS}", r"condition_embedder.image_embedder.norm1.\1"),
    Rule(rf"img_emb\.proj\.1\.{_ENDS}", r"condition_embedder.image_embedder.ff.net.0.proj.\1"),
    Rule(rf"img_emb\.proj\.3\.{_ENDS}", r"condition_embedder.image_embedder.ff.net.2.\1"),
    Rule(rf"img_emb\.proj\.4\.{_ENDS}", r"condition_embedder.image_embedder.norm2.\1"),
    Rule(r"img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    Rule(r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    Rule(rf"blocks\.(\d+)\.self_attn\.([qkv])\.{_ENDS}", r"blocks.\1.attn1.to_\2.\3"),
    Rule(rf"blocks\.(\d+)\.self_attn\.o\.{_ENDS}", r"blocks.\1.attn1.to_out.0.\2"),
    Rule(r"blocks\.(\d+)\.self_attn\.norm_([qk])\.weight", r"blocks.\1.attn1.norm_\2.weight"),
    Rule(rf"blocks\.(\d+)\.cross_attn\.([qkv])\.{_ENDS}", r"blocks.\1.attn2.to_\2.\3"),
    Rule(rf"blocks\.(\d+)\.cross_attn\.o\.{_ENDS}", r"blocks.\1.attn2.to_out.0.\2"),
    Rule(r"blocks\.(\d+)\.cross_attn\.norm_([qk])\.weight", r"blocks.\1.attn2.norm_\2.weight"),
    Rule(rf"blocks\.(\d+)\.cross_attn\.([kv])_img\.{_ENDS}", r"blocks.\1.attn2.add_\2_proj.\3"),
    Rule(r"blocks\.(\d+)\.cross_attn\.norm_k_img\.weight", r"blocks.\1.attn2.norm_added_k.weight"),
    Rule(rf"blocks\.(\d+)\.norm3\.{_ENDS}", r"blocks.\1.norm2.\2"),
    Rule(rf"blocks\.(\d+)\.norm2\.{_ENDS}", r"blocks.\1.norm3.\2"),
    Rule(rf"blocks\.(\d+)\.ffn\.0\.{_ENDS}", r"blocks.\1.ffn.net.0.proj.\2"),
    Rule(rf"blocks\.(\d+)\.ffn\.2\.{_ENDS}", r"blocks.\1.ffn.net.2.\2"),
    Rule(r"head\.modulation", "scale_shift_table"),
    Rule(rf"head\.head\.{_ENDS}", r"proj_out.\1"),
)


def transformer(shapes: Shapes) -> Names:
    """Pieces of a WanTransformer3DModel."""
    return translated(shapes, TRANSFORMER)
