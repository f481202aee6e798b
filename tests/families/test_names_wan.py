"""Official names of Wan's tensors become diffusers' and transformers': the same tensors, by diffusers' own converters
where it has them, and by the modules' outputs."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from torch import Tensor
from torch.testing import assert_close

from tests.families import networks, official
from weft.families import names_wan
from weft.names import wan
from weft.names.rules import Names


def cut(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors that the pieces ask for."""
    out = {}
    for target, piece in names.items():
        tensor = state[piece.source]
        if piece.rows:
            tensor = torch.cat([tensor[a:b] for a, b in piece.rows])
        out[target] = tensor if piece.shape is None else tensor.view(piece.shape)
    return out


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


KINDS = [{}, {"channels": 36}, {"channels": 36, "clip": True}, {"channels": 48, "out": 48},
         {"channels": 36, "clip": True, "pos_embed_seq_len": 10}]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_official_tensors_are_found_as_diffusers_converter_finds_them(kind):
    network = networks.wan(**kind)
    theirs = official.wan_transformer(network.state_dict())
    found = cut(theirs, wan.transformer(shapes(theirs)))
    assert same(found, network.state_dict())
    converted = convert_wan_transformer_to_diffusers({name: tensor.clone() for name, tensor in theirs.items()})
    position = "condition_embedder.image_embedder.pos_embed"
    converted = {position if name == "img_emb.emb_pos" else name: tensor for name, tensor in converted.items()}
    assert same(found, converted)


def test_the_norm_before_cross_attention_is_the_third_officially_and_the_second_in_diffusers():
    found = wan.transformer({"blocks.3.norm3.weight": (8,), "blocks.3.norm3.bias": (8,)})
    assert {target: piece.source for target, piece in found.items()} == {
        "blocks.3.norm2.weight": "blocks.3.norm3.weight",
        "blocks.3.norm2.bias": "blocks.3.norm3.bias",
    }


def test_an_autoencoder_of_2_1_is_found_as_diffusers_converter_finds_it():
    vae = networks.vae_2_1()
    theirs = official.wan_vae(vae.state_dict())
    found = cut(theirs, names_wan.vae(shapes(theirs)))
    assert same(found, vae.state_dict())
    assert same(found, convert_wan_vae_to_diffusers(theirs))


def test_an_autoencoder_of_2_2_is_found_in_its_nested_lists():
    vae = networks.vae_2_2()
    theirs = official.wan_vae_2_2(vae.state_dict())
    # Names that stand in the published Wan2.2_VAE.pth.
    assert {
        "encoder.downsamples.1.downsamples.0.shortcut.weight", "encoder.downsamples.0.downsamples.2.resample.1.weight",
        "encoder.downsamples.1.downsamples.2.time_conv.weight", "encoder.downsamples.3.downsamples.1.residual.6.weight",
        "decoder.upsamples.0.upsamples.3.time_conv.weight", "decoder.upsamples.2.upsamples.0.shortcut.weight",
        "encoder.middle.1.to_qkv.weight", "decoder.head.2.weight", "conv1.weight",
    } <= theirs.keys()  # fmt: skip
    assert same(cut(theirs, names_wan.vae(shapes(theirs))), vae.state_dict())


def test_umt5_answers_the_same_with_its_official_tensors():
    encoder = networks.umt5()
    theirs = official.umt5(encoder.state_dict())
    found = cut(theirs, names_wan.text_encoder(shapes(theirs)))
    ids = torch.tensor([[4, 7, 1]])
    wanted = encoder(ids).last_hidden_state
    fresh = networks.randomized(networks.umt5(), seed=1)
    missing, unexpected = fresh.load_state_dict(found, strict=False)
    assert missing == ["encoder.embed_tokens.weight"] and not unexpected
    assert torch.equal(fresh(ids).last_hidden_state, wanted)


def test_the_image_encoder_is_the_visual_tower_of_the_official_clip():
    encoder = networks.clip_vision()
    theirs = official.clip(encoder.state_dict())
    found = cut(theirs, names_wan.image_encoder(shapes(theirs)))
    head = "vision_model." if any(name.startswith("vision_model.") for name in encoder.state_dict()) else ""
    assert same({head + name: tensor for name, tensor in found.items()}, encoder.state_dict())


def test_the_official_attention_of_clip_equals_transformers_on_the_cut_projection():
    """The fused projection is (3 heads d) in the order q, k, v: clip.py's view(b, s, 3, n, d)."""
    torch.manual_seed(0)
    fused, x = torch.randn(3 * 8, 8), torch.randn(2, 5, 8)
    q, k, v = (x @ fused.T).view(2, 5, 3, 2, 4).unbind(2)
    names = names_wan.image_encoder(
        {"visual.transformer.0.attn.to_qkv.weight": (24, 8), "visual.cls_embedding": (1, 1, 8),
         "visual.pos_embedding": (1, 5, 8)}
    )  # fmt: skip
    for part, wanted in zip("qkv", (q, k, v), strict=True):
        ((first, last),) = names[f"encoder.layers.0.self_attn.{part}_proj.weight"].rows
        assert_close((x @ fused[first:last].T).view(2, 5, 2, 4), wanted)
