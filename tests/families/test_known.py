"""Released models at their real sizes, without weights: parameters by arithmetic, layers that adapters are put on."""

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, UMT5Config, UMT5EncoderModel

from weft.adapters.modules import linears_of
from weft.adapters.targets import TargetReport, match_targets
from weft.families import known
from weft.families.hunyuan_video import HunyuanVideo, aliases_of
from weft.families.known import RELEASED, VAES
from weft.families.wan import Wan

WAN = [name for name, model in RELEASED.items() if model.family == "wan"]


@cache
def network(name: str) -> nn.Module:
    config = dict(RELEASED[name].network)
    cls = {"wan": WanTransformer3DModel, "hunyuan-video": HunyuanVideoTransformer3DModel}[RELEASED[name].family]
    with torch.device("meta"):
        return cls.from_config(config)


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def wan_numbers(d: int, ffn: int, layers: int, channels: int, out: int, clip: bool) -> int:
    """Weights and biases of spec C.2: linear layers (in + 1) out; norms of queries and keys over the whole width d."""
    attention = 4 * (d + 1) * d + 2 * d
    image_tokens = 2 * (d + 1) * d + d if clip else 0
    block = 2 * attention + image_tokens + 2 * d + (d + 1) * ffn + (ffn + 1) * d + 6 * d
    embeddings = (4 * channels + 1) * d + (4097 * d + (d + 1) * d) + (257 * d + (d + 1) * d) + (d + 1) * 6 * d
    image = 2 * 1280 + 1281 * 1280 + 1281 * d + 2 * d if clip else 0
    head = 2 * d + (d + 1) * 4 * out
    return layers * block + embeddings + image + head


@pytest.mark.parametrize("name", WAN)
def test_wans_transformers_have_the_parameters_of_arithmetic(name: str):
    c = RELEASED[name].network
    wanted = wan_numbers(
        c["num_attention_heads"] * 128, c["ffn_dim"], c["num_layers"], c["in_channels"], c["out_channels"],
        bool(c["image_dim"]),
    )  # fmt: skip
    assert numbers(network(name)) == wanted


def test_they_are_as_large_as_their_names_say():
    billions = {name: round(numbers(network(name)) / 1e9, 1) for name in RELEASED}
    assert billions == {
        "Wan 2.1 T2V 1.3B": 1.4, "Wan 2.1 T2V 14B": 14.3, "Wan 2.1 I2V 14B 480P": 16.4, "Wan 2.1 I2V 14B 720P": 16.4,
        "Wan 2.2 T2V A14B": 14.3, "Wan 2.2 I2V A14B": 14.3, "Wan 2.2 TI2V 5B": 5.0, "HunyuanVideo": 12.8,
    }  # fmt: skip


def test_hunyuanvideo_has_the_parameters_of_arithmetic():
    d, mlp, head = 3072, 12288, 128
    square = (d + 1) * d
    double = 2 * (4 * square + 2 * head + (d + 1) * mlp + (mlp + 1) * d + (d + 1) * 6 * d)
    single = 3 * square + 2 * head + (d + 1) * mlp + (d + mlp + 1) * d + (d + 1) * 3 * d
    two_layers = lambda fan_in: (fan_in + 1) * d + square  # noqa: E731
    refiner = 4 * square + 2 * 2 * d + (d + 1) * mlp + (mlp + 1) * d + (d + 1) * 2 * d
    text = 4097 * d + two_layers(256) + two_layers(4096) + 2 * refiner
    embeddings = (64 + 1) * d + 2 * two_layers(256) + two_layers(768)
    last = (d + 1) * 2 * d + (d + 1) * 64
    assert numbers(network("HunyuanVideo")) == 20 * double + 40 * single + text + embeddings + last


# ---- Layers for adapters ------------------------------------------------------------------------------------------


def report(name: str, *patterns: str) -> TargetReport:
    if RELEASED[name].family == "wan":
        presets, aliases = Wan.targets, Wan.aliases
    else:
        presets, aliases = HunyuanVideo.targets, dict(aliases_of(doubles=20, singles=40))
    return match_targets(patterns, [], linears_of(network(name)), presets, aliases)


GOLDEN = [
    ("Wan 2.2 T2V A14B", "attention+ffn", 400, 153_354_240),
    ("Wan 2.2 I2V A14B", "attention+ffn", 400, 153_354_240),
    ("Wan 2.1 T2V 14B", "attention+ffn", 400, 153_354_240),
    ("Wan 2.1 I2V 14B 480P", "attention+ffn", 480, 179_568_640),
    ("Wan 2.1 I2V 14B 720P", "attention+ffn", 480, 179_568_640),
    ("Wan 2.2 TI2V 5B", "attention+ffn", 300, 80_609_280),
    ("Wan 2.1 T2V 1.3B", "attention+ffn", 300, 43_745_280),
    ("Wan 2.2 TI2V 5B", "attention", 240, 47_185_920),
    ("Wan 2.2 T2V A14B", "attention", 320, 104_857_600),
]


@pytest.mark.parametrize(("name", "targets", "layers", "parameters"), GOLDEN)
def test_the_golden_table_of_wan_at_rank_32(name: str, targets: str, layers: int, parameters: int):
    found = report(name, targets)
    assert (len(found.paths), found.parameters(rank=32)) == (layers, parameters)


