"""Adapters merged into a base: the merged network answers as the adapted one, whatever its layout and their kind."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tests.families import networks, official
from tests.run.test_stack import lora
from tests.small_text import make_qwen3
from weft.adapters.loha import LoHa
from weft.adapters.lokr import LoKr
from weft.adapters.lora import Lora
from weft.adapters.oft import Oft
from weft.adapters.recipe import recipe_of
from weft.errors import ConfigError, ModelError
from weft.families.checkpoint import open_checkpoint
from weft.families.weights import Form, bare
from weft.formats.adapter_file import SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import FORMATS
from weft.run import merged_weights
from weft.run.block_strengths import BlockStrengths
from weft.run.merged_base import Written, write
from weft.run.merging import Asked, planned

# Sums in another order: of the products in a layer, and of the layers of the network.
REORDERED: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
DEFAULT = "default"


def merged(
    adapters: Sequence[Path], base: Path, out: Path, blocks: str = "", copy: bool = False, **asked: Any
) -> Written:
    strengths = BlockStrengths.parse(blocks) if blocks else BlockStrengths()
    return write(planned(Asked(adapters, base, blocks=strengths, **asked)), out, lambda count: None, copy)


def linear_paths(network: nn.Module) -> tuple[str, ...]:
    """All linear layers but the head, whose rows some layouts keep in words of their own."""
    return tuple(name for name, each in network.named_modules() if isinstance(each, nn.Linear) and name != "lm_head")


@torch.no_grad()
def answer(network: Any, adapter: SavedAdapter | None = None) -> Tensor:
    """What a network says, under an adapter or as it is."""
    asked = {WanTransformer3DModel: networks.wan_inputs, HunyuanVideoTransformer3DModel: networks.hunyuan_inputs}
    make = asked.get(type(network))
    inputs = make(network) if make else {"input_ids": torch.arange(3, 23)[None], "return_dict": False}
    if adapter is None:
        return network(**inputs)[0]
    adapters = recipe_of(adapter, adapter.paths).attach(network, adapter.paths, (DEFAULT,), seed=0)
    adapters.load_state_dict(DEFAULT, adapter.tensors)
    with adapters.use(DEFAULT):
        return network(**inputs)[0]


# ---- Bases: a network, where it lies, and how it is read again ------------------------------------------------------


def wan_diffusers(root: Path) -> Path:
    networks.wan().save_pretrained(root / "transformer", max_shard_size="300KB")
    (root / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return root


def wan_official(root: Path, seed: int = 0) -> Path:
    root.mkdir(parents=True)
    state = official.wan_transformer(networks.randomized(networks.wan(), seed).state_dict())
    save_file(state, root / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (root / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 1}))
    return root


def wan_comfyui(root: Path) -> Path:
    root.mkdir(parents=True)
    state = official.wan_transformer(networks.wan().state_dict())
    save_file({f"model.diffusion_model.{name}": t for name, t in state.items()}, root / "wan.safetensors")
    return root / "wan.safetensors"


def hunyuan_diffusers(root: Path) -> Path:
    networks.hunyuan().save_pretrained(root)
    return root


def hunyuan_official(root: Path) -> Path:
    root.mkdir(parents=True)
    save_file(official.hunyuan_transformer(networks.hunyuan().state_dict()), root / "hunyuan.safetensors")
    return root / "hunyuan.safetensors"


def hunyuan_pickled(root: Path) -> Path:
    root.mkdir(parents=True)
    torch.save({"module": official.hunyuan_transformer(networks.hunyuan().state_dict())}, root / "states.pt")
    return root / "states.pt"


def qwen3(root: Path) -> Path:
    make_qwen3(root)
    AutoModelForCausalLM.from_pretrained(root).save_pretrained(root, max_shard_size="20KB")
    (root / "model.safetensors").unlink()
    return root


def loaded(base: Path, family: str) -> Any:
    """Read by the libraries themselves, or where the names are the makers' by Weft."""
    if (base / "model_index.json").exists():
        return WanTransformer3DModel.from_pretrained(base / "transformer").eval()
    if family == "text":
        return AutoModelForCausalLM.from_pretrained(base).eval()
    if base.is_dir() and family == "hunyuan-video":
        return HunyuanVideoTransformer3DModel.from_pretrained(base).eval()
    checkpoint = open_checkpoint(str(base), None, family)  # type: ignore[arg-type]
    cls = {"wan": WanTransformer3DModel, "hunyuan-video": HunyuanVideoTransformer3DModel}[family]
    like = {"wan": networks.wan, "hunyuan-video": networks.hunyuan}[family]()
    network = bare(lambda: cls.from_config(like.config))
    return checkpoint.network("transformer", network, (), Form("fp32"))


