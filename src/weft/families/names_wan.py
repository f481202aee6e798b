"""The official names of the weights of Wan's encoders -> those of diffusers and transformers, as regular expressions.

Sources: the modules of the official repository (vae2_1.py, vae2_2.py, t5.py, clip.py).
"""

from collections.abc import Mapping

from weft.names.rules import Names, Piece, Rule, Shapes, translated

_ENDS = r"(weight|bias)"

_VAE_ENDS = (
    Rule(rf"conv1\.{_ENDS}", r"quant_conv.\1"),
    Rule(rf"conv2\.{_ENDS}", r"post_quant_conv.\1"),
    Rule(rf"(encoder|decoder)\.conv1\.{_ENDS}", r"\1.conv_in.\2"),
    Rule(r"(encoder|decoder)\.head\.0\.gamma", r"\1.norm_out.gamma"),
    Rule(rf"(encoder|decoder)\.head\.2\.{_ENDS}", r"\1.conv_out.\2"),
    Rule(r"(encoder|decoder)\.middle\.1\.(norm|to_qkv|proj)\.(\w+)", r"\1.mid_block.attentions.0.\2.\3"),
)
# Places of the layers in a residual block, and their names in diffusers.
_RESIDUAL = {"0.gamma": "norm1.gamma", "3.gamma": "norm2.gamma"} | {
    f"{place}.{end}": f"{name}.{end}" for place, name in ((2, "conv1"), (6, "conv2")) for end in ("weight", "bias")
}


def vae(shapes: Shapes) -> Names:
    """Pieces of an AutoencoderKLWan: of 2.2 where its blocks are nested, else of 2.1."""
    nested = any(".downsamples.0.downsamples." in name for name in shapes)
    rules = [*_VAE_ENDS]
    for theirs, ours in _RESIDUAL.items():
        theirs = theirs.replace(".", r"\.")
        for place, number in ((0, 0), (2, 1)):
            rules.append(
                Rule(
                    rf"(encoder|decoder)\.middle\.{place}\.residual\.{theirs}", rf"\1.mid_block.resnets.{number}.{ours}"
                )
            )
        if nested:
            rules += _residual_of_2_2(theirs, ours)
        else:
            rules.append(Rule(rf"encoder\.downsamples\.(\d+)\.residual\.{theirs}", rf"encoder.down_blocks.\1.{ours}"))
    rules += _RESAMPLING_2_2 if nested else _RESAMPLING_2_1
    if not nested:
        rules += _decoder_of_2_1(shapes)
    return translated(shapes, rules)


_RESAMPLING_2_1 = [
    Rule(rf"encoder\.downsamples\.(\d+)\.shortcut\.{_ENDS}", r"encoder.down_blocks.\1.conv_shortcut.\2"),
    Rule(rf"encoder\.downsamples\.(\d+)\.(resample\.1|time_conv)\.{_ENDS}", r"encoder.down_blocks.\1.\2.\3"),
]

_NEST_DOWN, _NEST_UP = (
    r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)",
    r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)",
)

_RESAMPLING_2_2 = [
    Rule(rf"{_NEST_DOWN}\.shortcut\.{_ENDS}", r"encoder.down_blocks.\1.resnets.\2.conv_shortcut.\3"),
    Rule(rf"{_NEST_UP}\.shortcut\.{_ENDS}", r"decoder.up_blocks.\1.resnets.\2.conv_shortcut.\3"),
    Rule(rf"{_NEST_DOWN}\.(resample\.1|time_conv)\.{_ENDS}", r"encoder.down_blocks.\1.downsampler.\3.\4"),
    Rule(rf"{_NEST_UP}\.(resample\.1|time_conv)\.{_ENDS}", r"decoder.up_blocks.\1.upsampler.\3.\4"),
]


def _residual_of_2_2(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(rf"{_NEST_DOWN}\.residual\.{theirs}", rf"encoder.down_blocks.\1.resnets.\2.{ours}"),
        Rule(rf"{_NEST_UP}\.residual\.{theirs}", rf"decoder.up_blocks.\1.resnets.\2.{ours}"),
    ]


