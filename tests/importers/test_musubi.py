"""Ten of musubi-tuner's configs become runs, its traps are told, and its malformed files are refused with a line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.importers.conftest import CONFIGS, Import
from weft.errors import ConfigError
from weft.importers.musubi_flags import ARITY, REASONS, SAME
from weft.importers.musubi_model import BASES, layers_of
from weft.importers.musubi_samples import prompts_of
from weft.importers.musubi_training import literal
from weft.importers.writing import checked

HERE = CONFIGS / "musubi"
RUNS = ("wan22_t2v_high.sh", "wan22_both.bat", "wan21_i2v.toml", "hunyuan.sh", "defaults.sh", "low_by_sigma.sh",
        "lokr.ps1", "patterns.toml", "dataset.toml", "samples.sh", "misspelt.toml")  # fmt: skip
Script = Callable[..., Path]
MINIMAL = (
    "--dit a.safetensors --network_module networks.lora_wan --network_dim 16 --network_alpha 16 --learning_rate 1e-4"
)


def value(run: Any, key: str) -> Any:
    """What stands at a dotted key of a run."""
    for step in key.split("."):
        run = run[int(step)] if step.isdecimal() else getattr(run, step)
    return run


def check(run: Any, expected: Mapping[str, Any]) -> None:
    found = {key: value(run, key) for key in expected}
    assert {key: str(one) if isinstance(one, Path) else one for key, one in found.items()} == dict(expected)


@pytest.mark.parametrize("name", RUNS)
def test_each_config_becomes_a_run_that_parses(name: str, imported: Import):
    found = imported(HERE / name)
    assert found.program == "musubi-tuner" and checked(found.text) == found.run
    assert found.run.data.caption_dropout == 0  # musubi leaves no caption out, and our own default does


def test_the_high_expert_alone(imported: Import):
    found = imported(HERE / "wan22_t2v_high.sh")
    check(found.run, {
        "name": "pottery-high", "output": "outputs", "seed": 1234,
        "family.kind": "wan", "family.expert": "high", "family.dtype": "fp8",
        "family.files.high": "/data/models/wan22/wan2.2_t2v_high_noise_14B_fp16.safetensors",
        "family.files.text_encoder": "/data/models/wan22/models_t5_umt5-xxl-enc-bf16.pth",
        "adapter.rank": 32, "adapter.alpha": 16, "adapter.activation_dropout": 0.05, "adapter.targets": "attention+ffn",
        "objective.timesteps.kind": "shift", "objective.timesteps.shift": 12, "objective.timesteps.scale": 1,
        "objective.times": (0.875, 1.0),
        "optimizer.kind": "adamw8bit", "optimizer.lr": 2e-4, "optimizer.betas": (0.9, 0.95),
        "optimizer.weight_decay": 0.1,
        "schedule.steps": 2000, "schedule.warmup": 100, "schedule.curve": "cosine", "schedule.accumulate": 2,
        "engine.precision": "bf16", "engine.recompute": True, "save.every": 500, "save.keep": 2,
        "track.to": ("tensorboard",),
    })  # fmt: skip
    assert found.asked == ["family.source"] and "Wan-AI/Wan2.2-T2V-A14B-Diffusers" in found.story
    assert "--gpus N" in found.dropped["launcher: num_processes"]
    assert "environment: CUDA_VISIBLE_DEVICES" in found.dropped


def test_a_batch_file_with_both_experts(imported: Import):
    found = imported(HERE / "wan22_both.bat")
    check(found.run, {
        "family.expert": "both", "family.boundary": 0.9, "family.attention": "flash",
        "family.files.low": "D:\\models\\wan 2.2\\wan2.2_i2v_low_noise_14B_fp16.safetensors",
        "family.files.high": "D:\\models\\wan 2.2\\wan2.2_i2v_high_noise_14B_fp16.safetensors",
        "engine.experts": "one", "engine.precision": "fp16", "engine.stream_blocks": 20, "engine.pinned": True,
        "engine.offload_inputs": True, "engine.recompute": True,
        "adapter.lora_plus": 4, "adapter.rank_dropout": 0.1,
        "schedule.epochs": 16, "save.every_epochs": 2, "save.every": 0, "save.keep": 3, "save.prune_adapters": True,
    })  # fmt: skip
    assert any("musubi trains one that both networks share" in text for text in found.warnings)


def test_an_argument_file(imported: Import):
    found = imported(HERE / "wan21_i2v.toml")
    check(found.run, {
        "name": "dogs-v2", "family.files.transformer": "models/wan2.1_i2v_720p_14B_bf16.safetensors",
        "family.files.image_encoder": "models/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "adapter.max_norm": 1, "adapter.module_dropout": 0.1,
        # t = sigmoid(-lambda / 2) with lambda of normal(-6, 2)
        "objective.timesteps.kind": "logit-normal", "objective.timesteps.mean": 3, "objective.timesteps.std": 1,
        "objective.strata": 8,
        "optimizer.kind": "custom", "optimizer.path": "transformers.optimization.Adafactor",
        "optimizer.args": {"relative_step": False, "scale_parameter": False},
        "schedule.steps": 3000, "schedule.warmup": 100, "schedule.curve": "constant",
        "track.to": ("tensorboard", "wandb"), "track.project": "dogs",
        "data.sources.0.path": "somewhere/else.toml",
    })  # fmt: skip
    assert "0123456789abcdef" not in found.text
    assert any("somewhere/else.toml is not here" in text for text in found.warnings)


def test_a_script_may_name_the_argument_file_and_overrides_it(imported: Import, script: Script):
    script('network_dim = 8\nlearning_rate = 1e-3\ndit = "a.safetensors"\nseed = 3\n', "args.toml")
    path = script("python wan_train_network.py --config_file args.toml --network_dim 24\n")
    found = imported(path)
    check(found.run, {"adapter.rank": 24, "optimizer.lr": 1e-3, "seed": 3})


def test_hunyuan_video(imported: Import):
    found = imported(HERE / "hunyuan.sh")
    check(found.run, {
        "family.kind": "hunyuan-video", "family.guidance": 6, "family.vae_tiling": True,
        "family.files.transformer": "/models/hunyuan/mp_rank_00_model_states.pt",
        "family.files.text_encoder": "/models/llava_llama3_fp16.safetensors",
        "family.files.text_encoder_2": "/models/clip_l.safetensors",
        "objective.timesteps.kind": "sigmoid", "objective.timesteps.scale": 1.5,
        "adapter.alpha": 1, "engine.stream_blocks": 20,
    })  # fmt: skip
    assert not any("network_alpha" in text for text in found.warnings)  # 1 was written on purpose


# ---- Traps ----------------------------------------------------------------------------------------------------------


def test_defaults_that_surprise_are_told(imported: Import):
    found = imported(HERE / "defaults.sh")
    check(found.run, {
        "adapter.rank": 32, "adapter.alpha": 1, "optimizer.lr": 2e-6, "schedule.steps": 1600,
        "objective.timesteps.kind": "uniform",
    })  # fmt: skip
    told = "\n".join(found.warnings)
    assert "1/32 as strong" in told and "2e-6 hardly moves" in told
    assert "sigma, and musubi then trains all times alike. discrete_flow_shift 3 has no effect" in told


def test_a_range_under_sigma_sampling_counts_from_the_noisy_end(imported: Import):
    found = imported(HERE / "low_by_sigma.sh")
    check(found.run, {
        "family.expert": "low", "family.files.low": "low/model.safetensors", "objective.times": (0.0, 0.875),
        "objective.timesteps.kind": "logit-normal", "objective.timesteps.mean": -0.5,
        "schedule.warmup": 99,
    })  # fmt: skip
    told = "\n".join(found.warnings)
    assert "trained times 0.125 to 1" in told and "the run has only 100 steps" in told


def test_a_squeezed_range_is_told_and_one_that_keeps_its_shape_is_not(imported: Import, script: Script):
    line = f"python wan_train_network.py {MINIMAL} --timestep_sampling shift --discrete_flow_shift 5 --max_timestep 500"
    squeezed, kept = imported(script(line)), imported(script(line + " --preserve_distribution_shape"))
    assert "squeezes" in squeezed.of("max_timestep")[0].text and not kept.of("max_timestep")[0].text
    assert squeezed.run.objective.times == kept.run.objective.times == (0.0, 0.5)


def test_an_expert_that_nothing_tells_is_asked_for(imported: Import, script: Script):
    found = imported(script(f"python wan_train_network.py --task t2v-A14B {MINIMAL}"))
    assert "family.expert" in found.asked
    assert any("trains the low expert on all times" in text for text in found.warnings)


@pytest.mark.parametrize(("method", "shift"), [("flux_shift", 2.059), ("qwen_shift", 1.761)])
def test_a_shift_by_size_becomes_that_of_the_data(method: str, shift: float, imported: Import, script: Script):
    script('[general]\nresolution = [832, 480]\n[[datasets]]\nvideo_directory = "a"\n', "d.toml")
    line = f"python wan_train_network.py {MINIMAL} --dataset_config d.toml --timestep_sampling {method}"
    found = imported(script(line))
    # 52 x 30 tokens; mu through (256, 0.5) and (4096, 1.15), or (8192, 0.9): exp(0.7207), exp(0.5657) = 1.7607
    assert found.run.objective.timesteps.shift == pytest.approx(shift, abs=0.01)
    assert any("musubi's shift follows each item's size" in text for text in found.warnings)


def test_both_experts_the_wrong_way_round_are_told(imported: Import, script: Script):
    line = "python wan_train_network.py --task t2v-A14B --dit a_high.safetensors --dit_high_noise a_low.safetensors"
    assert any("look swapped" in text for text in imported(script(line)).warnings)


# ---- The adapter ----------------------------------------------------------------------------------------------------


def test_a_lokr_has_its_factor_and_no_dropout(imported: Import):
    found = imported(HERE / "lokr.ps1")
    check(found.run, {
        "family.files.transformer": "C:\\models\\wan2.1_t2v_1.3B_bf16.safetensors",
        "adapter.kind": "lokr", "adapter.rank": 8, "adapter.alpha": 4, "adapter.factor": 8,
        "optimizer.path": "prodigyopt.Prodigy", "optimizer.lr": 1, "optimizer.weight_decay": 0.01,
        "optimizer.args": {"decouple": True, "d_coef": 2.0},
    })  # fmt: skip
    assert "LoRA alone" in found.dropped["network_args rank_dropout"]


def test_patterns_leave_what_musubi_would_train(imported: Import):
    found = imported(HERE / "patterns.toml")
    # ffn and cross_attn go, but for cross_attn.v; of blocks 0 to 9 all else goes.
    kept = [f"blocks.{n}.self_attn.{p}" for p in "qkvo" for n in range(10, 40)]
    assert sorted(found.run.adapter.targets) == sorted([*kept, "cross_attn.v"])
    check(found.run, {"adapter.start_from": "earlier.safetensors", "schedule.steps": 1600})
    assert "weft merge" in found.dropped["base_weights"]
    assert any("speed.safetensors" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("patterns", "targets"),
    [
        ("exclude_patterns=[r'.*ffn.*']", "attention"),
        ("exclude_patterns=['.*_attn.*']", "ffn"),
        ("exclude_patterns=[r'.*'] include_patterns=[r'.*self_attn\\.(q|k|v|o)']", "self-attention"),
        ("include_patterns=[r'.*self_attn.*']", "attention+ffn"),  # alone it narrows nothing
        ('exclude_patterns=["blocks\\\\\\\\.\\\\\\\\d+\\\\\\\\.ffn\\\\\\\\.0"]',
         ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
          "cross_attn.o", "ffn.2")),
    ],
)  # fmt: skip
def test_patterns_that_leave_a_set_are_named_so(patterns: str, targets: Any, imported: Import, script: Script):
    words = " ".join(f'"{word}"' if '"' not in word else f"'{word}'" for word in patterns.split(" "))
    words = words if '"blocks' not in patterns else "'exclude_patterns=[\"blocks\\\\.\\\\d+\\\\.ffn\\\\.0\"]'"
    found = imported(script(f"python wan_train_network.py {MINIMAL} --network_args {words}"))
    assert found.run.adapter.targets == targets


def test_musubi_s_layers_are_those_that_its_ranks_are_counted_by():
    # musubi trains 10 linear layers of each of Wan's blocks, 12 of Wan 2.1 I2V's.
    assert sum(map(len, layers_of(BASES["t2v-14B"]).values())) == 400
    assert sum(map(len, layers_of(BASES["i2v-14B"]).values())) == 480
    assert sum(map(len, layers_of(BASES["i2v-A14B"]).values())) == 400


# ---- Data and samples -----------------------------------------------------------------------------------------------


def test_a_dataset_alone_is_the_data_of_a_run_that_is_to_be_filled_in(imported: Import):
    found = imported(HERE / "dataset.toml")
    clips, stills = found.run.data.sources
    assert (str(clips.path), clips.only, clips.repeats, clips.source_fps) == ("clips", "video", 2, 24.0)
    assert clips.buckets.frames == (1, 33, 65) and clips.buckets.choice == "each_frames"
    assert clips.extraction.count == 2 and stills.only == "image"
    assert found.asked == ["family.kind", "family.source"]
    assert any("cache_directory" in text for text in found.warnings)


def test_a_script_and_its_dataset_may_be_given_together(imported: Import, script: Script):
    path = script(f"python wan_train_network.py {MINIMAL} --dataset_config elsewhere.toml")
    assert len(imported(path, HERE / "dataset.toml").run.data.sources) == 2


def test_prompts_are_read_with_their_flags(imported: Import):
    found = imported(HERE / "samples.sh")
    assert [prompt.text for prompt in found.run.samples.prompts] == [
        "a clay pot on a wheel", "two hands on wet clay", "a kiln at night",
    ]  # fmt: skip
    check(found.run, {
        "samples.width": 832, "samples.height": 480, "samples.frames": 81, "samples.steps": 30,
        "samples.guidance": 5, "samples.negative": "blurry, watermark", "samples.every": 200,
    })  # fmt: skip
    assert {"sample_prompts image_path", "sample_prompts discrete_flow_shift", "sample_at_first"} <= set(found.dropped)
    assert any("width differs between prompts" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.toml", '[prompt]\nwidth = 640\n[[prompt.subset]]\nprompt = "a fox"\nsample_steps = 9\n'),
        ("p.json", '[{"prompt": "a fox", "width": 640, "sample_steps": 9}]'),
        ("p.txt", "a fox --w 640 --s 9\n"),
    ],
)
def test_prompts_stand_in_three_kinds_of_files(name: str, text: str, script: Script):
    (prompt,) = prompts_of(script(text, name))
    assert prompt.text == "a fox" and dict(prompt.settings) == {"width": 640, "sample_steps": 9}


# ---- Malformed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("broken.toml", 2, "not TOML"),
        ("swapped_times.sh", 3, "They look swapped"),
        ("a_date.sh", 2, "is a command's output"),
        ("flf2v.sh", 1, "first-and-last-frame models"),
        ("not_a_number.toml", 4, "'network_dim' is 'many'. Expected was a number"),
        ("no_value.sh", 1, "--dit takes a value"),
        ("other_model.sh", 1, "flux_kontext_train_network.py is musubi-tuner's trainer of another model"),
        ("open_quote.sh", 2, "never closed"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(name: str, line: int, said: str, imported: Import):
    with pytest.raises(ConfigError) as refused:
        imported(HERE / name, program="musubi")
    assert len(refused.value.problems) == 1
    assert str(refused.value).startswith(f"{HERE / name}:{line}:") and said in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--timestep_sampling shfit", "Did you mean 'shift'"),
        ("--network_module networks.lora_flux", "is not known"),
        ("--lr_warmup_steps soon", "a number of steps"),
        ("--network_args rank_dropout", "is no name=value"),
        ("--network_module networks.lokr --network_args factor=many", "Expected was a number"),
        ("--network_args \"exclude_patterns=['(']\"", "no regular expression"),
        ("--network_args \"exclude_patterns=['.*']\"", "leave no layer"),
        ("--optimizer_type Lion8bit", "nothing that musubi can build"),
        ("--dit_high_noise b", "the task has one network"),
        ("--one_frame", "no one-frame training"),
        ("--config_file none.toml", "there is no 'none.toml'"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_line(flags: str, said: str, imported: Import, script: Script):
    path = script(f"\npython wan_train_network.py {MINIMAL} \\\n  {flags}\n")
    with pytest.raises(ConfigError) as refused:
        imported(path)
    assert str(refused.value).startswith(f"{path}:3:") and said in str(refused.value)


def test_a_dataset_with_mistakes_is_refused_with_the_lines_of_its_own_file(imported: Import, script: Script):
    dataset = script('[[datasets]]\nvideo_directory = "a"\nrepeats = 2\ncontrol_directory = "b"\n', "d.toml")
    with pytest.raises(ConfigError) as refused:
        imported(dataset)
    assert f"{dataset}:4:" in str(refused.value) and "control" in str(refused.value)


def test_unknown_keys_are_told_with_the_nearest_of_musubi(imported: Import):
    found = imported(HERE / "misspelt.toml")
    told = "\n".join(found.warnings)
    assert f"{HERE / 'misspelt.toml'}:6: 'learning_rte'" in told and "Did you mean 'learning_rate'?" in told
    assert "'discrete_flow_shft'" in told and "Did you mean 'discrete_flow_shift'?" in told


def test_lines_of_flags_belong_to_the_command_above_as_in_its_guides(imported: Import, script: Script):
    """docs/hunyuan_video.md has no sign at the ends of lines."""
    found = imported(script(
        "accelerate launch --mixed_precision bf16 src/musubi_tuner/hv_train_network.py\n    --dit path/to/dit\n"
        "    --dataset_config d.toml --sdpa\n    --network_dim 32 --network_alpha 32 --learning_rate 2e-4\n"
    ))  # fmt: skip
    assert found.run.adapter.rank == 32 and found.run.optimizer.lr == 2e-4  # type: ignore[attr-defined]


def test_a_dataset_file_that_is_not_here_is_asked_for(imported: Import, script: Script):
    found = imported(
        script("python wan_train_network.py --dit a.safetensors --task t2v-14B --dataset_config to/toml\n")
    )
    assert {"data.sources", "data.buckets"} <= set(found.asked)


# ---- All of its options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", sorted(ARITY))
def test_every_option_is_told_of(flag: str, imported: Import, script: Script):
    """None is swallowed: each becomes a key of ours, is dropped with a reason, or refuses the file."""
    if flag in ("config_file", "one_frame"):
        return  # refused above
    said = {
        "task": "t2v-14B", "timestep_sampling": "shift", "weighting_scheme": "cosmap",
        "network_module": "networks.lora", "mixed_precision": "bf16", "lr_scheduler": "cosine",
        "optimizer_type": "AdamW", "log_with": "wandb",
        "optimizer_args": "eps=1e-7", "network_args": "verbose=True", "dit_in_channels": "16",
        "dataset_config": "d.toml", "network_dropout": "0.1",
    }  # fmt: skip
    text = "" if ARITY[flag] == "flag" else f" {said.get(flag, '7')}"
    hunyuan = flag in ("dit_dtype", "dit_in_channels", "text_encoder1", "text_encoder2", "vae_tiling")
    task = "" if hunyuan or flag == "task" else "--task t2v-A14B --dit_high_noise h"
    if flag == "dit_high_noise":
        task = "--task t2v-A14B"
    rest = "--dit a" if flag not in ("dit", "network_weights") else ""
    found = imported(
        script(f"python {'hv' if hunyuan else 'wan'}_train_network.py {rest} {task} --{flag}{text}"), write=False
    )
    assert [note for note in found.draft.notes if flag in f"{note.of} {note.text}"], f"nothing is said of --{flag}"


def test_reasons_and_equals_are_of_options_that_there_are():
    assert set(REASONS) <= set(ARITY) and {one.of for one in SAME} <= set(ARITY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.1", 0.1), ("True", True), ("None", None), ("(0.9,0.99)", [0.9, 0.99]), ("0.9,0.99", [0.9, 0.99]),
     ("1e-30", 1e-30), ("'text'", "text"), ("__import__('os')", "__import__('os')")],
)  # fmt: skip
def test_values_of_optimizer_arguments_are_literals(text: str, expected: Any):
    assert literal(text) == expected