BASES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "wan in diffusers' shards": ("wan", wan_diffusers, "out"),
    "wan in the makers' folder": ("wan", wan_official, "out"),
    "wan in comfyui's file": ("wan", wan_comfyui, "out.safetensors"),
    "hunyuan in diffusers' folder": ("hunyuan-video", hunyuan_diffusers, "out"),
    "hunyuan with fused layers": ("hunyuan-video", hunyuan_official, "out.safetensors"),
    "hunyuan in a pickle": ("hunyuan-video", hunyuan_pickled, "out.safetensors"),
    "qwen3 in shards": ("text", qwen3, "out"),
}


@pytest.mark.parametrize("name", BASES)
def test_the_merged_network_answers_as_the_adapted_one_does(name, tmp_path, monkeypatch):
    monkeypatch.setattr(merged_weights, "CHUNK", 1000)  # so that every weight is worked on in many pieces
    family, make, out = BASES[name]
    base = make(tmp_path / "base")
    network = loaded(base, family)
    adapter = lora(network, linear_paths(network), 3, 2.0, seed=1)
    written = merged([PeftFolder().write(tmp_path / "adapter", adapter)], base, tmp_path / out)
    plain = answer(network)
    found, expected = answer(loaded(tmp_path / out, family)), answer(network, adapter)
    assert (expected - plain).abs().max() > 0.1 and written.compared > 3
    assert_close(found, expected, **REORDERED)


KINDS = {
    "dora": Lora(rank=4, alpha=3.0, dora=True),
    "rslora": Lora(rank=4, alpha=3.0, rslora=True),
    "loha": LoHa(rank=3, alpha=2.0),
    "lokr": LoKr(rank=2, alpha=3.0, factor=8),
    "lokr-both": LoKr(rank=1, alpha=3.0, factor=8, decompose_both=True),
    "oft": Oft(block_size=8),
    "oft-shared": Oft(block_size=8, share_blocks=True),
    "conv": Lora(rank=4, alpha=3.0, conv_rank=2, conv_alpha=1.0),
}


def trained(recipe: Any, network: nn.Module, paths: tuple[str, ...]) -> SavedAdapter:
    """An adapter as after training: nothing in it is zero."""
    adapters = recipe.attach(network, paths, (DEFAULT,), seed=1)
    adapters.initialize()
    chance = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters(DEFAULT).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance)
    tensors = {name: tensor.detach().clone() for name, tensor in adapters.state_dict(DEFAULT).items()}
    return SavedAdapter(**recipe.exported(tensors), targets=paths)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_is_merged_into_fused_and_renamed_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(merged_weights, "CHUNK", 500)
    conv = name == "conv"
    base = (wan_comfyui if conv else hunyuan_official)(tmp_path / "base")
    family = "wan" if conv else "hunyuan-video"
    network = loaded(base, family)
    paths = tuple(p for p in linear_paths(network) if "transformer_blocks.1." in p)
    paths = ("patch_embedding", "blocks.1.ffn.net.2") if conv else paths
    adapter = trained(KINDS[name], loaded(base, family), paths)
    merged([PeftFolder().write(tmp_path / "adapter", adapter)], base, tmp_path / "out.safetensors")
    plain = answer(network)
    found, expected = answer(loaded(tmp_path / "out.safetensors", family)), answer(network, adapter)
    assert (expected - plain).abs().max() > 1e-3
    assert_close(found, expected, **REORDERED)


@pytest.mark.parametrize("name", ["diffusers", "comfyui", "musubi", "videox-fun", "original"])
@pytest.mark.parametrize("base", [wan_official, hunyuan_official])
def test_a_file_of_another_programs_format_is_merged_as_pefts_is(name, base, tmp_path):
    base = base(tmp_path / "base")
    network = networks.wan() if base.is_dir() else networks.hunyuan()
    paths = tuple(path for path in linear_paths(network) if "blocks." in path)
    adapter = lora(network, paths, 3, 2.0, seed=1)
    written = {each: FORMATS[each].write(tmp_path / each, adapter) for each in ("peft", name)}
    found = []
    for each, path in written.items():
        out = tmp_path / (f"out-{each}" if base.is_dir() else f"{each}.safetensors")
        merged([path], base, out)
        found.append(load_file(out / "diffusion_pytorch_model.safetensors" if base.is_dir() else out))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert_close(found[1][key], tensor, rtol=1e-6, atol=1e-6)


# ---- Several, strengths, precisions ---------------------------------------------------------------------------------


@pytest.fixture
def wan(tmp_path) -> Path:
    return wan_official(tmp_path / "base")


@pytest.fixture
def network() -> Any:
    return networks.wan()