@pytest.mark.parametrize("name", WAN)
def test_both_naming_styles_find_the_same_layers(name: str):
    theirs = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    ours = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    if RELEASED[name].network["image_dim"]:
        theirs, ours = [*theirs, "k_img", "v_img"], [*ours, "add_k_proj", "add_v_proj"]
    assert report(name, *theirs).paths == report(name, *ours).paths == report(name, "attention+ffn").paths


def test_hunyuanvideos_layers_by_arithmetic():
    """At rank 32: 32 (in + out). 8 square layers in each of 20 double blocks, 3 in each of 40 single ones."""
    square, mlp, out = 32 * (3072 + 3072), 32 * (3072 + 12288), 32 * (3072 + 12288 + 3072)
    attention = report("HunyuanVideo", "attention")
    assert (len(attention.paths), attention.parameters(rank=32)) == (20 * 8 + 40 * 3, 280 * square)
    both = report("HunyuanVideo", "attention+ffn")
    wanted = 280 * square + 20 * 4 * mlp + 40 * (mlp + out)
    assert (len(both.paths), both.parameters(rank=32)) == (280 + 80 + 80, wanted) == (440, 137_625_600)


def test_hunyuanvideos_official_names_find_the_same_layers():
    def doubles(*names: str) -> list[str]:
        return [f"double_blocks.{n}.{name}" for n in range(20) for name in names]

    theirs = doubles("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj",
                     "img_mlp.fc1", "img_mlp.fc2", "txt_mlp.fc1", "txt_mlp.fc2")  # fmt: skip
    theirs += [f"single_blocks.{n}.{name}" for n in range(40) for name in ("linear1", "linear2")]
    assert report("HunyuanVideo", *theirs).paths == report("HunyuanVideo", "attention+ffn").paths


# ---- Parts around the transformer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [("wan-2.1", 16), ("wan-2.2", 48)])
def test_latents_are_normalised_by_as_many_constants_as_they_have_channels(name: str, channels: int):
    assert len(VAES[name]["latents_mean"]) == len(VAES[name]["latents_std"]) == VAES[name]["z_dim"] == channels


def test_the_autoencoders_are_those_that_diffusers_makes():
    with torch.device("meta"):
        one, other = AutoencoderKLWan(), AutoencoderKLWan.from_config(dict(VAES["wan-2.1"]))
        hunyuan, default = (
            AutoencoderKLHunyuanVideo.from_config(dict(VAES["hunyuan-video"])),
            AutoencoderKLHunyuanVideo(),
        )
        large = AutoencoderKLWan.from_config(dict(VAES["wan-2.2"]))
    assert {k: v for k, v in one.config.items() if k[0] != "_"} == {
        k: v for k, v in other.config.items() if k[0] != "_"
    }
    assert numbers(hunyuan) == numbers(default) and hunyuan.config.scaling_factor == 0.476986
    # Shapes that stand in the published Wan2.2_VAE.pth.
    state = large.state_dict()
    assert tuple(state["quant_conv.weight"].shape) == (96, 96, 1, 1, 1)
    assert tuple(state["decoder.conv_in.weight"].shape) == (1024, 48, 3, 3, 3)
    assert tuple(state["encoder.down_blocks.1.resnets.0.conv1.weight"].shape) == (320, 160, 3, 3, 3)


def test_the_encoders_have_the_sizes_of_arithmetic():
    with torch.device("meta"):
        umt5 = UMT5EncoderModel(UMT5Config.from_dict(dict(known.UMT5_XXL)))
        clip = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(known.CLIP_VISION_H)))
    d, ff = 4096, 10240
    assert numbers(umt5) == 256384 * d + 24 * (4 * d * d + 3 * d * ff + 2 * d + 32 * 64) + d
    d, ff = 1280, 5120
    layer = 4 * (d + 1) * d + (d + 1) * ff + (ff + 1) * d + 4 * d
    assert numbers(clip) == 32 * layer + 3 * 14 * 14 * d + d + 257 * d + 4 * d
    assert CLIPTextConfig.from_dict(dict(known.CLIP_TEXT_L)).hidden_size == 768
    assert LlamaConfig.from_dict(dict(known.LLAVA_LLAMA_3_8B)).num_key_value_heads == 8


def test_samplers_defaults_are_those_of_the_releases():
    shifts = {name: (model.shift, model.steps, model.boundary) for name, model in RELEASED.items()}
    assert shifts["Wan 2.2 T2V A14B"] == (12.0, 40, 0.875)
    assert shifts["Wan 2.2 I2V A14B"] == (5.0, 40, 0.9)
    assert shifts["Wan 2.2 TI2V 5B"] == (5.0, 50, None) and RELEASED["Wan 2.2 TI2V 5B"].expand_timesteps


def test_a_released_model_is_known_by_its_sizes():
    for name, model in RELEASED.items():
        found = known.released(model.family, known.Sizes.of(model.network), experts=2 if model.boundary else 1)
        assert found == name.replace("720P", "480P")  # these two differ in nothing but what they were shown
