"""VeOmni's files of both generations become runs, its traps are told, and what Weft does not train is refused."""

from math import ceil
from pathlib import Path

import pytest
import yaml

from tests.importers.conftest import CONFIGS, Import
from tests.importers.expected import check
from weft.errors import ConfigError
from weft.importers.detect import recognised
from weft.importers.reading import read
from weft.importers.veomni_keys import OLDER, REASONS

HERE = CONFIGS / "veomni"
RUNS = ("qwen3_lora.yaml", "qwen3_older.yaml", "wan_offline.yaml", "wan_ddp.yaml", "plain_muon.yaml",
        "regex_rslora.yaml", "misspelt.yaml")  # fmt: skip


def small(tmp_path: Path, model: object = None, data: object = None, train: object = None) -> Path:
    """A small config of a language model with some of its keys changed."""
    lora = {"rank": 8, "alpha": 8, "lora_modules": ["q_proj"]}
    whole = {
        "model": {"model_path": "/models/Qwen3-4B", "lora_config": lora, **(model if isinstance(model, dict) else {})},
        "data": {"train_path": "/data/a.jsonl", **(data if isinstance(data, dict) else {})},
        "train": {"checkpoint": {"output_dir": "/runs/a"}, **(train if isinstance(train, dict) else {})},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.parametrize("name", [*RUNS, "dpo.yaml", "flux.yaml"])
def test_a_config_is_told_by_its_three_sections(name: str):
    assert recognised([read(HERE / name)]) == "veomni"


@pytest.mark.parametrize("name", RUNS)
def test_each_config_becomes_a_run_that_parses(name: str, imported: Import):
    assert imported(HERE / name).program == "VeOmni"


def test_qwen3_with_lora(imported: Import):
    found = imported(HERE / "qwen3_lora.yaml")
    steps = 2 * ceil(750_000 / (8 * 2048))
    check(found.run, {
        "name": "tulu", "output": "exp", "seed": 42, "resume": "auto", "family.kind": "causal-lm",
        "family.source": "./Qwen3-0.6B-Base", "family.kernels.attention": "flash",
        "family.kernels.cross_entropy": "liger", "family.kernels.rms_norm": "eager", "family.kernels.mlp": "auto",
        "adapter.rank": 64, "adapter.alpha": 32, "adapter.targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "adapter.exclude": ("lm_head",), "adapter.input_dropout": 0.05,
        "adapter.start_from": "exp/first/global_step_500", "objective.kind": "next-token",
        "data.kind": "chat", "data.length": 2048, "data.pack": True, "data.batch_size": 2, "data.truncate": "cut_end",
        "data.sources.0.path": "tulu-3-sft-mixture", "parallel.shard": "auto", "parallel.sequence": 2,
        "parallel.sequence_method": "ulysses", "engine.read": "broadcast", "engine.recompute": True,
        "engine.precision": "bf16", "schedule.steps": steps, "schedule.global_batch": 8,
        "schedule.warmup": round(0.1 * steps), "schedule.curve": "cosine", "schedule.floor": 0.01,
        "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.0, "optimizer.betas": (0.9, 0.95),
        "save.every": 100, "save.every_epochs": 1, "track.to": ("wandb",), "track.project": "VeOmni",
    })  # fmt: skip
    assert {"data.chat_template", "train.init_device", "train.checkpoint.manager"} <= found.dropped.keys()
    assert "model.ops_implementation.moe_implementation" in found.dropped


def test_names_of_the_first_year(imported: Import):
    found = imported(HERE / "qwen3_older.yaml")
    check(found.run, {
        "name": "qwen", "output": "/runs", "family.kernels.attention": "sdpa", "adapter.rank": 16, "adapter.alpha": 32,
        "adapter.targets": ("q_proj", "v_proj"), "data.sources.0.path": "/data/a.jsonl",
        "data.sources.1.path": "/data/b.jsonl", "data.length": 4096, "data.pack": True, "parallel.shard": 4,
        "parallel.data": 2, "engine.read": "each", "engine.offload_inputs": True, "optimizer.lr": 2e-5,
        "optimizer.weight_decay": 0.1, "schedule.steps": 300, "schedule.warmup": 9, "schedule.curve": "linear",
        "schedule.global_batch": 16, "save.every": 50, "save.every_epochs": 0, "track.to": (),
    })  # fmt: skip
    assert "no run of Weft's" in found.dropped["train.load_checkpoint_path"]
    assert any("tp_size 2" in text for text in found.warnings)
    assert [note.key for note in found.of("model.lora_rank")] == ["adapter.rank"]
    assert not found.of("model.lora_config.rank"), "settings are told of by the names that stand in the file"


def test_wan_from_embeddings_made_beforehand(imported: Import):
    found = imported(HERE / "wan_offline.yaml")
    check(found.run, {
        "family.kind": "wan", "family.source": "/models/Wan2.1-T2V-1.3B-Diffusers", "family.attention": "native",
        "adapter.rank": 128, "adapter.alpha": 64, "objective.timesteps.kind": "shift", "objective.timesteps.shift": 3.0,
        "objective.timesteps.scale": None, "data.fps": 24, "data.buckets.frames": (77,), "data.caption_dropout": 0.0,
        "parallel.sequence": 4, "parallel.sequence_method": "auto", "schedule.epochs": 20, "save.every": 0, "seed": 3,
    })  # fmt: skip
    assert found.asked == ["data.sources.0.path", "data.buckets.sides"]
    assert (
        "its own cache" in found.dropped["data.train_path"]
        and "same as offline" in found.dropped["train.training_task"]
    )
    assert any(text.startswith("train.optimizer.lr_warmup_ratio") and "weft plan" in text for text in found.warnings)


def test_wan_on_whole_copies_with_the_official_names_of_layers(imported: Import):
    found = imported(HERE / "wan_ddp.yaml")
    check(found.run, {
        "family.source": "models/Wan2.1-I2V-14B-480P", "adapter.targets": ("q", "k", "v", "o", "ffn.0", "ffn.2"),
        "parallel.shard": 1, "engine.precision": "bf16", "schedule.steps": 4000, "objective.timesteps.shift": 5.0,
    })  # fmt: skip
    assert "train.bsz_warmup_ratio" in found.dropped


def test_plain_texts_as_a_stream_with_muon(imported: Import):
    found = imported(HERE / "plain_muon.yaml")
    check(found.run, {
        "data.sources.0.format": "text", "data.sources.0.columns": {"text": "content_split"},
        "data.sources.0.streaming": True, "data.length": 8192, "optimizer.path": "torch.optim.Muon",
        "optimizer.lr": 2e-3, "adapter.rank": 64, "adapter.targets": "all", "schedule.epochs": 3,
    })  # fmt: skip
    assert found.run.optimizer.args["momentum"] == 0.9 and found.run.optimizer.args["adjust_lr_fn"] == "match_rms_adamw"


def test_a_regex_of_targets_and_an_alpha_that_is_not_given(imported: Import):
    found = imported(HERE / "regex_rslora.yaml")
    check(found.run, {
        "adapter.targets": r"model\.layers\.\d+\.self_attn\..*", "adapter.rank": 32, "adapter.alpha": 8,
        "adapter.rslora": True, "data.pack": False, "data.sources.0.columns": {"messages": "chat"},
    })  # fmt: skip
    assert found.asked == ["data.sources.0.path"] and any("takes 8" in text for text in found.warnings)


def test_misspelt_keys_are_told_with_their_lines_and_the_nearest(imported: Import):
    found = imported(HERE / "misspelt.yaml")
    assert any("misspelt.yaml:6: 'train.micro_bach_size' is no key of VeOmni" in text for text in found.warnings)
    assert "Did you mean 'model.lora_config.lora_dropout'?" in found.dropped["model.lora_config.lora_dropuot"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dpo.yaml", r"dpo\.yaml:4: this trains on preferences \(DPO\)"),
        ("flux.yaml", r"flux\.yaml:1: .*Weft trains Wan, HunyuanVideo and models of text alone"),
        ("no_section.yaml", r"no_section\.yaml:3: 'train' is 5. Expected was a section of VeOmni's"),
        ("broken.yaml", r"broken\.yaml:3:1: a tab stands here"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(name: str, said: str, imported: Import):
    with pytest.raises(ConfigError, match=said):
        imported(HERE / name, program="veomni")


@pytest.mark.parametrize("model", ["Qwen2.5-VL-7B", "qwen3_omni", "Qwen-Image-20B/qwen_image"])
def test_models_with_eyes_are_refused(model: str, tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match="models of text alone"):
        imported(small(tmp_path, {"model_path": model}))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"lr": 3e-4, "lr_decay_style": "cosine"}, {"optimizer.lr": 3e-4, "schedule.curve": "cosine"}),
        ({"accelerator": {"cp_size": 4}}, {"parallel.sequence": 4, "parallel.sequence_method": "ring"}),
        ({"data_parallel_mode": "ddp"}, {"parallel.shard": 1}),
        ({"rmpad": True, "dyn_bsz": False}, {"data.pack": True}),
        ({"dyn_bsz": False}, {"data.pack": False}),
        ({"enable_gradient_checkpointing": False}, {"engine.recompute": False}),
        ({"wandb": {"enable": True}}, {"track.project": "VeOmni"}),
        ({"num_train_epochs": 3, "max_steps": 10}, {"schedule.steps": 30}),
        ({"eval_steps": 25}, {"validation.every": 25}),
        ({}, {"optimizer.lr": 5e-5, "optimizer.weight_decay": 0.0, "save.every_epochs": 1, "schedule.epochs": 1}),
    ],
)
def test_keys_of_training(train: dict[str, object], expected: dict[str, object], tmp_path: Path, imported: Import):
    check(imported(small(tmp_path, train=train)).run, expected)


def test_two_networks_of_wan_2_2_are_asked_for(tmp_path: Path, imported: Import):
    model = {"model_path": "x/Wan2.2-T2V-A14B/transformer", "condition_model_path": "/models/Wan2.2-T2V-A14B"}
    assert "family.expert" in imported(small(tmp_path, model)).asked


def test_every_older_name_leads_to_one_of_today():
    assert not set(OLDER.values()) & OLDER.keys()
    assert all(why.endswith(".") for why in REASONS.values())
