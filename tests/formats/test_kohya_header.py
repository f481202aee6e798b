"""The words of kohya's tools are told from a header of ours, truthfully, and the hashes are those of the file."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weft.formats.adapter_file import SavedAdapter
from weft.formats.kohya_header import kohya_header, tensor_hashes

WAN, HUNYUAN, TEXT = "blocks.0.attn1.to_q", "transformer_blocks.0.attn.to_q", "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "name": "walking-dog",
    "family": {"kind": "wan", "source": "/home/lovelace/models/Wan2.2-I2V-A14B", "dtype": "fp8",
               "files": {"high": "C:\\lovelace\\high_noise.safetensors", "vae": "/home/lovelace/Wan2.1_VAE.pth"}},
    "adapter": {"kind": "lora", "rank": 16, "activation_dropout": 0.1, "lora_plus": 16.0, "rank_dropout": 0.0},
    "objective": {"kind": "flow-matching", "weighting": "none", "times": [0.0, 0.95],
                  "timesteps": {"kind": "shift", "shift": 5.0, "scale": 1.0}},
    "optimizer": {"kind": "adamw", "lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "data": {"kind": "video", "batch_size": 2, "caption_prefix": "ohwx dog",
             "sources": [{"path": "/home/lovelace/clips/dog", "repeats": 3, "caption_extension": ".txt"}],
             "buckets": {"sizes": [[480, 832], [832, 480], [256, 256]], "sides": [], "frames": [49, 81]}},
    "engine": {"precision": "auto", "recompute": True, "offload_inputs": False},
    "schedule": {"steps": 1000, "accumulate": 1, "max_norm": 1.0, "curve": "constant", "warmup": 10, "epochs": None},
}  # fmt: skip
METADATA = {
    "weft.config": json.dumps(CONFIG), "weft.family": "wan", "weft.version": "0.1.0", "weft.seed": "7",
    "weft.data.items": "54", "weft.step": "500", "weft.expert": "high", "weft.times": "[0.9, 1.0]",
    "weft.precision": "bf16", "weft.started": "1767225600", "weft.saved": "1767229200",
}  # fmt: skip


def lora(metadata: Mapping[str, str], path: str = WAN, alpha: float = 8.0, rslora: bool = False) -> SavedAdapter:
    tensors = {f"{path}.lora_A.weight": torch.ones(16, 6), f"{path}.lora_B.weight": torch.ones(8, 16)}
    return SavedAdapter(tensors, rank=16, alpha=alpha, rslora=rslora, metadata=metadata)


def test_what_the_config_says_is_told_in_musubis_words():
    told = kohya_header(lora(METADATA), "networks.lora_wan")
    expected = {
        "ss_network_module": "networks.lora_wan", "ss_network_dim": "16", "ss_network_alpha": "8",
        "ss_network_dropout": "0.1", "ss_base_model_version": "wan", "ss_output_name": "walking-dog",
        "ss_learning_rate": "0.0002", "ss_lr_scheduler": "constant_with_warmup", "ss_lr_warmup_steps": "10",
        "ss_max_train_steps": "1000", "ss_steps": "500", "ss_seed": "7", "ss_mixed_precision": "bf16",
        "ss_optimizer": "torch.optim.adamw.AdamW(betas=(0.9, 0.999),eps=1e-08,weight_decay=0.01)",
        "ss_timestep_sampling": "shift", "ss_discrete_flow_shift": "5", "ss_sigmoid_scale": "1",
        "ss_weighting_scheme": "none", "ss_num_train_items": "54", "ss_gradient_checkpointing": "True",
        "ss_fp8_base": "True", "ss_sd_model_name": "high_noise.safetensors", "ss_vae_name": "Wan2.1_VAE.pth",
        "ss_training_started_at": "1767225600",
    }  # fmt: skip
    assert {key: told.get(key) for key in expected} == expected
    assert json.loads(told["ss_network_args"]) == {"loraplus_lr_ratio": "16"}
    assert json.loads(told["ss_datasets"]) == [
        {"resolution": [480, 832], "target_frames": [49, 81], "caption_extension": ".txt",
         "batch_size_per_device": 2, "num_repeats": 3, "video_directory": "dog"}
    ]  # fmt: skip
    assert "ss_num_epochs" not in told  # nobody said


def test_modelspec_names_the_model_the_trigger_words_and_the_trained_times():
    told = kohya_header(lora(METADATA), "networks.lora_wan")
    assert told["modelspec.sai_model_spec"] == "1.0.0"
    assert told["modelspec.architecture"] == "wan2.1/lora"
    assert told["modelspec.implementation"] == "https://github.com/Wan-Video/Wan2.1"
    assert told["modelspec.title"] == "walking-dog (high noise)"
    assert told["modelspec.resolution"] == "480x832"
    assert told["modelspec.trigger_phrase"] == "ohwx dog"
    assert told["modelspec.timestep_range"] == "900,950"
    assert told["modelspec.date"] == "2026-01-01T01:00:00+00:00"
    assert kohya_header(lora(METADATA), "", "diffusers")["modelspec.implementation"] == "diffusers"


def test_no_folder_of_the_users_machine_is_told():
    text = json.dumps(kohya_header(lora(METADATA), "networks.lora_wan"))
    assert "lovelace" not in text and "/home" not in text and "C:" not in text


def test_alpha_is_that_of_the_file_where_rslora_reckons_otherwise():
    told = kohya_header(lora({}, rslora=True), "networks.lora_wan")
    assert float(told["ss_network_alpha"]) / int(told["ss_network_dim"]) == 8 / 16**0.5


@pytest.mark.parametrize(("path", "version"), [(WAN, "wan"), (HUNYUAN, "hunyuan_video"), (TEXT, None)])
def test_an_adapter_without_provenance_says_its_base_by_its_layers_and_nothing_else(path: str, version: str | None):
    told = kohya_header(lora({}, path), "networks.lora")
    assert told.get("ss_base_model_version") == version
    known = {"ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version"}
    spec = {"sai_model_spec", "architecture", "implementation", "title"} if version else set()
    assert set(told) == known - (set() if version else {"ss_base_model_version"}) | {f"modelspec.{k}" for k in spec}


@pytest.mark.parametrize(
    ("timesteps", "told"),
    [
        ({"kind": "uniform"}, {"ss_timestep_sampling": "uniform"}),
        ({"kind": "sigmoid", "scale": 1.5}, {"ss_timestep_sampling": "sigmoid", "ss_sigmoid_scale": "1.5"}),
        ({"kind": "shift", "shift": 3.0, "scale": None}, {"ss_discrete_flow_shift": "3"}),  # musubi has no such density
        ({"kind": "logit-normal", "mean": 0.5, "std": 1.0},
         {"ss_timestep_sampling": "sigma", "ss_logit_mean": "0.5", "ss_logit_std": "1"}),
    ],
)  # fmt: skip
def test_densities_that_musubi_has_no_word_for_are_left_out(timesteps: dict[str, Any], told: dict[str, str]):
    config = {**CONFIG, "objective": {"kind": "flow-matching", "weighting": "none", "timesteps": timesteps}}
    header = kohya_header(lora({**METADATA, "weft.config": json.dumps(config)}), "networks.lora_wan")
    words = ("ss_timestep_sampling", "ss_sigmoid_scale", "ss_discrete_flow_shift", "ss_logit_mean", "ss_logit_std")
    assert {key: header[key] for key in words if key in header} == told


def test_a_sum_of_adapters_says_whom_it_was_made_from():
    parents = [
        {"adapter": "/home/lovelace/a", "run": "dog"},
        {"adapter": "/home/lovelace/cat.safetensors", "run": None},
    ]
    told = kohya_header(lora({**METADATA, "weft.merged": json.dumps({"parents": parents})}), "")
    assert told["modelspec.merged_from"] == "dog, cat.safetensors"


def test_a_damaged_header_is_no_hindrance():
    assert kohya_header(lora({"weft.config": "{", "weft.family": "wan"}), "")["ss_network_dim"] == "16"


def test_the_hashes_are_those_of_the_files_bytes(tmp_path: Path):
    tensors = {"b": torch.arange(300_000.0), "a": torch.ones(4, dtype=torch.bfloat16)}
    metadata = {"ss_seed": "1", "modelspec.title": "x" * 500}
    found = tensor_hashes(tensors, metadata)
    save_file(tensors, tmp_path / "x.safetensors", {"ss_seed": "1"})  # what kohya hashes has the ss_ keys alone
    raw = (tmp_path / "x.safetensors").read_bytes()
    after = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert found["sshs_model_hash"] == sha256(after).hexdigest() == found["modelspec.hash_sha256"].removeprefix("0x")
    assert found["sshs_legacy_hash"] == sha256(raw[0x100000:0x110000]).hexdigest()[:8]