def _decoder_of_2_1(shapes: Shapes) -> list[Rule]:
    """The official decoder is one list, in which a resampling ends each level; diffusers keeps the levels apart."""
    places = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("decoder.upsamples.")})
    rules: list[Rule] = []
    level = first = 0
    for place in places:
        at = rf"decoder\.upsamples\.{place}\."
        if any(name.startswith(f"decoder.upsamples.{place}.resample.") for name in shapes):
            rules.append(
                Rule(at + rf"(resample\.1|time_conv)\.{_ENDS}", rf"decoder.up_blocks.{level}.upsamplers.0.\1.\2")
            )
            level, first = level + 1, place + 1
            continue
        block = f"decoder.up_blocks.{level}.resnets.{place - first}"
        rules.append(Rule(at + rf"shortcut\.{_ENDS}", rf"{block}.conv_shortcut.\1"))
        for theirs, ours in _RESIDUAL.items():
            rules.append(Rule(at + "residual\\." + theirs.replace(".", r"\."), f"{block}.{ours}"))
    return rules


_BLOCK = r"encoder.block.\1.layer"

TEXT_ENCODER = (
    Rule(r"token_embedding\.weight", "shared.weight"),
    Rule(r"blocks\.(\d+)\.attn\.([qkvo])\.weight", rf"{_BLOCK}.0.SelfAttention.\2.weight"),
    Rule(
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight", rf"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight"
    ),
    Rule(r"blocks\.(\d+)\.norm1\.weight", rf"{_BLOCK}.0.layer_norm.weight"),
    Rule(r"blocks\.(\d+)\.norm2\.weight", rf"{_BLOCK}.1.layer_norm.weight"),
    Rule(r"blocks\.(\d+)\.ffn\.gate\.0\.weight", rf"{_BLOCK}.1.DenseReluDense.wi_0.weight"),
    Rule(r"blocks\.(\d+)\.ffn\.fc1\.weight", rf"{_BLOCK}.1.DenseReluDense.wi_1.weight"),
    Rule(r"blocks\.(\d+)\.ffn\.fc2\.weight", rf"{_BLOCK}.1.DenseReluDense.wo.weight"),
    Rule(r"norm\.weight", "encoder.final_layer_norm.weight"),
)


def text_encoder(shapes: Shapes) -> Names:
    """Pieces of a UMT5EncoderModel."""
    return translated(shapes, TEXT_ENCODER)


IMAGE_ENCODER = (
    Rule(r"visual\.patch_embedding\.weight", "embeddings.patch_embedding.weight"),
    Rule(rf"visual\.pre_norm\.{_ENDS}", r"pre_layrnorm.\1"),  # so spelled in transformers
    Rule(rf"visual\.post_norm\.{_ENDS}", r"post_layernorm.\1"),
    Rule(rf"visual\.transformer\.(\d+)\.norm([12])\.{_ENDS}", r"encoder.layers.\1.layer_norm\2.\3"),
    Rule(rf"visual\.transformer\.(\d+)\.attn\.proj\.{_ENDS}", r"encoder.layers.\1.self_attn.out_proj.\2"),
    Rule(
        rf"visual\.transformer\.(\d+)\.attn\.to_qkv\.{_ENDS}",
        r"encoder.layers.\1.self_attn.q_proj.\2",
        r"encoder.layers.\1.self_attn.k_proj.\2",
        r"encoder.layers.\1.self_attn.v_proj.\2",
    ),
    Rule(rf"visual\.transformer\.(\d+)\.mlp\.0\.{_ENDS}", r"encoder.layers.\1.mlp.fc1.\2"),
    Rule(rf"visual\.transformer\.(\d+)\.mlp\.2\.{_ENDS}", r"encoder.layers.\1.mlp.fc2.\2"),
)


def image_encoder(shapes: Shapes) -> Names:
    """Pieces of a CLIPVisionModel, from the visual tower of the official CLIP; its text tower is left."""
    visual: Mapping[str, tuple[int, ...]] = {
        name: shape for name, shape in shapes.items() if name.startswith("visual.") and name != "visual.head"
    }
    named = translated(visual, IMAGE_ENCODER)
    width = shapes["visual.cls_embedding"][-1]
    named["embeddings.class_embedding"] = Piece("visual.cls_embedding", shape=(width,))
    named["embeddings.position_embedding.weight"] = Piece(
        "visual.pos_embedding", shape=tuple(shapes["visual.pos_embedding"][1:])
    )
    for whole in ("visual.cls_embedding", "visual.pos_embedding"):
        named.pop(whole, None)
    return named
