"""Two adapters are alike when their changes are; a written file, when its program makes the same changes of it."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.families.networks import hunyuan, wan
from tests.small_adapters import loha_on, lokr_on, lora_on
from weft import plugins
from weft.formats.adapter_file import SavedAdapter
from weft.run.changes import change_of
from weft.run.verifying import check_export, compare

VIDEO = ("comfyui", "musubi", "videox-fun", "original", "diffusers", "peft")
SMALL: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 16, "ffn_dim": 24}
# Qwen's widths differ between q and k.
DECODER = nn.ModuleDict(
    {"model": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({
        "self_attn": nn.ModuleDict({"q_proj": nn.Linear(16, 32), "k_proj": nn.Linear(16, 20)}),
        "mlp": nn.ModuleDict({"up_proj": nn.Linear(16, 24)}),
    })])})}
)  # fmt: skip
Network = Callable[[], nn.Module]
NETWORKS: dict[str, Network] = {
    "wan": lambda: wan(layers=1, **SMALL),
    "wan-i2v": lambda: wan(36, clip=True, layers=1, **{**SMALL, "added_kv_proj_dim": 16}),
    "hunyuan": lambda: hunyuan(num_layers=1, num_single_layers=1, attention_head_dim=16, rope_axes_dim=(4, 6, 6)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]()


def written(adapter: SavedAdapter, to: str, folder: Path) -> Path:
    target = folder / (f"{to}.safetensors" if to != "peft" else to)
    return plugins.find("format", to)().write(target, adapter)


@pytest.mark.parametrize("to", VIDEO)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_program_makes_of_its_file_what_the_source_changes(network, to, rslora, tmp_path):
    adapter = lora_on(network, rslora=rslora)
    verified = check_export(written(adapter, to, tmp_path), to, adapter)
    assert verified.is_equal, verified
    assert set(verified.differences) == set(adapter.paths) and verified.largest < 2e-7
    receipt = json.loads(verified.receipt())
    assert receipt == {"by": to, "largest": verified.largest, "layers": len(adapter.paths)}


@pytest.mark.parametrize("to", VIDEO)
def test_a_part_of_a_fused_layer_leaves_the_others_as_they_are(to, tmp_path):
    adapter = lora_on(NETWORKS["hunyuan"](), r"(single_)?transformer_blocks\.\d+\.(attn\.to_[qv]|proj_mlp)")
    verified = check_export(written(adapter, to, tmp_path), to, adapter)
    assert verified.is_equal, verified


@pytest.mark.parametrize("to", ["comfyui", "musubi"])
@pytest.mark.parametrize("make", [loha_on, lokr_on])
def test_loha_and_lokr_are_what_the_source_changes(to, make, tmp_path):
    adapter = make(NETWORKS["wan"]())
    verified = check_export(written(adapter, to, tmp_path), to, adapter)
    assert verified.is_equal, verified


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_peft_reads_a_language_models_adapter_of_every_kind(kind, tmp_path):
    make = {"loha": loha_on, "lokr": lokr_on}.get(kind)
    adapter = make(DECODER, ".*proj") if make else lora_on(DECODER, ".*proj", dora=kind == "dora")
    assert check_export(written(adapter, "peft", tmp_path), "peft", adapter).is_equal


@pytest.mark.parametrize("to", ["comfyui", "musubi", "videox-fun"])
def test_a_file_without_its_alphas_is_found_out(to, tmp_path):
    adapter = lora_on(NETWORKS["wan"](), alpha=12.0)
    path = written(adapter, to, tmp_path)
    save_file({key: t for key, t in load_file(path).items() if not key.endswith(".alpha")}, path)
    verified = check_export(path, to, adapter)
    assert not verified.is_equal and len(verified.worst(100)) == len(adapter.paths)
    assert verified.largest == pytest.approx(3 / 4)  # |4 - 1| / 4: alpha / rank is 4


def test_a_dora_in_comfyui_is_found_out(tmp_path):
    """Its dora_scale / |W| is not our m / |W + dW|, however alike the numbers in the file are."""
    adapter = lora_on(NETWORKS["wan"]())
    path = written(adapter, "comfyui", tmp_path)
    sizes = {name: len(adapter.tensors[f"{name}.lora_B.weight"]) for name in adapter.paths}
    lengths = {f"{name}.lora_magnitude_vector": torch.ones(size) for name, size in sizes.items()}
    scales = {
        key.replace("lora_B.weight", "dora_scale"): torch.ones(len(t), 1)
        for key, t in load_file(path).items()
        if key.endswith("lora_B.weight")
    }
    save_file({**load_file(path), **scales}, path)
    dora = replace(adapter, tensors={**adapter.tensors, **lengths}, dora=True)
    verified = check_export(path, "comfyui", dora)
    assert verified.largest == 0 and not verified.is_equal and "lengths of the base's rows" in verified.faults[0]


def test_a_lost_layer_a_strange_key_and_swapped_rows_are_found_out(tmp_path):
    adapter = lora_on(NETWORKS["hunyuan"]())
    path = written(adapter, "comfyui", tmp_path)
    whole = load_file(path)
    qkv = "diffusion_model.double_blocks.0.img_attn_qkv.lora_B.weight"
    if qkv not in whole:
        qkv = "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"
    thirds = whole[qkv].chunk(3)
    save_file({**whole, qkv: torch.cat([thirds[1], thirds[0], thirds[2]])}, path)
    swapped = check_export(path, "comfyui", adapter)
    assert {layer for layer, _ in swapped.worst(9)} == {f"transformer_blocks.0.attn.to_{each}" for each in "qk"}
    save_file({key: t for key, t in whole.items() if "single_blocks.0.linear2" not in key}, path)
    assert check_export(path, "comfyui", adapter).alone == ("single_transformer_blocks.0.proj_out",)
    save_file({**whole, "diffusion_model.double_blocks.0.img_attn.norm.lora_A.weight": torch.ones(2, 2)}, path)
    assert len(check_export(path, "comfyui", adapter).ignored) == 1


def test_a_layer_that_the_source_leaves_alone_may_not_be_changed(tmp_path):
    adapter = lora_on(NETWORKS["wan"](), r"blocks.0.attn1.to_[qk]")
    less = lora_on(NETWORKS["wan"](), r"blocks.0.attn1.to_q")
    path = written(adapter, "musubi", tmp_path)
    assert check_export(path, "musubi", less).alone == ("blocks.0.attn1.to_k",)


# Of an adapter of all layers in the blocks: written for -> the programs besides that read the same of it.
OTHERS_TOO: dict[str, dict[str, set[str]]] = {
    "wan": {"comfyui": {"diffusers", "videox-fun"}, "musubi": {"comfyui", "diffusers", "videox-fun"},
            "videox-fun": {"comfyui"}, "original": {"videox-fun"}},
    "hunyuan": {},
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS_TOO)
@pytest.mark.parametrize("to", VIDEO)
def test_who_loads_whose_files_is_as_the_documents_matrix_says(family, to, tmp_path):
    adapter = lora_on(NETWORKS[family]())
    path = written(adapter, to, tmp_path)
    reading = {program for program in VIDEO if check_export(path, program, adapter).is_equal}
    assert reading == {to, *OTHERS_TOO[family].get(to, set())}


@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui", "original"])
def test_a_convolution_of_patches_is_what_the_source_changes(to, tmp_path):
    chance = torch.Generator().manual_seed(6)
    plain = lora_on(NETWORKS["wan"]())
    tensors = {
        **plain.tensors,
        "patch_embedding.lora_A.weight": torch.randn(2, 16, 1, 2, 2, generator=chance),
        "patch_embedding.lora_B.weight": torch.randn(16, 2, 1, 1, 1, generator=chance),
    }
    adapter = replace(plain, tensors=tensors, conv_rank=2, conv_alpha=3.0)
    verified = check_export(written(adapter, to, tmp_path), to, adapter)
    assert verified.is_equal and "patch_embedding" in verified.differences, verified


# ---- Two adapters


def test_a_difference_is_relative_and_that_of_the_products():
    one = lora_on(DECODER, ".*proj")
    assert compare(one, one).largest == 0 and compare(one, one).is_equal
    halved = {key: tensor / 2 if "lora_A" in key else tensor for key, tensor in one.tensors.items()}
    assert compare(one, replace(one, tensors=halved, alpha=10.0)).is_equal
    assert compare(one, replace(one, tensors=halved)).largest == pytest.approx(0.5)
    turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    other = {key: turned @ t if "lora_A" in key else t @ turned.mT for key, t in one.tensors.items()}
    found = compare(one, replace(one, tensors=other))
    assert found.is_equal and 0 < found.largest < 1e-6
    slow = max(
        float((change_of(one, p).delta() - change_of(replace(one, tensors=other), p).delta()).norm()
              / change_of(one, p).delta().norm()) for p in one.paths
    )  # fmt: skip
    assert found.largest == pytest.approx(slow, abs=3e-7)


def test_layers_of_one_alone_count_only_when_they_are_changed():
    one, more = lora_on(DECODER, ".*q_proj"), lora_on(DECODER, ".*[qk]_proj")
    assert compare(one, more).alone == ("model.layers.0.self_attn.k_proj",) and not compare(more, one).is_equal
    zero = {key: torch.zeros_like(t) if "k_proj.lora_B" in key else t for key, t in more.tensors.items()}
    same = {**zero, **one.tensors}
    assert compare(one, replace(more, tensors=same)).is_equal


def test_other_kinds_are_compared_by_what_they_change_and_a_dora_is_no_lora():
    loha = loha_on(DECODER, ".*proj", rank=1, alpha=2.0)
    tensors = {}
    for path in loha.paths:  # (a b)(c d) number by number, of rank 1, is (a * c)(b * d)
        parts = {end: loha.tensors[f"{path}.hada_{end}"] for end in ("w1_a", "w1_b", "w2_a", "w2_b")}
        tensors[f"{path}.lora_A.weight"] = parts["w1_b"] * parts["w2_b"]
        tensors[f"{path}.lora_B.weight"] = parts["w1_a"] * parts["w2_a"]
    assert compare(loha, SavedAdapter(tensors, 1, 2.0)).is_equal
    lora = lora_on(DECODER, ".*proj")
    dora = lora_on(DECODER, ".*proj", dora=True)
    assert compare(lora, dora).largest == inf
    longer = {key: 1.01 * t if "magnitude" in key else t for key, t in dora.tensors.items()}
    assert compare(dora, replace(dora, tensors=longer)).largest == pytest.approx(0.01, rel=1e-4)


def test_numbers_that_are_none_are_never_alike():
    one = lora_on(DECODER, ".*proj")
    broken = {key: t.clone() for key, t in one.tensors.items()}
    broken["model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    assert not compare(one, replace(one, tensors=broken)).is_equal


def test_a_layer_of_14b_takes_a_fraction_of_a_second():
    chance = torch.Generator().manual_seed(5)
    names = ("blocks.0.ffn.net.2.lora_A.weight", "blocks.0.ffn.net.2.lora_B.weight")
    shapes = ((64, 13824), (5120, 64))
    one, other = (
        SavedAdapter({n: torch.randn(s, generator=chance) for n, s in zip(names, shapes, strict=True)}, 64, 32.0)
        for _ in range(2)
    )
    began = time.process_time()
    assert compare(one, other).largest == pytest.approx(2**0.5, rel=0.05)  # two independent directions
    assert time.process_time() - began < 2  # 0.04 s on an idle core: QR and fp64 matrices of 5120 x 13824 take more
