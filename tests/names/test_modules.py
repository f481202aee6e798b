"""The makers' names of modules against the networks that diffusers builds, and against ComfyUI's words."""

import pytest
from torch import nn

from tests.families import networks
from weft.names.modules import family_of, modules

NETWORKS = {
    "wan": lambda: networks.wan(36, clip=True, layers=1),
    "hunyuan-video": lambda: networks.hunyuan(num_layers=1, num_single_layers=1),
}


@pytest.mark.parametrize("family", NETWORKS)
def test_every_layer_of_the_network_has_an_official_name(family):
    paths = [path for path, m in NETWORKS[family]().named_modules() if isinstance(m, nn.Linear | nn.Conv3d)]
    known = modules(family)
    assert [path for path in paths if path not in known.official] == []
    assert family_of(paths) == family


def test_names_with_underscores_stand_for_one_module_each():
    for family in NETWORKS:
        known = modules(family)
        assert len(known.underscored) == len(known.parts) and len(known.underscored_paths) == len(known.official)
        both = known.underscored.keys() & known.underscored_paths.keys()
        assert all(known.parts[known.underscored[name]] == (known.underscored_paths[name],) for name in both)


def test_an_underscore_within_a_name_is_no_dot():
    assert modules("wan").found_underscored("blocks_3_cross_attn_k_img") == "blocks.3.cross_attn.k_img"
    assert modules("wan").found_underscored("blocks_3_cross_attn_k") == "blocks.3.cross_attn.k"
    assert modules("wan").found("blocks.3.cross.attn.k") is None


# What ComfyUI's network calls modules (comfy/ldm/hunyuan_video/model.py, comfy/ldm/flux/layers.py).
COMFYUI = {
    "double_blocks.0.img_attn.qkv": "double_blocks.0.img_attn_qkv",
    "double_blocks.0.txt_attn.proj": "double_blocks.0.txt_attn_proj",
    "double_blocks.0.img_mlp.0": "double_blocks.0.img_mlp.fc1",
    "double_blocks.0.txt_mod.lin": "double_blocks.0.txt_mod.linear",
    "single_blocks.0.modulation.lin": "single_blocks.0.modulation.linear",
    "time_in.in_layer": "time_in.mlp.0",
    "guidance_in.out_layer": "guidance_in.mlp.2",
    "vector_in.in_layer": "vector_in.in_layer",
    "txt_in.t_embedder.in_layer": "txt_in.t_embedder.mlp.0",
    "txt_in.c_embedder.out_layer": "txt_in.c_embedder.linear_2",
    "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
    "txt_in.individual_token_refiner.blocks.1.mlp.2": "txt_in.individual_token_refiner.blocks.1.mlp.fc2",
}


@pytest.mark.parametrize(("theirs", "official"), COMFYUI.items())
def test_comfyuis_words_are_known_with_dots_and_with_underscores(theirs, official):
    known = modules("hunyuan-video")
    assert known.found(theirs) == official
    assert known.found_underscored(theirs.replace(".", "_")) == official
    assert known.comfyui(official) == (official if "blocks" in official else theirs)


def test_the_halves_of_the_last_norm_change_places():
    rows = modules("hunyuan-video").rows("final_layer.adaLN_modulation.1", 8, 4)
    assert rows == {"norm_out.linear": ((4, 8), (0, 4))}


def test_linear1_is_three_times_the_width_and_the_mlps_rest():
    rows = modules("hunyuan-video").rows("single_blocks.0.linear1", 3 * 4 + 10, 4)
    assert list(rows.values()) == [((0, 4),), ((4, 8),), ((8, 12),), ((12, 22),)]
