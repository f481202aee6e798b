"""Frozen layers multiplied in fp8: which ones, in how many bytes, from what files, and what is refused."""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from pydantic import ValidationError
from torch import nn

from tests.families import networks
from tests.families.test_weights import empty, source
from tests.small import make_qwen3
from weft.errors import ConfigError
from weft.families.causal_lm import CausalLM
from weft.families.computing import check_precision_goes
from weft.families.storage import COMPUTED, Packed, PackedLinear
from weft.families.wan import Wan
from weft.families.weights import Form, fill, weight_bytes
from weft.math.float8 import Float8Kernel
from weft.models import Berth
from weft.projection import projection

FP8 = Form("bf16", compute="fp8")


def in_fp8(network: nn.Module) -> set[str]:
    return {
        path
        for path, layer in network.named_modules()
        if isinstance(layer, PackedLinear) and isinstance(layer.kernel, Float8Kernel)
    }


def test_the_linear_layers_of_inner_blocks_are_in_fp8_and_nothing_else(tmp_path: Path) -> None:
    wanted = networks.wan(layers=3)
    network = empty(wanted)
    fill(network, list(network.blocks), source(tmp_path, wanted.state_dict()), FP8)
    linear = {path for path, layer in wanted.blocks[1].named_modules() if isinstance(layer, nn.Linear)}
    assert in_fp8(network) == {f"blocks.1.{path}" for path in linear} and len(linear) == 10
    layer, weight = network.blocks[1].ffn.net[2], wanted.blocks[1].ffn.net[2].weight
    assert layer.scale.shape == (weight.shape[0], 1) and layer.packing == COMPUTED
    off = (layer.decode(torch.float32) - weight).norm() / weight.norm()
    assert 0.02 < layer.rounding < 0.03 and layer.rounding == pytest.approx(float(off), rel=0.1)


@pytest.mark.parametrize("storage", ["plain", "fp8"])
def test_the_bytes_that_were_foretold_are_the_bytes_in_memory(tmp_path: Path, storage: str) -> None:
    wanted = networks.wan(layers=3)
    form = Form("bf16", storage, compute="fp8")
    with torch.device("meta"):
        skeleton = WanTransformer3DModel.from_config(wanted.config)
    foretold = weight_bytes(skeleton, list(skeleton.blocks), form)
    network = empty(wanted)
    blocks = list(network.blocks)
    fill(network, blocks, source(tmp_path, wanted.state_dict()), form)
    held = [sum(t.numel() * t.element_size() for t in [*b.parameters(), *b.buffers()]) for b in blocks]
    assert [foretold[i] for i in range(3)] == held
    assert held[1] < 0.6 * held[0] if storage == "plain" else held[1] < held[0]


def test_hunyuan_videos_inner_blocks_are_in_fp8_but_for_the_modulation(tmp_path: Path) -> None:
    wanted = networks.hunyuan()
    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel.from_config(wanted.config)
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    kept = weight_bytes(network, blocks, FP8), weight_bytes(network, blocks, Form("bf16"))
    assert [fp8 < full for fp8, full in ((kept[0][i], kept[1][i]) for i in range(4))] == [False, True, True, False]


def test_both_callers_of_a_layer_get_the_same_product() -> None:
    weight = torch.randn(48, 32)
    codes, scale = COMPUTED.encode(weight)
    layer = PackedLinear(Packed(codes, scale, (48, 32), COMPUTED, Float8Kernel()), torch.randn(48), torch.float32)
    asked, x = projection(layer), torch.randn(5, 32)
    assert asked.kernel is layer.kernel
    assert torch.equal(asked.kernel.product(x, *asked.tensors), layer(x))


def scaled(network: WanTransformer3DModel, columns: int, kind: torch.dtype) -> dict[str, torch.Tensor]:
    """The inner block in 8 bits as files have it: one scale (0), or so many for each row."""
    state = dict(network.state_dict())
    for name in [n for n in state if n.startswith("blocks.1.") and n.endswith("weight") and "norm" not in n]:
        weight = state[name]
        parts = weight.reshape(1, -1) if columns == 0 else weight.reshape(len(weight) * columns, -1)
        scale = parts.abs().amax(1, keepdim=True) / torch.finfo(kind).max
        state[name] = (parts / scale).view(weight.shape).to(kind)
        shape = () if columns == 0 else (len(weight), columns)
        state[name.removesuffix("weight") + "scale_weight"] = scale.view(shape)
    return state


@pytest.mark.parametrize("columns", [0, 1])
def test_a_files_own_codes_are_multiplied_where_each_row_has_at_most_one_scale(tmp_path: Path, columns: int) -> None:
    wanted = networks.wan(layers=3)
    state = scaled(wanted, columns, torch.float8_e4m3fn)
    network = empty(wanted)
    fill(network, list(network.blocks), source(tmp_path, state), Form("bf16", "fp8", compute="fp8"))
    layer = network.blocks[1].ffn.net[2]
    assert layer.kernel == Float8Kernel(exact=False)
    assert torch.equal(layer.codes.data, state["blocks.1.ffn.net.2.weight"].view(torch.uint8))
    assert type(network.blocks[0].ffn.net[2]) is nn.Linear  # what its maker left wide stays wide


@pytest.mark.parametrize(("columns", "kind"), [(2, torch.float8_e4m3fn), (1, torch.float8_e5m2)])
def test_other_fp8_files_are_refused_or_rounded_anew_when_that_is_asked_for(tmp_path: Path, columns, kind) -> None:
    wanted = networks.wan(layers=3)
    files = source(tmp_path, scaled(wanted, columns, kind))
    network = empty(wanted)
    with pytest.raises(ConfigError, match=r"keeps 'blocks\.1\..* (in 2 blocks|as e5m2).*family\.dtype=bf16"):
        fill(network, list(network.blocks), files, Form("bf16", "fp8", compute="fp8"))
    fill(network, list(network.blocks), files, FP8)
    assert network.blocks[1].ffn.net[2].packing == COMPUTED


def test_a_network_without_inner_blocks_is_refused(tmp_path: Path) -> None:
    network = networks.wan(layers=2)
    with pytest.raises(ConfigError, match="This network of 2 blocks has none"):
        weight_bytes(network, list(network.blocks), FP8)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_codes_that_are_no_floats_are_refused_in_the_config(dtype: str) -> None:
    for family in (Wan, CausalLM):
        with pytest.raises(ValidationError, match=f"fp8 multiplies eight-bit floats, and dtype={dtype}"):
            family(source="x", dtype=dtype, compute="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_than_bf16_are_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"the engine's precision is {precision} here"):
        check_precision_goes("fp8", precision)
    check_precision_goes("full", precision)


def test_a_language_model_is_computed_in_fp8_too(tmp_path: Path) -> None:
    family = CausalLM(source=str(make_qwen3(tmp_path / "model", layers=3)), compute="fp8")
    network = family.load("bf16", "default", Berth())
    assert len(in_fp8(network)) == 7 and all(".layers.1." in path for path in in_fp8(network))
    foretold = family.weight_bytes("bf16")
    assert foretold[1] < 0.6 * foretold[0]
    with pytest.raises(ConfigError, match="engine's precision is fp32"):
        family.weight_bytes("fp32")
