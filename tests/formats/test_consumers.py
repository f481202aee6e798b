"""What other programs make of adapter files: rules from their sources, on files that are made by hand here."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from weft.errors import ConfigError, ModelError
from weft.formats.consumers import CONSUMERS, use_of
from weft.formats.consumers_comfyui import names
from weft.formats.consumers_kohya import own_modules, walked
from weft.formats.use import Delta, Stored, Use
from weft.names.modules import modules

A, B = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8.0).view(4, 2) - 3
BA = (B @ A).double()
Q = "blocks.0.self_attn.q"  # of Wan
LAYERS = [f"{kind}_attn.{each}" for kind in ("self", "cross") for each in "qkvo"] + ["ffn.0", "ffn.2"]
QKV = "double_blocks.0.img_attn_qkv"  # of HunyuanVideo


def read(program: str, tensors: dict[str, Tensor], family: str = "wan", **config: object) -> Use:
    return CONSUMERS[program](Stored(tensors, {}, config), family)


def pair(name: str, ends: tuple[str, str] = ("lora_down.weight", "lora_up.weight"), alpha: float | None = None):
    found = {f"{name}.{ends[0]}": A, f"{name}.{ends[1]}": B}
    return found if alpha is None else {**found, f"{name}.alpha": torch.tensor(alpha)}


def added(delta: Delta) -> Tensor:
    if delta.factors is not None:
        return delta.factors[0] @ delta.factors[1]
    assert delta.whole is not None
    return delta.whole


# ---- ComfyUI


@pytest.mark.parametrize(
    "ends",
    [("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight"),
     ("lora_A.default.weight", "lora_B.default.weight"), ("lora_A", "lora_B")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_comfyui_knows_five_spellings_and_divides_alpha_by_the_rank(ends, name, alpha):
    use = read("comfyui", pair(name, ends, alpha))
    assert not use.ignored and not use.faults and list(use.layers) == [Q]
    assert_close(added(use.layers[Q]()), BA if alpha is None else 2.5 * BA)


@pytest.mark.parametrize(
    "name",
    ["transformer.blocks.0.attn1.to_q", "blocks.0.self_attn.q", "diffusion_model.blocks.0.attn1.to_q",
     "lora_unet__blocks_0_self_attn_q", "base_model.model.blocks.0.attn1.to_q"],
)  # fmt: skip
def test_comfyui_passes_over_keys_of_diffusers_peft_and_no_beginning(name):
    use = read("comfyui", pair(name))
    assert not use.layers and len(use.ignored) == 2


def test_comfyui_takes_two_underscores_only_with_the_key_by_which_it_knows_videox_fun():
    files = {**pair("lora_unet__blocks_0_self_attn_q", alpha=4.0), **pair("lora_unet__blocks_0_cross_attn_k")}
    use = read("comfyui", files)
    assert set(use.layers) == {Q, "blocks.0.cross_attn.k"} and not use.ignored
    assert_close(added(use.layers[Q]()), 2 * BA)


@pytest.mark.parametrize(
    "name",
    ["diffusion_model.double_blocks.0.img_attn_qkv", "transformer.double_blocks.0.img_attn_qkv",
     "diffusion_model.double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv"],
)  # fmt: skip
def test_comfyui_knows_hunyuan_video_by_its_own_names_and_by_older_ones(name):
    assert list(read("comfyui", pair(name), "hunyuan-video").layers) == [QKV]


def test_comfyui_does_not_know_musubis_names_of_hunyuan_videos_mlp():  # kohya-ss/musubi-tuner, issue 26
    use = read("comfyui", pair("lora_unet_double_blocks_0_img_mlp_fc1"), "hunyuan-video")
    assert not use.layers and len(use.ignored) == 2
    assert names("hunyuan-video")["lora_unet_double_blocks_0_img_mlp_0"] == "double_blocks.0.img_mlp.fc1"
    assert names("hunyuan-video")["diffusion_model.time_in.in_layer"] == "time_in.mlp.0"
    assert "diffusion_model.time_in.mlp.0" not in names("hunyuan-video")


def test_comfyui_divides_by_the_rank_of_a_lokrs_second_half_and_leaves_alpha_out_where_both_are_whole():
    w1, w2 = torch.randn(2, 3), torch.randn(4, 2)
    name = "lora_unet_blocks_0_self_attn_q"
    whole = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(8.0)}
    assert_close(added(read("comfyui", whole).layers[Q]()), torch.kron(w1, w2).double())
    halved = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": B, f"{name}.lokr_w2_b": A, f"{name}.alpha": torch.tensor(8.0)}
    assert_close(added(read("comfyui", halved).layers[Q]()), 4 * torch.kron(w1.double(), BA))
    assert_close(added(read("musubi", halved).layers[Q]()), 4 * torch.kron(w1.double(), BA))


def test_comfyui_takes_one_of_two_changes_of_a_layer_and_of_whole_tensors_we_know_nothing():
    both = {**pair("diffusion_model." + Q), **pair("lora_unet_blocks_0_self_attn_q")}
    assert any("two changes" in fault for fault in read("comfyui", both).faults)
    assert "blocks.0.norm3" not in str(read("comfyui", pair("diffusion_model." + Q)).ignored)
    use = read("comfyui", {**pair("diffusion_model." + Q), f"diffusion_model.{Q}.diff_b": torch.ones(4)})
    assert any("cannot compare" in fault for fault in use.faults)


def test_comfyui_divides_a_doras_rows_by_the_bases_lengths_and_wants_a_column():
    column = {**pair("diffusion_model." + Q), f"diffusion_model.{Q}.dora_scale": torch.ones(4, 1)}
    use = read("comfyui", column)
    assert use.lengths_of_base and not use.faults and use.layers[Q]().magnitude is not None
    flat = {**pair("diffusion_model." + Q), f"diffusion_model.{Q}.dora_scale": torch.ones(4)}
    assert any("(outputs, 1)" in fault for fault in read("comfyui", flat).faults)


# ---- musubi-tuner


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_musubi_takes_a_missing_alpha_for_the_rank_in_wan(alpha):
    use = read("musubi", pair("lora_unet_blocks_0_self_attn_q", alpha=alpha))
    assert not use.ignored and not use.faults
    assert_close(added(use.layers[Q]()), BA if alpha is None else 2.5 * BA)


def test_musubi_passes_over_lora_a_and_b_two_underscores_and_doras_lengths():
    for name, ends in [("lora_unet_blocks_0_self_attn_q", ("lora_A.weight", "lora_B.weight")),
                       ("lora_unet__blocks_0_self_attn_q", ("lora_down.weight", "lora_up.weight"))]:  # fmt: skip
        assert len(read("musubi", pair(name, ends)).ignored) == 2
    dora = {**pair("lora_unet_blocks_0_self_attn_q"), "lora_unet_blocks_0_self_attn_q.dora_scale": torch.ones(4, 1)}
    assert read("musubi", dora).ignored == ("lora_unet_blocks_0_self_attn_q.dora_scale",)


def test_musubi_puts_hunyuan_videos_lora_into_blocks_alone_and_wants_alphas():
    blocks = read("musubi", pair("lora_unet_double_blocks_0_img_attn_qkv", alpha=2.0), "hunyuan-video")
    assert list(blocks.layers) == [QKV] and not blocks.faults
    assert any(
        "KeyError" in f for f in read("musubi", pair("lora_unet_single_blocks_1_linear1"), "hunyuan-video").faults
    )
    around = read("musubi", pair("lora_unet_final_layer_linear", alpha=2.0), "hunyuan-video")
    assert not around.layers and len(around.ignored) == 3


def test_musubi_does_not_read_a_lokr_whose_first_half_is_a_product_and_stops_at_wans_convolution():
    name = "lora_unet_blocks_0_self_attn_q"
    both = {f"{name}.lokr_w1_a": B, f"{name}.lokr_w1_b": A, f"{name}.lokr_w2": A}
    assert not read("musubi", both).layers
    patch = {"lora_unet_patch_embedding.lora_down.weight": torch.ones(2, 3, 1, 2, 2),
             "lora_unet_patch_embedding.lora_up.weight": torch.ones(4, 2, 1, 1, 1)}  # fmt: skip
    assert any("convolution" in fault for fault in read("musubi", patch).faults)
    assert any("convolution" in fault for fault in read("videox-fun", patch).faults)


# ---- VideoX-Fun


@pytest.mark.parametrize("family", ["wan", "hunyuan-video"])
def test_videox_fun_comes_from_a_name_with_underscores_to_every_layer_and_to_no_other(family):
    known = own_modules(family)
    few = [name for name in known if not any(f".{n}." in name for n in range(3, 64))]
    assert {walked("_" + name.replace(".", "_"), known) for name in few} == set(few)
    assert all(walked("_" + name.replace(".", "_"), known) == name for name in few)
    assert walked("_blocks_0_self_attn_nothing", known) is None


@pytest.mark.parametrize("name", ["lora_unet__blocks_0_self_attn_q", "lora_unet_blocks_0_self_attn_q", Q,
                                  "diffusion_model." + Q])  # fmt: skip
@pytest.mark.parametrize(
    "ends", [("lora_down.weight", "lora_up.weight"), ("lora_A.default.weight", "lora_B.default.weight")]
)
def test_videox_fun_takes_both_beginnings_bare_names_and_pefts_ends(name, ends):
    use = read("videox-fun", pair(name, ends, 5.0))
    assert list(use.layers) == [Q] and not use.ignored and not use.faults
    assert_close(added(use.layers[Q]()), 2.5 * BA)


def test_videox_fun_takes_a_missing_alpha_for_scale_1_passes_over_diffusers_names_and_stops_at_other_ends():
    assert_close(added(read("videox-fun", pair(Q, ("lora_A.weight", "lora_B.weight"))).layers[Q]()), BA)
    assert read("videox-fun", pair("transformer.blocks.0.attn1.to_q")).ignored
    assert read("videox-fun", {"lora_unet__blocks_0_self_attn_q.dora_scale": B}).faults


def test_videox_funs_hunyuan_video_has_the_names_of_diffusers():
    use = read("videox-fun", pair("lora_unet__transformer_blocks_0_ff_context_net_0_proj"), "hunyuan-video")
    assert list(use.layers) == ["transformer_blocks.0.ff_context.net.0.proj"] and use.canonical
    assert not read("videox-fun", pair("lora_unet__double_blocks_0_img_attn_qkv"), "hunyuan-video").layers


# ---- diffusers; that the library itself does so: tests/families/test_lora_loaders.py


def test_diffusers_wants_of_musubis_files_all_layers_of_all_blocks():
    all_ten = {k: t for n in LAYERS for k, t in pair(f"lora_unet_blocks_0_{n.replace('.', '_')}", alpha=1.0).items()}
    assert not read("diffusers", all_ten).faults and len(read("diffusers", all_ten).layers) == 10
    some = {key: tensor for key, tensor in all_ten.items() if "ffn_0" not in key}
    assert any("ffn_0" in fault for fault in read("diffusers", some).faults)


def test_diffusers_knows_alpha_behind_diffusion_model_in_blocks_alone():
    assert not read("diffusers", pair("diffusion_model." + Q, alpha=1.0)).faults
    both = {**pair("diffusion_model." + Q, alpha=1.0), **pair("diffusion_model.text_embedding.0", alpha=1.0)}
    assert any("text_embedding.0.alpha" in fault for fault in read("diffusers", both).faults)


def test_diffusers_makes_each_layers_alpha_its_rank_where_the_header_says_none():
    use = read("diffusers", {**pair("transformer.blocks.0.attn1.to_q", ("lora_A.weight", "lora_B.weight"))})
    assert_close(added(use.layers["blocks.0.attn1.to_q"]()), BA)


# ---- PEFT


def test_peft_goes_by_the_config_alone():
    keys = pair("base_model.model.a.q", ("lora_A.weight", "lora_B.weight"))
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    assert_close(added(read("peft", keys, "causal-lm", **told).layers["a.q"]()), 3 * BA)
    assert_close(added(read("peft", keys, "causal-lm", **told, use_rslora=True).layers["a.q"]()), 6 / 2**0.5 * BA)
    patterns = {**told, "r": 9, "rank_pattern": {"a.q": 2}, "alpha_pattern": {"^a.q": 2}}
    assert_close(added(read("peft", keys, "causal-lm", **patterns).layers["a.q"]()), BA)
    assert any("rank 9" in fault for fault in read("peft", keys, "causal-lm", **{**told, "r": 9}).faults)
    assert read("peft", keys, "causal-lm", **{**told, "target_modules": ["k"]}).ignored
    assert any("DoRA" in fault for fault in read("peft", keys, "causal-lm", **told, use_dora=True).faults)
    half = {key: tensor for key, tensor in keys.items() if "lora_A" in key}
    assert any("missing" in fault for fault in read("peft", half, "causal-lm", **told).faults)


# ---- All


def test_a_file_on_the_disk_is_read_and_an_unknown_program_or_a_language_model_refused(tmp_path):
    save_file(pair("diffusion_model." + Q), tmp_path / "file.safetensors")
    assert list(use_of("comfyui", tmp_path / "file.safetensors", "wan").layers) == [Q]
    with pytest.raises(ConfigError, match="Did you mean 'comfyui'"):
        use_of("comfy-ui", tmp_path / "file.safetensors", "wan")
    with pytest.raises(ModelError, match="musubi knows wan and hunyuan-video"):
        use_of("musubi", tmp_path / "file.safetensors", "causal-lm")
    with pytest.raises(ModelError, match="there is no"):
        use_of("musubi", tmp_path / "other.safetensors", "wan")


@pytest.mark.parametrize("family", ["wan", "hunyuan-video"])
def test_comfyui_has_a_name_for_every_layer_of_the_makers(family):
    assert set(names(family).values()) == set(modules(family).parts)