def dense(adapter: SavedAdapter, path: str) -> Tensor:
    """The change of a layer in fp64."""
    t = {end: adapter.tensors[f"{path}.lora_{end}.weight"].double() for end in "AB"}
    return adapter.scale_at(path) * t["B"] @ t["A"]


OFFICIAL_NAMES = {"blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.1.attn2.to_v": "blocks.1.cross_attn.v",
                  "blocks.1.ffn.net.2": "blocks.1.ffn.2"}  # fmt: skip


def test_several_adapters_are_added_with_their_weights_and_their_strengths_by_block(wan, network, tmp_path):
    paths = tuple(OFFICIAL_NAMES)
    first, second = lora(network, paths, 3, 2.0, seed=1), lora(network, paths[:2], 2, 4.0, seed=2, rslora=True)
    folders = [PeftFolder().write(tmp_path / "a", first), DiffusersFile().write(tmp_path / "b", second)]
    merged(folders, wan, tmp_path / "out", weights=(0.5, 2), blocks="1-=0.25")
    before, after = (load_file(each / "diffusion_pytorch_model.safetensors") for each in (wan, tmp_path / "out"))
    for path, name in OFFICIAL_NAMES.items():
        block = 0.25 if path.startswith("blocks.1") else 1.0
        expected = before[f"{name}.weight"].double() + block * 0.5 * dense(first, path)
        if path in second.paths:
            expected += block * 2 * dense(second, path)
        assert_close(after[f"{name}.weight"], expected.float(), rtol=1e-6, atol=1e-6)


def test_a_block_at_strength_0_keeps_its_bytes_also_under_a_dora(wan, network, tmp_path):
    adapter = trained(KINDS["dora"], network, ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q"))
    merged([PeftFolder().write(tmp_path / "a", adapter)], wan, tmp_path / "out", blocks="1=0")
    before, after = (load_file(each / "diffusion_pytorch_model.safetensors") for each in (wan, tmp_path / "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["blocks.0.self_attn.q.weight"]


def test_a_sum_is_rounded_once_to_the_precision_of_the_file(network, tmp_path):
    file = tmp_path / "wan.safetensors"
    state = official.wan_transformer(network.bfloat16().state_dict())
    save_file(state, file)
    adapter = lora(network, ("blocks.0.ffn.net.2",), 8, 4.0, seed=1)
    merged([PeftFolder().write(tmp_path / "a", adapter)], file, tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")["blocks.0.ffn.2.weight"]
    exact = state["blocks.0.ffn.2.weight"].double() + dense(adapter, "blocks.0.ffn.net.2")
    # fp32 sums may fall on the other side of the middle between two bf16 numbers, one in thousands.
    assert after.dtype == torch.bfloat16 and (after == exact.bfloat16()).float().mean() > 0.999


def test_scaled_fp8_is_decoded_and_merged_and_its_scales_are_gone(network, tmp_path):
    state = official.wan_transformer(network.state_dict())
    decoded, stored = {}, {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
            decoded[name] = stored[name].float() * scale
        else:
            stored[name] = tensor
    base, out = tmp_path / "wan_fp8_scaled.safetensors", tmp_path / "out.safetensors"
    save_file(stored, base, metadata={"_quantization_metadata": "{}", "modelspec.title": "Wan"})
    adapter = lora(network, ("blocks.0.attn1.to_q",), 3, 2.0, seed=1)
    folder = PeftFolder().write(tmp_path / "a", adapter)
    with pytest.raises(ConfigError, match=r"--dtype: .*keeps weights in fp8 scaled.*Write --dtype bf16"):
        merged([folder], base, out)
    merged([folder], base, out, dtype="bf16")
    after = load_file(out)
    assert after.keys() == state.keys()
    assert_close(after["blocks.1.ffn.0.weight"], decoded["blocks.1.ffn.0.weight"].bfloat16(), rtol=0, atol=0)
    expected = decoded["blocks.0.self_attn.q.weight"] + dense(adapter, "blocks.0.attn1.to_q").float()
    assert_close(after["blocks.0.self_attn.q.weight"].float(), expected, rtol=2**-8, atol=1e-6)
    assert after["blocks.0.modulation"].dtype == after["blocks.0.norm3.bias"].dtype == torch.float32
    with safe_open(out, "pt") as file:
        assert "_quantization_metadata" not in file.metadata() and file.metadata()["modelspec.title"] == "Wan"


def test_a_number_that_the_precision_cannot_hold_is_refused_and_nothing_is_left(wan, network, tmp_path):
    adapter = lora(network, ("blocks.0.attn1.to_q",), 3, 1e6, seed=1)
    with pytest.raises(ModelError, match=r"'blocks.0.self_attn.q.weight' with the change in it has numbers that F16"):
        merged([PeftFolder().write(tmp_path / "a", adapter)], wan, tmp_path / "out", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]
