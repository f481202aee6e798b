"""LLaMA-Factory's files, with the datasets and DeepSpeed files that they name, become runs; the rest is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.importers.conftest import CONFIGS, Import
from tests.importers.expected import check
from weft.errors import ConfigError
from weft.importers.detect import recognised
from weft.importers.llama_factory_keys import REASONS
from weft.importers.reading import read

HERE = CONFIGS / "llama-factory"
DATA = (HERE / "data").as_posix()
COMMAND = {"model_name_or_path": "${MODEL}", "stage": "sft", "finetuning_type": "lora", "lora_rank": 8,
           "dataset": "a/b", "dataset_dir": "ONLINE", "output_dir": "saves/sft", "learning_rate": 1e-4,
           "num_train_epochs": 3.0, "save_only_model": False}  # fmt: skip
RUNS = ("sft.yaml", "zero3.yaml", "pretrain.yaml", "pissa_dora.yaml", "oft.yaml", "full.yaml", "misspelt.yaml")


def small(tmp_path: Path, **keys: object) -> Path:
    """A small config with some of its keys changed."""
    whole = {"model_name_or_path": "/models/Qwen3-4B", "stage": "sft", "finetuning_type": "lora", "dataset": "a/b",
             "dataset_dir": "ONLINE", "output_dir": "/runs/a", **keys}  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.parametrize("name", [*RUNS, "dpo.yaml", "preferences.yaml", "unknown_dataset.yaml", "pictures.yaml"])
def test_a_config_is_told_by_its_words(name: str):
    assert recognised([read(HERE / name)]) == "llama-factory"


@pytest.mark.parametrize("name", RUNS)
def test_each_config_becomes_a_run_that_parses(name: str, imported: Import):
    assert imported(HERE / name).program == "LLaMA-Factory"


def test_supervised_fine_tuning(imported: Import):
    found = imported(HERE / "sft.yaml")
    check(found.run, {
        "name": "sft", "output": "saves/qwen3-4b/lora", "seed": 42, "family.kind": "causal-lm",
        "family.source": "models/Qwen3-4B-Instruct-2507", "family.trust_remote_code": False, "adapter.rank": 8,
        "adapter.alpha": 16, "adapter.targets": "all", "objective.kind": "next-token", "data.length": 2048,
        "data.pack": False, "data.batch_size": 1, "data.truncate": "cut_end", "data.workers": 16,
        "data.sources.0.path": f"{DATA}/identity.json", "data.sources.0.format": "alpaca", "data.sources.0.take": 1000,
        "data.sources.1.path": f"{DATA}/questions.jsonl",
        "data.sources.1.columns": {"instruction": "question", "output": "answer", "system": "persona"},
        "schedule.epochs": 3.0, "schedule.accumulate": 8, "schedule.curve": "cosine", "schedule.warmup": 0,
        "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.0, "engine.precision": "bf16", "engine.recompute": True,
        "save.every": 500, "validation.every": 250, "track.to": (),
    })  # fmt: skip
    assert "tokenizer" in found.dropped["template"] and "warmup_ratio" in found.dropped
    assert any(text.startswith("warmup_ratio 0.1: this run has no warm-up yet") for text in found.warnings)
    assert "family.trust_remote_code: true" in found.dropped["trust_remote_code"]
    assert any("sft.yaml:37: val_size" in text for text in found.warnings)


def test_a_command_line_is_read_as_the_config_that_it_stands_for(imported: Import, script: Callable[..., Path]):
    flags = "\n".join(f"    --{key} {value} \\" for key, value in COMMAND.items())
    shell = script(f"set -x\nMODEL=/models/Qwen3-4B\n\nllamafactory-cli train \\\n{flags}\n    --bf16\n")
    config = script(yaml.safe_dump({**COMMAND, "model_name_or_path": "/models/Qwen3-4B", "bf16": True}), "config.yaml")
    assert recognised([read(shell)]) == "llama-factory"
    assert imported(shell).run == imported(config).run


def test_a_command_that_names_its_config_is_answered_with_that_name(imported: Import, script: Callable[..., Path]):
    with pytest.raises(ConfigError, match=r"train.sh:1: the settings stand in examples/sft.yaml"):
        imported(script("FORCE_TORCHRUN=1 llamafactory-cli train examples/sft.yaml\n"))


def test_a_flag_of_a_command_that_only_a_shell_knows_is_refused(imported: Import, script: Callable[..., Path]):
    with pytest.raises(ConfigError, match=r"train.sh:1: 'output_dir' .* nothing that is read here is run"):
        imported(script("llamafactory-cli train --model_name_or_path /m --output_dir runs/$(date)\n"))


def test_zero_3_with_offloading(imported: Import):
    found = imported(HERE / "zero3.yaml")
    check(found.run, {
        "engine.kind": "deepspeed", "engine.zero": 3, "engine.offload_optimizer": True,
        "engine.offload_parameters": True, "engine.precision": "bf16", "adapter.alpha": 16, "adapter.rslora": True,
        "adapter.input_dropout": 0.05, "adapter.lora_plus": 16.0, "adapter.targets": ("q_proj", "v_proj"),
        "data.pack": True, "data.learn": "all", "data.batch_size": 8, "data.sources.0.format": "sharegpt",
        "data.sources.1.dataset": "somebody/chats", "data.sources.1.name": "en", "data.sources.1.split": "train_sft",
        "data.sources.1.format": "messages", "data.sources.1.take": 500, "schedule.steps": 600, "schedule.warmup": 30,
        "schedule.curve": "cosine", "schedule.floor": 0.01, "save.every": 0, "save.every_epochs": 1,
        "resume": "latest", "track.to": ("wandb",),
    })  # fmt: skip
    assert "abcdef0123456789" not in found.text and "swanlab_api_key" in found.dropped
    assert "there they do" in found.of("packing")[0].text


def test_pre_training_on_texts(imported: Import):
    found = imported(HERE / "pretrain.yaml")
    check(found.run, {
        "data.sources.0.path": f"{DATA}/books", "data.sources.0.format": "text", "data.sources.0.columns": {},
        "data.pack": True, "data.length": 4096, "schedule.steps": 100, "schedule.warmup": 10,
        "schedule.curve": "linear", "engine.precision": "fp16", "family.kernels.attention": "flash",
        "family.kernels.mlp": "liger", "parallel.shard": "auto", "engine.kind": "torch",
    })  # fmt: skip


def test_a_quantised_base_with_dora(imported: Import):
    found = imported(HERE / "pissa_dora.yaml")
    check(found.run, {
        "family.dtype": "nf4", "adapter.dora": True, "adapter.alpha": 64, "data.pack": True, "data.learn": "last",
        "data.system": "You are brief.", "data.validation_items": 100, "save.keep": 2, "optimizer.kind": "adamw8bit",
        "optimizer.betas": (0.9, 0.95), "optimizer.lr": 5e-5,
    })  # fmt: skip
    assert any("neftune_noise_alpha" in text for text in found.warnings)


def test_orthogonal_tuning_on_a_stream_from_the_hub(imported: Import):
    found = imported(HERE / "oft.yaml")
    check(found.run, {
        "adapter.kind": "oft", "adapter.block_size": 16, "adapter.targets": ("q_proj", "v_proj"),
        "data.sources.0.dataset": "somebody/on-the-hub", "data.sources.0.streaming": True,
        "data.shuffle_buffer": 4096, "engine.kind": "deepspeed", "engine.zero": 2,
    })  # fmt: skip
    assert any("By the file's name" in note.text for note in found.of("deepspeed"))


def test_full_fine_tuning_becomes_a_wide_lora(imported: Import):
    found = imported(HERE / "full.yaml")
    check(found.run, {"adapter.kind": "lora", "adapter.rank": 64, "engine.kind": "torch", "optimizer.lr": 1e-5})
    assert found.asked == ["data.sources.1.path", "data.sources.2.path"]
    assert "is a program, and none is run here" in found.story and "'table.csv' is no .json" in found.story
    assert any("use_galore" in text for text in found.warnings) and "ZeRO stage 1" in found.dropped["deepspeed"]


def test_pissa_begins_with_the_principal_part(tmp_path: Path, imported: Import):
    found = imported(small(tmp_path, pissa_init=True, pissa_iter=-1, pissa_convert=True))
    check(found.run, {"adapter.init": "pissa", "adapter.pissa_iterations": None})
    assert "pissa_convert" in found.dropped


def test_misspelt_keys_are_told_with_their_lines_and_the_nearest(imported: Import):
    found = imported(HERE / "misspelt.yaml")
    assert any("misspelt.yaml:4: 'lora_rnak' is no key of LLaMA-Factory" in text for text in found.warnings)
    assert "Did you mean 'lora_rank'?" in found.dropped["lora_rnak"]
    assert "Did you mean 'per_device_train_batch_size'?" in found.dropped["per_device_train_batchsize"]
    assert found.asked == ["data.sources.0.path"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dpo.yaml", r"dpo\.yaml:2: stage 'dpo' trains on preferences"),
        ("preferences.yaml", r"dataset_info\.json:11: 'preferences' holds preferences"),
        ("unknown_dataset.yaml", r"unknown_dataset\.yaml:4: .*Did you mean 'identity'"),
        ("pictures.yaml", r"dataset_info\.json:12: 'pictures' has images"),
        ("broken.yaml", r"broken\.yaml:3:\d+: .*indented too far"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(name: str, said: str, imported: Import):
    with pytest.raises(ConfigError, match=said):
        imported(HERE / name, program="llama-factory")


@pytest.mark.parametrize("stage", ["rm", "ppo", "kto", "dpo"])
def test_stages_of_preferences_and_rewards_are_refused_by_name(stage: str, tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match=f"stage '{stage}' trains on"):
        imported(small(tmp_path, stage=stage))


def test_a_config_that_merges_is_sent_to_weft_merge(tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match="weft merge ADAPTER --into BASE"):
        imported(small(tmp_path, export_dir="merged"))


def test_learning_the_prompt_and_only_the_last_turn_exclude_each_other(tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match="exclude each other"):
        imported(small(tmp_path, train_on_prompt=True, mask_history=True))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"schedule.epochs": 3.0, "data.batch_size": 8, "optimizer.lr": 5e-5, "schedule.curve": "linear"}),
        ({"quantization_bit": 8}, {"family.dtype": "int8"}),
        ({"flash_attn": "disabled"}, {"family.kernels.attention": "eager"}),
        ({"learning_rate": "2e-4"}, {"optimizer.lr": 2e-4}),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
         {"schedule.floor": 0.1}),
        ({"save_strategy": "no"}, {"save.every": 0}),
        ({"disable_gradient_checkpointing": True}, {"engine.recompute": False}),
        ({"use_unsloth_gc": True}, {"engine.offload_inputs": True}),
        ({"report_to": "wandb,tensorboard", "project": "p"},
         {"track.to": ("wandb", "tensorboard"), "track.project": "p"}),
        ({"max_steps": 100, "warmup_steps": 100}, {"schedule.warmup": 99}),
        ({"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
         {"engine.zero": 2, "engine.offload_optimizer": True}),
        ({"optim": "adafactor"}, {"optimizer.path": "transformers.optimization.Adafactor"}),
        ({"adapter_name_or_path": "first,second"}, {"adapter.start_from": "second"}),
    ],
)  # fmt: skip
def test_keys_of_training(keys: dict[str, object], expected: dict[str, object], tmp_path: Path, imported: Import):
    check(imported(small(tmp_path, **keys)).run, expected)


def test_every_reason_is_a_sentence():
    assert all(why.endswith(".") for why in REASONS.values())
