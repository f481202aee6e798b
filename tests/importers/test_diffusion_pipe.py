"""diffusion-pipe's files and the datasets they name become runs, its traps are told, and malformed ones are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.importers.conftest import CONFIGS, Import
from tests.importers.expected import check
from weft.errors import ConfigError
from weft.importers.detect import recognised
from weft.importers.diffusion_pipe_keys import DATA_REASONS, REASONS
from weft.importers.reading import read

HERE = CONFIGS / "diffusion-pipe"
RUNS = (
    "wan21.toml",
    "wan22_low.toml",
    "wan22_high_misplaced.toml",
    "hunyuan.toml",
    "lokr_pipeline.toml",
    "everything.toml",
)
SMALL = """
output_dir = 'runs'
dataset = 'data.toml'
epochs = 2
save_every_n_epochs = 1
{top}
[model]
type = 'wan'
ckpt_path = '{folder}'
dtype = 'bfloat16'
{model}
[adapter]
type = 'lora'
rank = 8
[optimizer]
type = 'adamw'
lr = 1e-4
"""


def small(
    tmp_path: Path, top: str = "", model: str = "", folder: str = "/models/Wan2.1-T2V-14B", data: str = ""
) -> Path:
    (tmp_path / "data.toml").write_text(data or "resolutions = [512]\nenable_ar_bucket = true\nframe_buckets = [33]\n"
                                        "[[directory]]\npath = 'clips'\n")  # fmt: skip
    path = tmp_path / "main.toml"
    path.write_text(SMALL.format(top=top, model=model, folder=folder))
    return path


@pytest.mark.parametrize("name", [*RUNS, "flux.toml", "clips.toml", "pictures.toml", "boxes.toml"])
def test_a_file_is_told_by_its_model_or_its_directories(name: str):
    assert recognised([read(HERE / name)]) == "diffusion-pipe"


@pytest.mark.parametrize("name", RUNS)
def test_each_config_becomes_a_run_that_parses(name: str, imported: Import):
    assert imported(HERE / name).program == "diffusion-pipe"


def test_wan_2_1_with_its_dataset(imported: Import):
    found = imported(HERE / "wan21.toml")
    check(found.run, {
        "name": "storm-one", "output": "/runs/storm", "family.source": "/models/Wan2.1-T2V-14B", "family.dtype": "fp8",
        "engine.precision": "bf16", "engine.recompute": True, "engine.stream_blocks": 16,
        "adapter.kind": "lora", "adapter.rank": 32, "adapter.targets": "attention+ffn", "adapter.alpha": None,
        "adapter.start_from": "/runs/storm/20260101_00-00-00/epoch20",
        "objective.timesteps.kind": "shift", "objective.timesteps.shift": 3.0, "objective.timesteps.scale": 1.0,
        "optimizer.kind": "adamw", "optimizer.lr": 2e-5, "optimizer.betas": (0.9, 0.99), "schedule.epochs": 60,
        "schedule.accumulate": 4, "schedule.warmup": 50, "schedule.curve": "linear", "save.every_epochs": 5,
        "data.sources.0.path": "/data/storm", "data.sources.0.repeats": 3, "data.sources.1.path": "/data/calm",
        "data.buckets.sides": (960, 512), "data.buckets.choice": "each_size", "data.buckets.upscale": True,
        "data.buckets.frames": (33,), "data.caption_prefix": "st0rm,", "data.missing_captions": "empty",
        "data.caption_dropout": 0.0, "data.encoder_batch": 2, "track.to": ("wandb",), "track.project": "storms",
    })  # fmt: skip
    assert not found.warnings and not found.asked
    assert "abcdef0123456789" not in found.text and "wandb login" in found.dropped["monitoring.wandb_api_key"]
    assert {"directory.0.mask_path", "min_ar", "eval_every_n_epochs", "save_dtype"} <= found.dropped.keys()


def test_the_low_expert_in_its_own_part(imported: Import):
    found = imported(HERE / "wan22_low.toml")
    check(found.run, {
        "family.expert": "low", "family.boundary": None, "objective.times": (0.0, 1.0),
        "family.files.low": "/models/comfy/wan2.2_t2v_low_noise_14B_fp16.safetensors",
        "family.files.text_encoder": "/models/comfy/umt5_xxl_fp16.safetensors",
        "optimizer.path": "pytorch_optimizer.Prodigy", "optimizer.args": {"betas": [0.9, 0.99], "d_coef": 2.0},
        "schedule.steps": 4000, "schedule.epochs": None, "engine.offload_inputs": True, "engine.recompute": True,
        "data.batch_size": 1, "data.caption_dropout": 0.05, "data.sources.0.only": "image",
        "data.buckets.sizes": ((640, 640),), "data.buckets.frames": (1,), "validation.every": 200,
        "data.validation_sources.0.path": "/data/boxes",
        "data.validation_sources.0.buckets.sizes": ((480, 832), (640, 640), (832, 480)), "save.every": 400,
    })  # fmt: skip
    assert "own part" in found.dropped["model.min_t"]


def test_times_that_stand_in_the_wrong_place_are_brought_along_and_told_of(imported: Import):
    found = imported(HERE / "wan22_high_misplaced.toml")
    check(found.run, {"family.expert": "high", "family.boundary": None, "objective.timesteps.kind": "uniform"})
    assert any("toml:5: 'min_t' belongs under [model]; diffusion-pipe does not read it" in t for t in found.warnings)
    assert "refuses it" in found.dropped["adapter.alpha"]


def test_hunyuan_video_from_single_files(imported: Import):
    found = imported(HERE / "hunyuan.toml")
    check(found.run, {
        "family.kind": "hunyuan-video", "family.source": "/comfy/hunyuan_video_720_cfgdistill_fp8_e4m3fn.safetensors",
        "family.files.vae": "/comfy/hunyuan_video_vae_bf16.safetensors", "family.guidance": 1.0,
        "family.files.text_encoder": "/comfy/llava-llama-3-8b-text-encoder-tokenizer",
        "family.files.tokenizer": "/comfy/llava-llama-3-8b-text-encoder-tokenizer",
        "family.files.text_encoder_2": "/comfy/clip-vit-large-patch14", "adapter.targets": "all-linear",
        "adapter.input_dropout": 0.1, "optimizer.lr": 1e-5, "schedule.curve": "constant",
        "data.buckets.sizes": ((480, 832), (640, 640), (832, 480)), "data.buckets.frames": (33,),
    })  # fmt: skip
    assert any("'automagic' is replaced by AdamW" in text for text in found.warnings)


def test_pipeline_stages_become_shards_and_a_whole_lokr(imported: Import):
    found = imported(HERE / "lokr_pipeline.toml")
    check(found.run, {
        "parallel.shard": 2, "adapter.kind": "lokr", "adapter.rank": 1_000_000, "adapter.factor": 4,
        "objective.timesteps.kind": "sigmoid", "objective.timesteps.scale": 1.2, "save.every": 250,
    })  # fmt: skip
    assert any("Divide schedule.accumulate by 2" in text for text in found.warnings)


def test_full_fine_tuning_without_its_dataset_file(imported: Import):
    found = imported(HERE / "everything.toml")
    check(found.run, {
        "adapter.kind": "lora", "adapter.rank": 64, "objective.times": (0.2, 0.8),
        "optimizer.path": "optimi.StableAdamW", "optimizer.weight_decay": 0.1,
    })  # fmt: skip
    assert found.asked == ["data.sources.0.path", "data.buckets"]
    assert any("min_t 0.8 is above max_t 0.2" in text for text in found.warnings)
    assert any("everything.toml:5: 'learning_rate' is no key of diffusion-pipe" in text for text in found.warnings)


def test_the_dataset_file_may_stand_behind_the_main_file(tmp_path: Path, imported: Import):
    (tmp_path / "main.toml").write_text((HERE / "wan21.toml").read_text())
    found = imported(tmp_path / "main.toml", HERE / "clips.toml")
    assert [source.path.as_posix() for source in found.run.data.sources] == ["/data/storm", "/data/calm"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flux.toml", r"flux\.toml:6: the model is 'flux', and Weft trains Wan, HunyuanVideo"),
        ("broken.toml", r"broken\.toml:5:8: not TOML: invalid value"),
        ("clips.toml", r"clips\.toml: this is diffusion-pipe's dataset file. Name the main file too"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, said: str, imported: Import):
    with pytest.raises(ConfigError, match=said):
        imported(HERE / name, program="diffusion-pipe")


def test_a_directory_without_a_path_is_refused_with_its_line(tmp_path: Path, imported: Import):
    path = small(tmp_path, data=(HERE / "no_path.toml").read_text())
    with pytest.raises(ConfigError, match=r"data\.toml:3: this \[\[directory\]\] has no path"):
        imported(path)


@pytest.mark.parametrize(
    "line",
    [
        "resolutions = ['many']",
        "resolutions = [[640]]",
        "resolutions = [512]\nframe_buckets = 33",
        "size_buckets = [[640, 640]]",
    ],
)
def test_shapes_that_are_no_shapes_are_refused_with_their_line(line: str, tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match=r"data\.toml:\d: diffusion-pipe's '\w+' is .*Expected was a list of"):
        imported(small(tmp_path, data=f"{line}\n[[directory]]\npath = 'clips'\n"))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("", {"objective.timesteps.kind": "sigmoid", "objective.times": (0.0, 1.0)}),
        ("min_t = 0.1\nmax_t = 0.9", {"objective.times": (0.1, 0.9)}),
        # 512 x 512 are 1024 tokens: exp(0.5 + 0.65 x 768 / 3840) = exp(0.63)
        ("flux_shift = true", {"objective.timesteps.kind": "shift", "objective.timesteps.shift": 1.878}),
        ("timestep_sample_method = 'uniform'\nshift = 5", {"objective.timesteps.shift": 5.0,
                                                          "objective.timesteps.scale": None}),
    ],
)  # fmt: skip
def test_times_are_drawn_as_there(model: str, expected: dict[str, object], tmp_path: Path, imported: Import):
    check(imported(small(tmp_path, model=model)).run, expected)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ("min_t = 0.85\nmax_t = 1", {"family.expert": "high", "family.boundary": 0.85}),
        ("min_t = 0\nmax_t = 0.875", {"family.expert": "low", "family.boundary": None}),
        ("min_t = 0.1\nmax_t = 0.875", {"family.expert": "low", "objective.times": (0.1, 0.875)}),
    ],
)
def test_a_range_of_times_tells_the_expert(times: str, expected: dict[str, object], tmp_path: Path, imported: Import):
    check(imported(small(tmp_path, model=times, folder="/models/Wan2.2-T2V-A14B")).run, expected)


def test_an_expert_that_nothing_tells_is_asked_for(tmp_path: Path, imported: Import):
    found = imported(small(tmp_path, folder="/models/Wan2.2-T2V-A14B"))
    assert found.asked == ["family.expert"] and any("at all times" in text for text in found.warnings)


def test_every_reason_is_a_sentence():
    assert all(why.endswith(".") for why in {*REASONS.values(), *DATA_REASONS.values()})


@pytest.mark.parametrize(("name", "text"), [("a.sh", "accelerate launch train.py --a 1\n"), ("a.json", '[{"a": 1}]')])
def test_a_file_that_is_no_toml_is_refused(name: str, text: str, imported: Import, script: Callable[..., Path]):
    with pytest.raises(ConfigError, match="configs are TOML, and this is none"):
        imported(script(text, name), program="diffusion-pipe")
