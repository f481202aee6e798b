"""What is written in any format and read again changes each layer as before, or is refused by the name of its kind."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from tests.families import networks
from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, A, B, SavedAdapter
from weft.formats.header import read_header
from weft.formats.layers import Layer, adapter_of, trimmed
from weft.formats.reading import FORMATS, read_adapter
from weft.run.changes import change_of, difference


@cache
def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Canonical path -> shape of the weight, of every linear layer and convolution of a real but small network."""
    network = {
        "wan": lambda: networks.wan(layers=1),
        "wan-i2v": lambda: networks.wan(36, clip=True, layers=1),
        "hunyuan": lambda: networks.hunyuan(num_layers=1, num_single_layers=1),
    }[model]()
    kinds = (nn.Linear, nn.Conv3d)
    return {path: tuple(m.weight.shape) for path, m in network.named_modules() if isinstance(m, kinds)}


def chosen(model: str, part: str) -> list[str]:
    """Paths of layers of a model."""
    paths = [path for path, shape in shapes(model).items() if len(shape) == 2]
    attention = [path for path in paths if ".attn" in path and ".token_refiner" not in path]
    return {
        "all": paths,
        "attention": attention,
        "no-q": [path for path in attention if not path.endswith((".to_q", "add_q_proj"))],
        "only-k": [path for path in attention if path.endswith((".to_k", "add_k_proj"))],
        "mlp": [path for path in paths if path.endswith(("proj_mlp", "ff.net.0.proj", "ffn.net.0.proj", "proj_out"))],
        "conv": [path for path, shape in shapes(model).items() if len(shape) > 2] + attention[:2],
    }[part]


def lora(model: str, paths: list[str], ranks: list[int], seed: int, **facts) -> SavedAdapter:
    """Random numbers; the ranks are taken in turn."""
    chance = torch.Generator().manual_seed(seed)
    layers = []
    for place, path in enumerate(paths):
        out, *inner = shapes(model)[path]
        rank = ranks[place % len(ranks)]
        a = torch.randn(rank, *inner, generator=chance)
        b = torch.randn(out, rank, *(1,) * (len(inner) - 1), generator=chance)
        layers.append(Layer(path, {A: a, B: b}, 1.0))
    made = adapter_of("lora", layers, {"weft.step": "7"})
    return replace(made, **facts)


