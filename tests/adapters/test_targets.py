"""Which layers a pattern names. Counts of real Wan models: 8 attention and 2 feed-forward linears in each block."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.adapters.targets import match_targets
from weft.errors import ConfigError

PRESETS = {"attention": r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)"}
ALIASES = {
    "self_attn.q": "attn1.to_q", "cross_attn.q": "attn2.to_q", "self_attn.k": "attn1.to_k",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
          "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")  # fmt: skip
LINEARS = {f"blocks.{n}.{layer}": (6, 4) for n in range(12) for layer in LAYERS} | {"proj_out": (8, 4)}


def paths(*patterns: str, exclude: tuple[str, ...] = ()) -> tuple[str, ...]:
    return match_targets(patterns, exclude, LINEARS, PRESETS, ALIASES).paths


def refusal(*patterns: str, exclude: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        paths(*patterns, exclude=exclude)
    return caught.value


def test_a_set_is_matched_against_whole_paths():
    assert len(paths("attention")) == 12 * 8


def test_a_name_is_an_exact_ending_and_never_a_substring():
    assert paths("attn1.to_q") == tuple(f"blocks.{n}.attn1.to_q" for n in range(12))
    assert len(paths("to_q")) == 24
    assert paths("blocks.1.attn1.to_q") == ("blocks.1.attn1.to_q",)
    # "k" is part of "blocks", and 1.attn1.to_q an ending of block 11's path as text.
    assert len(match_targets(["k"], [], LINEARS, {}, {"self_attn.k": "attn1.to_k"}).paths) == 12
    assert paths("1.attn1.to_q") == ("blocks.1.attn1.to_q",)


def test_other_programs_names_are_translated():
    assert paths("self_attn.q") == paths("attn1.to_q")
    assert paths("q") == paths("to_q")
    assert paths("ffn.0") == paths("ffn.net.0.proj")
    assert paths("blocks.3.self_attn.o") == ("blocks.3.attn1.to_out.0",)


def test_an_alias_may_stand_for_several_layers_and_for_the_head_of_a_path():
    """HunyuanVideo: official checkpoints hold q, k and v in one matrix, and name the blocks otherwise."""
    layers = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    linears = {f"transformer_blocks.{n}.attn.{layer}": (4, 4) for n in range(2) for layer in layers}
    linears |= {f"single_transformer_blocks.0.attn.{layer}": (4, 4) for layer in layers[:3]}
    aliases = {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "double_blocks": "transformer_blocks",
    }

    def found(pattern: str) -> list[str]:
        return [
            path.removeprefix("transformer_blocks.")
            for path in match_targets([pattern], [], linears, {}, aliases).paths
        ]

    assert found("txt_attn_qkv") == [f"{n}.attn.add_{x}_proj" for n in (0, 1) for x in "qkv"]
    assert found("double_blocks.1.img_attn_qkv") == ["1.attn.to_q", "1.attn.to_k", "1.attn.to_v"]
    assert found("double_blocks.1.attn.to_q") == ["1.attn.to_q"]


def test_a_regex_must_match_the_whole_path():
    assert paths(r"blocks\.[0-3]\.attn1\.to_[qk]") == tuple(f"blocks.{n}.attn1.to_{x}" for n in range(4) for x in "qk")
    assert "matches no linear layer" in str(refusal(r"attn1\.to_[qk]"))


def test_all_linear_without_a_familys_word_is_every_linear_in_the_blocks():
    assert len(paths("all-linear")) == 120


def test_exclude_takes_away():
    chosen = paths("attention", exclude=(r"blocks\.(0|11)\..*", "cross_attn.q"))
    assert len(chosen) == 10 * 7 and not any("attn2.to_q" in path for path in chosen)


def test_every_pattern_without_a_layer_is_named_at_once_with_the_nearest():
    error = refusal("atention", "attn1.to_qq", "to_q", "(", exclude=("ffn.net.1",))
    assert len(error.problems) == 4
    assert error.problems[0].startswith("adapter.targets: 'atention' matches no linear layer")
    assert "attention" in error.problems[0] and "attn1.to_q" in error.problems[1]
    assert "not a valid regular expression" in error.problems[2]
    assert error.problems[3].startswith("adapter.exclude: 'ffn.net.1'") and "ffn.net.2" in error.problems[3]


def test_names_in_one_word_are_answered_with_the_list_to_write():
    assert "[q, k, v]" in str(refusal("q,k,v"))


def test_an_exclude_that_leaves_nothing_is_refused():
    assert "nothing is trained" in str(refusal("to_q", exclude=("attention",)))


def test_the_report_says_how_each_pattern_was_read():
    report = match_targets(["attention", "ffn.2"], ["blocks.0.attn1.to_q"], LINEARS, PRESETS, ALIASES)
    assert report.rows() == [
        ("attention", "set", 96, "blocks.0.attn1.to_q"),
        ("ffn.2", "alias", 12, "blocks.0.ffn.net.2"),
        ("not blocks.0.attn1.to_q", "name", 1, "blocks.0.attn1.to_q"),
    ]


@given(st.sets(st.sampled_from(sorted(LINEARS)), min_size=1))
def test_whole_paths_name_themselves_in_network_order(chosen):
    assert paths(*chosen) == tuple(path for path in LINEARS if path in chosen)


GOLDEN = [
    # blocks, heads of width 128, ffn, targets, layers, trainable parameters at rank 32
    (30, 12, 8960, "attention+ffn", 300, 43_745_280),  # Wan 2.1 T2V 1.3B
    (30, 24, 14336, "attention+ffn", 300, 80_609_280),  # Wan 2.2 TI2V 5B
    (30, 24, 14336, "attention", 240, 47_185_920),
    (40, 40, 13824, "attention+ffn", 400, 153_354_240),  # Wan 2.2 A14B, one expert
    (40, 40, 13824, "attention", 320, 104_857_600),
]


@pytest.mark.parametrize(("blocks", "heads", "ffn", "targets", "layers", "parameters"), GOLDEN)
def test_real_wan_models_have_the_layers_and_parameters_of_arithmetic(blocks, heads, ffn, targets, layers, parameters):
    with torch.device("meta"):
        network = WanTransformer3DModel(num_layers=blocks, num_attention_heads=heads, ffn_dim=ffn)
    both = PRESETS | {"attention+ffn": PRESETS["attention"] + r"|blocks\.\d+\.ffn\.net\.(0\.proj|2)"}
    recipe = Lora(rank=32, backend="native", targets=targets)
    report = recipe.match(linears_of(network), both, ALIASES)
    assert len(report.paths) == layers
    assert report.parameters(rank=32) == parameters
    adapters = recipe.attach(network, report.paths, ("student",), 0)
    assert sum(p.numel() for p in adapters.parameters("student").values()) == parameters
