"""VideoX-Fun's launch scripts become runs, its traps are told, and its malformed scripts are refused with a line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.importers.conftest import CONFIGS, Import
from weft.errors import ConfigError
from weft.importers.videox_flags import ARITY, REASONS, SAME
from weft.importers.writing import checked

HERE = CONFIGS / "videox-fun"
RUNS = ("t2v_low", "i2v_high", "ti2v_5b", "distill_i2v", "distill_prompts", "zero2", "zero3_offload", "fsdp",
        "several_machines", "substrings")  # fmt: skip
Script = Callable[..., Path]
MINIMAL = (
    "--config_path=wan_civitai_t2v.yaml --pretrained_model_name_or_path=m --train_data_meta=d/m.json "
    "--train_batch_size=1"
)


def value(run: Any, key: str) -> Any:
    for step in key.split("."):
        if isinstance(run, dict):
            run = run[step]
        else:
            run = run[int(step)] if step.isdecimal() else getattr(run, step)
    return run


def check(run: Any, expected: Mapping[str, Any]) -> None:
    found = {key: value(run, key) for key in expected}
    assert {key: str(one) if isinstance(one, Path) else one for key, one in found.items()} == dict(expected)


def line(flags: str, script: str = "scripts/wan2.2/train_lora.py") -> str:
    return f"accelerate launch {script} {MINIMAL} {flags}\n"


@pytest.mark.parametrize("name", RUNS)
def test_each_script_becomes_a_run_that_parses(name: str, imported: Import):
    found = imported(HERE / f"{name}.sh")
    assert found.program == "VideoX-Fun" and not found.asked and checked(found.text) == found.run


def test_their_recipe_for_the_low_expert(imported: Import):
    found = imported(HERE / "t2v_low.sh")
    check(found.run, {
        "name": "t2v_low", "output": "out", "seed": 42,
        "family.source": "models/Diffusion_Transformer/Wan2.2-T2V-A14B", "family.expert": "low",
        "adapter.backend": "peft", "adapter.rank": 64, "adapter.alpha": 32,
        "adapter.targets": ("q", "k", "v", "ffn.0", "ffn.2"),
        # an index into times that the shift has moved: uniform before it
        "objective.timesteps.kind": "shift", "objective.timesteps.shift": 12, "objective.timesteps.scale": None,
        "objective.strata": 16,
        "optimizer.kind": "adamw", "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.03, "optimizer.eps": 1e-10,
        "schedule.epochs": 100, "schedule.max_norm": 0.05, "schedule.warmup": 0,
        "engine.precision": "bf16", "engine.recompute": True, "save.every": 50,
        "data.sources.0.path": "datasets/mine/metadata.json", "data.sources.0.stride": 2,
        "data.buckets.sides": (640,), "data.buckets.token_budget": 21 * 40 * 40,
        "data.buckets.frames": tuple(range(81, 0, -4)), "data.caption_dropout": 0.1,
    })  # fmt: skip
    assert any("at 2 times its strength" in text for text in found.warnings)
    assert "low_vram" in found.dropped and "NCCL_P2P_DISABLE" not in found.story


def test_sizes_by_token_length(imported: Import):
    found = imported(HERE / "i2v_high.sh")
    check(found.run, {
        "family.expert": "high", "objective.timesteps.shift": 5,
        "data.buckets.sides": tuple(range(256, 1025, 128)), "data.buckets.choice": "each_size",
        "data.buckets.token_budget": 13 * 32 * 32, "data.random_frames": 0.1,
        "data.sources.0.only": "video", "data.sources.0.repeats": 4, "data.sources.1.only": "image",
        "schedule.steps": 3000, "schedule.curve": "cosine", "schedule.warmup": 100,
        "save.keep": 4, "save.prune_adapters": True, "samples.every": 500, "samples.frames": 49,
    })  # fmt: skip
    assert [(p.text, str(p.image)) for p in found.run.samples.prompts] == [
        ("a cat wakes", "cat.png"),
        ("a dog runs", "dog.png"),
    ]
    assert "adapter.start_from" in found.dropped["resume_from_checkpoint"]


def test_ti2v_5b_gives_half_of_its_clips_a_first_frame_and_learns_all_times(imported: Import):
    found = imported(HERE / "ti2v_5b.sh")
    check(found.run, {
        "family.expert": None, "objective.first_frame": 0.5, "objective.times": (0.0, 1.0),
        "data.buckets.token_budget": 21 * 20 * 20,  # a token is 32 pixels wide
    })  # fmt: skip
    assert any("boundary_type is not given" in text and "below 0.9 alone" in text for text in found.warnings)


def test_distillation_with_clips(imported: Import):
    found = imported(HERE / "distill_i2v.sh")
    check(found.run, {
        "objective.kind": "dmd", "objective.steps": 4, "objective.shift": 5, "objective.student_every": 5,
        "objective.guidance": 5, "objective.critic_guidance": 1, "optimizer.lr": 1e-5,
        "roles.critic.optimizer.lr": 1e-6, "roles.critic.optimizer.eps": 1e-10, "data.kind": "video",
    })  # fmt: skip
    assert any("a critic that is a LoRA falls behind" in text for text in found.warnings)
    assert any("negative prompt" in text for text in found.warnings)


def test_distillation_with_captions_alone(imported: Import):
    found = imported(HERE / "distill_prompts.sh")
    check(found.run, {
        "name": "few-steps", "data.kind": "prompts", "data.buckets.sides": (640,), "data.buckets.frames": (81,),
        "objective.critic_guidance": 1.5, "roles.critic.optimizer.lr": 8e-6, "schedule.steps": 2000,
    })  # fmt: skip
    assert [str(path) for path in found.run.data.files] == ["datasets/mine/metadata.json"]
    assert "captions alone" in found.dropped["enable_bucket"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero2", {"engine.kind": "deepspeed", "engine.zero": 2, "engine.offload_parameters": False}),
        ("zero3_offload", {"engine.kind": "deepspeed", "engine.zero": 3, "engine.offload_parameters": True}),
        ("fsdp", {"engine.kind": "torch", "parallel.shard": "auto", "data.buckets.sizes": ((832, 480),)}),
    ],
)
def test_launchers_become_engine_and_parallel(name: str, expected: Mapping[str, Any], imported: Import):
    check(imported(HERE / f"{name}.sh").run, expected)


def test_several_machines_are_told_on_the_command_line(imported: Import):
    found = imported(HERE / "several_machines.sh")
    check(found.run, {
        "data.sources.0.root": "/data", "data.buckets.choice": "each_size", "data.buckets.crop_slack": 1,
        "objective.timesteps.scale": 1.2, "optimizer.path": "came_pytorch.CAME", "track.project": "wan",
        "optimizer.lr": pytest.approx(1e-5 * 16 * 1 * 2),  # scale_lr: processes x batch x accumulate
    })  # fmt: skip
    assert len(found.run.data.buckets.sizes) == 15
    assert all("--rendezvous" in found.dropped[f"environment: {name}"] for name in ("MASTER_ADDR", "RANK"))


def test_names_are_pieces_of_paths_without_peft(imported: Import, script: Script):
    found = imported(HERE / "substrings.sh")
    assert found.run.adapter.targets == "attention+ffn"  # 'k' is a piece of 'blocks'
    assert any("'k' is one of 'blocks'" in text for text in found.warnings)
    narrow = imported(script(line("--target_name=self_attn.q,ffn --lora_skip_name=ffn.2")))
    assert narrow.run.adapter.targets == ("self_attn.q", "ffn.0") and narrow.run.adapter.backend == "native"
    assert "hf_secret" not in found.text


def test_defaults_of_theirs_that_differ_from_ours_are_written(imported: Import, script: Script):
    found = imported(script("accelerate launch scripts/wan2.1/train_lora.py --video_sample_size=512 --vae_mini_batch=1 "
                            "--boundary_type=low\n"), program="videox-fun")  # fmt: skip
    check(found.run, {
        "adapter.rank": 128, "adapter.alpha": 64, "data.batch_size": 16, "schedule.epochs": 100, "save.every": 500,
        "data.buckets.sizes": ((512, 512),), "data.buckets.frames": (17, 13, 9, 5, 1),
    })  # fmt: skip
    assert {"family.source", "data.sources"} <= set(found.asked)
    assert any("default 16 needs much memory" in text for text in found.warnings)


def test_without_uniform_sampling_theirs_ignores_the_boundary(imported: Import, script: Script):
    found = imported(script(line("--boundary_type=low")))
    assert any("ignores boundary_type" in text for text in found.warnings)
    found = imported(script(line("--boundary_type=low --uniform_sampling")))
    assert not any("ignores boundary_type" in text for text in found.warnings)


def test_the_config_that_is_there_goes_before_its_name(imported: Import, script: Script):
    script("transformer_additional_kwargs: {transformer_combination_type: single}\nscheduler_kwargs: {shift: 3.0}\n",
           "wan_civitai_t2v.yaml")  # fmt: skip
    found = imported(script(line("--uniform_sampling")))
    check(found.run, {"objective.timesteps.shift": 3, "family.expert": None})


@pytest.mark.parametrize(
    ("flags", "sides"),
    [
        ("--video_sample_size=1024", (512, 682, 819, 1024)),
        ("--video_sample_size=768", (512, 614, 768)),
        ("--video_sample_size=512", (512,)),
    ],
)
def test_random_sizes_are_their_fractions(flags: str, sides: tuple[int, ...], imported: Import, script: Script):
    found = imported(script(line(f"--enable_bucket --random_hw_adapt {flags}")))
    assert found.run.data.buckets.sides == sides


# ---- Malformed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "said"),
    [
        ("all_weights", 8, "train.py is VideoX-Fun's trainer of all weights"),
        ("animate", 12, "is Wan 2.2 Animate"),
        ("wrong_mode", 19, "'train_mode' is 'inpant'"),
        ("fun_control", 8, "trains wan2.2_fun"),
        ("stray_word", 12, "'43' stands behind no flag that takes it"),
        ("unset", 12, "$WHERE has no plain value"),
        ("two_paths", 21, "1 validation_paths and 2 validation_prompts"),
    ],
)
def test_a_malformed_script_is_refused_with_its_line(name: str, at: int, said: str, imported: Import):
    with pytest.raises(ConfigError) as refused:
        imported(HERE / f"{name}.sh")
    assert len(refused.value.problems) == 1
    assert str(refused.value).startswith(f"{HERE / name}.sh:{at}:") and said in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rank=big", "'rank' is 'big'. Expected was a number"),
        ("--boundary_type=middle", "Choose one of: low, high, full"),
        ("--lr_scheduler=cosin", "Did you mean 'cosine'"),
        ("--mixed_precision=bf61", "bf16"),
        ("--fix_sample_size 480", "two numbers, height and width"),
        ("--target_name=self_attn.z", "leave no layer"),
        ("--lora_skip_name=blocks", "leave no layer"),
        ("--video_sample_n_frames=1e30", "a whole number from 1 to 16384"),
        ("--rank=1e999", "a number that is finite"),
        ("--random_hw_adapt --training_with_video_token_length --video_sample_size=640", "leaves no size to draw from"),
    ],
)
def test_values_that_cannot_be_are_refused(flags: str, said: str, imported: Import, script: Script):
    path = script(line(flags))
    with pytest.raises(ConfigError) as refused:
        imported(path, program="videox-fun")
    assert str(refused.value).startswith(f"{path}:1:") and said in str(refused.value)


def test_a_model_that_is_not_here_is_told_by_its_folder_too(imported: Import, script: Script):
    path = script("accelerate launch scripts/wan2.2/train_lora.py --pretrained_model_name_or_path=m/Wan2.2-S2V-14B\n")
    with pytest.raises(ConfigError, match=r":1: m/Wan2.2-S2V-14B is Wan 2.2 S2V"):
        imported(path)


@pytest.mark.parametrize("flag", sorted(ARITY))
def test_every_option_is_told_of(flag: str, imported: Import, script: Script):
    """None is swallowed: each becomes a key of ours, or is dropped with a reason."""
    said = {
        "weighting_scheme": "logit_normal", "mixed_precision": "bf16", "lr_scheduler": "cosine", "report_to": "wandb",
        "boundary_type": "low", "train_mode": "i2v", "fix_sample_size": "480 832", "adam_beta1": "0.5",
        "adam_beta2": "0.9", "video_sample_n_frames": "49", "target_name": "q", "config_path": "wan_civitai_t2v.yaml",
        "denoising_step_indices_list": "1000 500", "token_sample_size": "512",
    }  # fmt: skip
    text = (
        ""
        if ARITY[flag] == "flag"
        else f"={said.get(flag, '7')}"
        if ARITY[flag] == "one"
        else f" {said.get(flag, 'a')}"
    )
    distils = flag in ("learning_rate_critic", "gen_update_interval", "fake_guidance_scale", "real_guidance_scale",
                       "denoising_step_indices_list", "negative_prompt")  # fmt: skip
    rest = " ".join(word for word in MINIMAL.split() if not word.startswith(f"--{flag}="))
    name = "train_distill_lora.py" if distils else "train_lora.py"
    more = "--validation_prompts x" if flag in ("validation_paths", "validation_steps") else ""
    path = script(f"accelerate launch scripts/wan2.2/{name} {rest} {more} --{flag}{text}\n")
    found = imported(path, program="videox-fun", write=False)
    about = [note for note in found.draft.notes if flag in note.of or flag in note.text]
    assert about, f"nothing is said of --{flag}"


def test_reasons_and_equals_are_of_options_that_there_are():
    assert set(REASONS) <= set(ARITY) and {one.of for one in SAME} <= set(ARITY)
