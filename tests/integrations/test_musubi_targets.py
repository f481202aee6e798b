"""Which layers are adapted: musubi's blocks, its default exclusions, and patterns that only exempt."""

import pytest
import torch
from torch import nn

import weft.integrations.musubi as musubi
from tests.families.official_wan import Sizes
from tests.integrations.small_wan import HYVideoDiffusionTransformer, MMDoubleStreamBlock, WanModel
from weft.errors import ConfigError
from weft.integrations.musubi_targets import architecture_of, targets_in
from weft.names.modules import modules

ATTENTION = [f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"]


class Wan14B(nn.Module):
    """The layers of a release, without memory."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.blocks = nn.ModuleList(block() for _ in range(40))
            self.patch_embedding = nn.Conv3d(16, 5120, (1, 2, 2), (1, 2, 2))


def block(d: int = 5120, ffn: int = 13824) -> nn.Module:
    made = WanAttentionBlock()
    made.self_attn, made.cross_attn = (nn.ModuleDict({n: nn.Linear(d, d) for n in "qkvo"}) for _ in range(2))
    made.ffn = nn.Sequential(nn.Linear(d, ffn), nn.GELU(), nn.Linear(ffn, d))
    return made


class WanAttentionBlock(nn.Module): ...


def paths(network: nn.Module, **patterns: list[str]) -> list[str]:
    known = architecture_of(network)
    exclude = [*patterns.get("exclude", []), *known.exclude]
    return [target.path for target in targets_in(network, known.blocks, exclude, patterns.get("include", []))]


def test_a14b_has_400_layers_and_153_354_240_parameters_at_rank_32():
    network = Wan14B()
    known = architecture_of(network)
    targets = targets_in(network, known.blocks, known.exclude)
    assert len(targets) == 400
    sizes = [(target.layer.in_features, target.layer.out_features) for target in targets]
    assert sum(32 * (inner + out) for inner, out in sizes) == 153_354_240


def test_ten_layers_of_each_wan_block_in_the_order_of_the_network():
    assert paths(WanModel()) == [f"blocks.{i}.{name}" for i in range(2) for name in [*ATTENTION, "ffn.0", "ffn.2"]]


def test_hunyuan_video_has_eight_layers_in_double_blocks_and_two_in_single_ones():
    found = paths(HYVideoDiffusionTransformer(double=2, single=3))
    assert len(found) == 2 * 8 + 3 * 2 and len(paths(HYVideoDiffusionTransformer(20, 40))) == 20 * 8 + 40 * 2
    assert not [path for path in found if "mod" in path or "final" in path or "txt_in" in path]
    assert set(found) <= set(modules("hunyuan-video").parts)


def test_hunyuan_video_1_5_is_told_by_its_double_blocks_alone_and_keeps_modulation():
    network = nn.Module()
    network.double_blocks = nn.ModuleList([MMDoubleStreamBlock(8, 16)])
    assert len(paths(network)) == 8 + 2


def test_every_name_is_one_that_weft_knows_of_the_family():
    for family, network in (("wan", WanModel()), ("hunyuan-video", HYVideoDiffusionTransformer(1, 1))):
        known = architecture_of(network)
        names = {target.name for target in targets_in(network, known.blocks, known.exclude)}
        assert names <= {f"lora_unet_{name}" for name in modules(family).underscored}


def test_an_exclusion_is_matched_with_the_whole_path():
    assert len(paths(WanModel(), exclude=["ffn"])) == 20
    assert len(paths(WanModel(), exclude=[r".*ffn.*"])) == 16


def test_an_inclusion_exempts_from_exclusion_and_does_nothing_else():
    assert len(paths(WanModel(), include=[r".*self_attn.*"])) == 20
    kept = paths(WanModel(), exclude=[".*"], include=[r".*self_attn\.q"])
    assert kept == ["blocks.0.self_attn.q", "blocks.1.self_attn.q"]


def test_patterns_are_given_as_musubi_takes_them():
    network = musubi.create_arch_network(
        1.0, 4, 1.0, None, None, WanModel(), exclude_patterns="[r'.*ffn.*', '.*cross_attn.*']", verbose="True"
    )
    assert [layer.path for layer in network.unet_loras][:4] == [f"blocks.0.self_attn.{n}" for n in "qkvo"]
    assert len(network.unet_loras) == 8


def test_networks_of_other_programs_are_refused_by_name():
    with pytest.raises(ConfigError, match="does not know the blocks of Linear"):
        architecture_of(nn.Linear(2, 2))


def test_a_network_of_another_block_class_is_adapted_by_create_network():
    network = musubi.create_network(["Head"], "lora_unet", 1.0, 4, 1.0, None, None, WanModel())
    assert [layer.lora_name for layer in network.unet_loras] == ["lora_unet_head_head"]


def test_a_pattern_that_is_no_regex_is_refused_and_two_layers_of_one_name_are_too():
    with pytest.raises(ConfigError, match=r"exclude_patterns: '\*ffn' is no regular expression"):
        targets_in(WanModel(), ["WanAttentionBlock"], ["*ffn"])
    network = nn.Module()
    network.a = nn.Module()
    network.a.b = nn.Linear(2, 2)
    network.a_b = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="both called lora_unet_a_b"):
        targets_in(network, None)


class MMSingleStreamBlock(nn.Module):
    """A block with convolutions of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)


@pytest.mark.parametrize("backend", ["peft", "native"])
def test_wide_convolutions_are_adapted_with_conv_dim_alone(backend: str):
    network = nn.Module()
    network.single_blocks = nn.ModuleList([MMSingleStreamBlock()])
    bare = musubi.create_arch_network(1.0, 2, 1.0, None, None, network, backend=backend)
    assert [layer.path for layer in bare.unet_loras] == ["single_blocks.0.narrow"]
    made = musubi.create_arch_network(1.0, 2, 1.0, None, None, network, conv_dim="3", conv_alpha="1.5", backend=backend)
    made.apply_to(None, network)
    shapes = {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}
    assert shapes["lora_unet_single_blocks_0_wide.lora_down.weight"] == (3, 6, 3, 3)
    assert shapes["lora_unet_single_blocks_0_wide.lora_up.weight"] == (4, 3, 1, 1)
    assert made.unet_loras[1].scale == 0.5
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    wide, x = network.single_blocks[0].wide, torch.randn(1, 6, 5, 5)
    layer = made.unet_loras[1]
    kernel = wide.weight + layer.delta(layer.lora_down.weight, layer.lora_up.weight, layer.scale)
    expected = nn.functional.conv2d(x, kernel, wide.bias, padding=1)
    torch.testing.assert_close(wide(x), expected, rtol=1e-4, atol=1e-4)  # sums of 54 products in two orders


def test_image_layers_of_wan_2_1_are_found_too():
    network = WanModel(Sizes(layers=1))
    for name in ("k_img", "v_img"):
        network.blocks[0].cross_attn.add_module(name, nn.Linear(24, 24))
    assert len(paths(network)) == 12