def of_kind(kind: str, model: str, paths: list[str], seed: int) -> SavedAdapter:
    chance = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    tensors = {}
    for path in paths:
        out, inner = shapes(model)[path]
        if kind == "loha":
            sizes = ((out, 3), (3, inner), (out, 3), (3, inner))
            tensors |= {path + end: values(*size) for end, size in zip(ENDS["loha"], sizes, strict=True)}
        else:
            tensors[f"{path}.lokr_w1"] = values(4, 4)
            narrow = max(out, inner) / 4 / 2 > 3
            half = {".lokr_w2_a": values(out // 4, 3), ".lokr_w2_b": values(3, inner // 4)}
            tensors |= {
                path + e: t for e, t in (half if narrow else {".lokr_w2": values(out // 4, inner // 4)}).items()
            }
    options = {"decompose_factor": 4, "decompose_both": False} if kind == "lokr" else {}
    return SavedAdapter(tensors, 3, 5.0, targets=tuple(paths), kind=kind, options=options)


def assert_same_change(read: SavedAdapter, written: SavedAdapter) -> None:
    assert set(read.paths) == set(written.paths)
    apart = {path: difference(change_of(written, path), change_of(read, path)) for path in written.paths}
    assert max(apart.values()) <= 1e-6, max(apart.items(), key=lambda each: each[1])


def round_trip(style: str, adapter: SavedAdapter, folder) -> SavedAdapter:
    """Also asserts that a second time changes no bit of a tensor in the file."""
    written = FORMATS[style].write(folder / "one", adapter)
    read = read_adapter(written)
    assert_same_change(read, adapter)
    again = FORMATS[style].write(folder / "two", read)
    if written.is_file():
        assert bytes_of(written) == bytes_of(again)
    assert adapter.metadata.items() <= read.metadata.items()
    return read


def bytes_of(file: Path) -> bytes:
    """All tensors of a file, with their names."""
    return save(dict(load_file(file)))


CASES = {
    "alpha": {"ranks": [4], "alpha": 3.0},
    "rslora": {"ranks": [6], "alpha": 3.0, "rslora": True},
    "ranks": {"ranks": [7, 2, 5], "alpha": 1.0},
}


PARTS = [*(("all", case) for case in CASES), *((part, "ranks") for part in ("attention", "no-q", "only-k", "mlp"))]


@pytest.mark.parametrize(("part", "case"), PARTS)
@pytest.mark.parametrize("model", ["wan", "wan-i2v", "hunyuan"])
@pytest.mark.parametrize("style", FORMATS)
def test_a_lora_comes_back_with_the_same_change(style, model, part, case, tmp_path):
    facts = dict(CASES[case])
    adapter = lora(model, chosen(model, part), facts.pop("ranks"), seed=1, **facts)
    read = round_trip(style, adapter, tmp_path)
    ranks = {path: len(a) for path, a, *_ in trimmed(adapter)}
    assert {path: len(a) for path, a, *_ in trimmed(read)} == ranks


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("model", ["wan", "hunyuan"])
def test_a_convolution_comes_back_or_is_refused_for_a_program_that_loads_none(model, style, tmp_path):
    adapter = lora(model, chosen(model, "conv"), [4, 3], seed=2, conv_alpha=1.5)
    if style in ("musubi", "videox-fun"):
        with pytest.raises(
            ModelError, match=rf"the {style} format holds linear layers alone, since .* write --to comfy"
        ):
            FORMATS[style].write(tmp_path, adapter)
    else:
        round_trip(style, adapter, tmp_path)


HOLD = {"loha": ("peft", "comfyui", "musubi"), "lokr": ("peft", "comfyui", "musubi"), "dora": ("peft", "diffusers")}


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("kind", HOLD)
@pytest.mark.parametrize("model", ["wan", "wan-i2v", "hunyuan"])
def test_other_kinds_come_back_or_are_refused_by_name(model, kind, style, tmp_path):
    paths = chosen(model, "attention")
    if kind == "dora":
        plain = lora(model, paths, [4], seed=3, alpha=2.0)
        lengths = {path + MAGNITUDE: torch.rand(shapes(model)[path][0]) + 1 for path in paths}
        adapter = replace(plain, tensors={**plain.tensors, **lengths}, dora=True)
    else:
        adapter = of_kind(kind, model, paths, seed=3)
    if style not in HOLD[kind]:
        with pytest.raises(ModelError, match=r"write --to peft, or merge it into the base: weft merge"):
            FORMATS[style].write(tmp_path, adapter)
        assert not list(tmp_path.iterdir())
    elif kind == "lokr" and model == "hunyuan" and style != "peft":
        with pytest.raises(ModelError, match=r"other programs fuse .*LoKrs of them make none"):
            FORMATS[style].write(tmp_path, adapter)
    else:
        round_trip(style, adapter, tmp_path)


def test_q_k_and_v_that_came_from_one_fused_layer_go_back_into_it(tmp_path):
    """One A for the three, as in a file of musubi-tuner: the rank does not grow when it is written again."""
    fused = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(4, 8),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(24, 4),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
        "lora_unet_single_blocks_1_linear1.lora_down.weight": torch.randn(4, 8),
        "lora_unet_single_blocks_1_linear1.lora_up.weight": torch.randn(24 + 16, 4),
        "lora_unet_single_blocks_1_linear1.alpha": torch.tensor(2.0),
        "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": torch.randn(4, 8),
        "lora_unet_double_blocks_0_img_mlp_fc1.lora_up.weight": torch.randn(16, 4),
        "lora_unet_double_blocks_0_img_mlp_fc1.alpha": torch.tensor(2.0),
    }
    save_file(fused, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    q = "transformer_blocks.0.attn.to_q"
    assert {f"single_transformer_blocks.1.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")} <= set(
        read.paths
    )
    rows = fused["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][:8]
    down = fused["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]
    torch.testing.assert_close(change_of(read, q).delta(), 0.5 * rows @ down)
    written = FORMATS["musubi"].write(tmp_path / "b.safetensors", read)
    assert bytes_of(written) == bytes_of(tmp_path / "a.safetensors")
    assert read_header(written).metadata["ss_network_module"] == "networks.lora"
