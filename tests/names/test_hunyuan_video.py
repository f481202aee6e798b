"""Official names of HunyuanVideo's tensors become diffusers', fused projections cut into their rows."""

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from torch import Tensor

from tests.families import networks, official
from tests.families.test_names_wan import cut, same, shapes
from weft.names import hunyuan_video


@pytest.fixture(scope="module")
def network():
    return networks.hunyuan()


@pytest.fixture(scope="module")
def theirs(network) -> dict[str, Tensor]:
    return official.hunyuan_transformer(network.state_dict())


def test_official_tensors_become_the_networks_own(network, theirs):
    assert same(cut(theirs, hunyuan_video.transformer(shapes(theirs))), network.state_dict())


def test_diffusers_converter_finds_the_same_but_for_the_width_that_it_takes_for_granted(network, theirs):
    """It cuts linear1 at 3072, so that layer is left to the test below."""
    rest = {name: tensor.clone() for name, tensor in theirs.items() if ".linear1." not in name}
    wanted = convert_hunyuan_video_transformer_to_diffusers(rest)
    found = cut(theirs, hunyuan_video.transformer(shapes(theirs)))
    assert same({name: found[name] for name in wanted}, wanted)


def test_linear1_at_the_real_width_is_cut_as_diffusers_converter_cuts_it():
    name = "single_blocks.0.linear1"
    state = {f"{name}.weight": torch.arange(21504.0).view(-1, 1), f"{name}.bias": torch.arange(21504.0)}
    linear2 = {"single_blocks.0.linear2.weight": torch.zeros(3072, 1)}
    wanted = convert_hunyuan_video_transformer_to_diffusers(dict(state | linear2))
    assert same(cut(state | linear2, hunyuan_video.transformer(shapes(state | linear2))), wanted)


def test_the_last_layer_changes_its_halves():
    piece = hunyuan_video.transformer({"final_layer.adaLN_modulation.1.weight": (8, 4)})["norm_out.linear.weight"]
    assert piece.rows == ((4, 8), (0, 4))


def test_comfyuis_names_of_the_same_layers_are_known(network, theirs):
    table = {
        r"_mod\.linear\.": "_mod.lin.", r"modulation\.linear\.": "modulation.lin.",
        r"(img|txt)_attn_(qkv|proj)\.": r"\1_attn.\2.",
        r"(img|txt)_attn_q_norm\.weight": r"\1_attn.norm.query_norm.scale",
        r"(img|txt)_attn_k_norm\.weight": r"\1_attn.norm.key_norm.scale",
        r"(single_blocks\.\d+)\.q_norm\.weight": r"\1.norm.query_norm.scale",
        r"(single_blocks\.\d+)\.k_norm\.weight": r"\1.norm.key_norm.scale",
        r"mlp\.fc1\.": "mlp.0.", r"mlp\.fc2\.": "mlp.2.", r"self_attn_(qkv|proj)\.": r"self_attn.\1.",
        r"(time_in|guidance_in|t_embedder)\.mlp\.0": r"\1.in_layer",
        r"(time_in|guidance_in|t_embedder)\.mlp\.2": r"\1.out_layer",
        r"c_embedder\.linear_1": "c_embedder.in_layer", r"c_embedder\.linear_2": "c_embedder.out_layer",
    }  # fmt: skip
    comfy = official.renamed(theirs, table)
    assert sum(name not in theirs for name in comfy) > len(comfy) / 2
    assert same(cut(comfy, hunyuan_video.transformer(shapes(comfy))), network.state_dict())
    assert not any(re.search(r"\.lin\.|query_norm", hunyuan_video.official_name(name)) for name in comfy)


def test_the_official_autoencoder_has_diffusers_names_behind_a_prefix():
    found = hunyuan_video.vae({"vae.encoder.conv_in.conv.weight": (4,), "post_quant_conv.bias": (4,)})
    assert {target: piece.source for target, piece in found.items()} == {
        "encoder.conv_in.conv.weight": "vae.encoder.conv_in.conv.weight",
        "post_quant_conv.bias": "post_quant_conv.bias",
    }
