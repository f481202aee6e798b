"""Eleven of ai-toolkit's jobs: seven become runs, each with its traps told, and the others are refused with a line."""

import json
from pathlib import Path

import pytest
import yaml

from tests.importers.conftest import CONFIGS, Import
from tests.importers.expected import check
from weft.errors import ConfigError
from weft.importers.ai_toolkit_keys import ARCHS, DATASET_REASONS, REASONS
from weft.importers.detect import recognised
from weft.importers.reading import read

HERE = CONFIGS / "ai-toolkit"
RUNS = (
    "wan21_person.yaml",
    "wan22_both.yaml",
    "wan22_i2v_high.yaml",
    "wan22_5b_lokr.yaml",
    "small.json",
    "no_alpha.yaml",
)


def job(tmp_path: Path, train: object = None, model: object = None, **process: object) -> Path:
    """A small job with some of its sections changed."""
    whole = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 8, "linear_alpha": 8},
        "datasets": [{"folder_path": "clips", "num_frames": 33}],
        "train": {"steps": 100, "lr": 1e-4, **(train if isinstance(train, dict) else {})},
        "model": {"name_or_path": "/models/wan", "arch": "wan21", **(model if isinstance(model, dict) else {})},
        **process,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "small", "process": [whole]}}))
    return path


@pytest.mark.parametrize("name", [*RUNS, "flux.yaml", "slider.yaml", "environment.yaml", "no_number.yaml"])
def test_a_job_is_told_by_its_frame(name: str):
    assert recognised([read(HERE / name)]) == "ai-toolkit"


@pytest.mark.parametrize("name", RUNS)
def test_each_job_becomes_a_run_that_parses(name: str, imported: Import):
    found = imported(HERE / name)
    assert found.program == "ai-toolkit" and not found.asked


def test_a_person_from_pictures(imported: Import):
    found = imported(HERE / "wan21_person.yaml")
    check(found.run, {
        "name": "mira-v3", "output": "/workspace/output", "engine.device": "cuda:0", "engine.precision": "bf16",
        "engine.recompute": True, "family.kind": "wan", "family.source": "models/Wan2.1-T2V-14B-Diffusers",
        "family.dtype": "fp8", "adapter.rank": 32, "adapter.alpha": 16, "adapter.targets": "attention+ffn",
        "objective.timesteps.kind": "sigmoid", "optimizer.kind": "adamw8bit", "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 1e-4, "optimizer.eps": 1e-6, "schedule.steps": 1800, "schedule.accumulate": 2,
        "schedule.max_norm": 1.0, "schedule.curve": "constant", "ema.decay": 0.99, "save.every": 200, "save.keep": 6,
        "data.sources.0.path": "/workspace/mira", "data.sources.0.only": "image", "data.buckets.sides": (632,),
        "data.buckets.frames": (1,), "data.caption_prefix": "m1ra", "data.caption_dropout": 0.05,
        "data.missing_captions": "empty", "samples.every": 200, "samples.frames": 37, "samples.guidance": 5,
        "samples.negative": "blurry", "samples.seed": 42, "samples.steps": 30,
        "samples.prompts.0.text": "m1ra reads a newspaper in a cafe, samples of mira v3",
    })  # fmt: skip
    assert "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers" in found.of("model.name_or_path")[0].text
    assert any("num_frames is 1" in text for text in found.warnings)
    assert any("trigger word alone" in text for text in found.warnings)
    assert {"datasets.0.flip_x", "datasets.0.shuffle_tokens", "save.dtype", "model.low_vram"} <= found.dropped.keys()


def test_both_experts_turn_by_turn(imported: Import):
    found = imported(HERE / "wan22_both.yaml")
    check(found.run, {
        "family.expert": "both", "family.dtype": "nf4", "family.source": "/models/Wan2.2-T2V-A14B-Diffusers",
        "engine.experts": "one", "objective.turn": 10, "objective.timesteps.kind": "uniform", "schedule.steps": 3000,
        "data.buckets.sides": (768, 512), "data.buckets.choice": "each_size", "data.buckets.frames": (41,),
        "data.sources.0.only": "video", "data.sources.0.repeats": 2, "data.sources.0.extraction.kind": "random",
        "data.sources.1.extraction": None, "data.fps": 16, "data.caption_dropout": 0.0, "save.every": 1000,
        "save.keep": 5, "samples.width": 512, "samples.guidance": 7, "samples.frames": 1,
    })  # fmt: skip
    assert "recovery adapter" in found.dropped["model.qtype"]
    assert "no convolutions" in found.dropped["network.conv"]
    assert "train.do_differential_guidance" in found.dropped


def test_the_high_expert_of_an_image_to_video_model(imported: Import):
    found = imported(HERE / "wan22_i2v_high.yaml")
    check(found.run, {
        "family.expert": "high", "adapter.activation_dropout": 0.1, "objective.timesteps.kind": "uniform",
        "optimizer.kind": "custom", "optimizer.path": "prodigyopt.Prodigy", "optimizer.lr": 1.0,
        "optimizer.args": {"eps": 1e-6, "d_coef": 2, "use_bias_correction": True},
        "schedule.curve": "cosine", "schedule.floor": 5e-6, "track.to": ("wandb",), "track.project": "orbits",
        "samples.prompts.0.image": "/data/statue.png", "samples.prompts.1.text": "the camera orbits a car",
        "samples.prompts.1.image": "/data/car.png", "samples.baseline": False,
    })  # fmt: skip
    assert any("0.875" in text for text in found.warnings) and any("takes 1 for prodigy" in t for t in found.warnings)
    assert {"train.timestep_type", "train.content_or_style", "datasets.0.control_path"} <= found.dropped.keys()
    assert "sample.prompts.1 --s" in found.dropped


def test_a_lokr_of_full_rank_on_the_small_model(imported: Import):
    found = imported(HERE / "wan22_5b_lokr.yaml")
    check(found.run, {
        "adapter.kind": "lokr", "adapter.factor": 8, "adapter.rank": 100_000, "objective.timesteps.kind": "shift",
        "objective.timesteps.shift": 5.0, "objective.timesteps.scale": None, "schedule.warmup": 40,
        "engine.stream_blocks": 15, "engine.recompute": True, "data.sources.0.extraction.kind": "full", "data.fps": 24,
        "samples.prompts": (),
    })  # fmt: skip


def test_steps_of_the_older_accumulation_are_counted_as_optimizer_steps(imported: Import):
    found = imported(HERE / "small.json")
    check(found.run, {
        "seed": 7, "schedule.steps": 1000, "schedule.accumulate": 4, "objective.times": (0.1, 0.8),
        "optimizer.path": "torch.optim.Adam", "data.sources.0.caption_extension": ".caption",
        "adapter.targets": (r"(\w+\.)*blocks\.(.*\.)?.*attn1.*",), "adapter.exclude": (r".*to_out.*",),
    })  # fmt: skip
    assert "process.0" in found.dropped


def test_an_alpha_that_is_not_given_is_1_and_told_of(imported: Import):
    found = imported(HERE / "no_alpha.yaml")
    check(found.run, {"adapter.alpha": 1.0, "schedule.curve": "constant", "optimizer.kind": "adamw"})
    assert any("scaled by 1/32" in text for text in found.warnings)
    assert any("rises from a third of lr" in text for text in found.warnings)
    assert any("no_alpha.yaml:8: 'train.linaer_alpha' is no key" in text for text in found.warnings)
    assert "Did you mean 'network.linear_alpha'?" in found.dropped["train.linaer_alpha"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flux.yaml", r"flux\.yaml:10: the model is 'flux', and Weft trains Wan, HunyuanVideo"),
        ("slider.yaml", r"slider\.yaml:5: the process is a 'concept_slider'"),
        ("twice.yaml", r"twice\.yaml:9:9: the key 'lr' is given twice"),
        ("environment.yaml", r"environment\.yaml:7: .*nothing that is read here is run"),
        ("no_number.yaml", r"no_number\.yaml:8: ai-toolkit's 'network.linear' is 'many'. Expected was a number"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(name: str, said: str, imported: Import):
    with pytest.raises(ConfigError, match=said):
        imported(HERE / name, program="ai-toolkit")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_wan_of_theirs_becomes_a_run(arch: str, tmp_path: Path, imported: Import):
    check(imported(job(tmp_path, model={"arch": arch})).run, {"family.kind": "wan"})


@pytest.mark.parametrize("arch", ["qwen_image", "ltx2", "chroma", "wan23"])
def test_other_models_are_refused_by_name(arch: str, tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match=f"the model is '{arch}'"):
        imported(job(tmp_path, model={"arch": arch}))


def test_places_in_the_list_of_times_become_the_times_that_stand_there(tmp_path: Path, imported: Import):
    asked = {"timestep_type": "sigmoid", "min_denoising_steps": 0, "max_denoising_steps": 499}
    assert imported(job(tmp_path, asked)).run.objective.times == (0.5, 1.0)  # half of the sorted draws lie above 0.5
    shifted = {**asked, "timestep_type": "shift"}
    assert imported(job(tmp_path, shifted)).run.objective.times == (0.75, 1.0)  # 3 x 0.5 / (1 + 2 x 0.5)


def test_times_that_are_reversed_are_exchanged_and_told_of(tmp_path: Path, imported: Import):
    found = imported(job(tmp_path, {"timestep_type": "linear", "min_denoising_steps": 799, "max_denoising_steps": 400}))
    assert found.run.objective.times == (0.2, 0.6)
    assert any("they were exchanged" in text for text in found.warnings)


def test_a_job_without_a_network_trained_everything_and_becomes_a_wide_lora(tmp_path: Path, imported: Import):
    path = job(tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["config"]["process"][0]["network"]
    path.write_text(yaml.safe_dump(content))
    found = imported(path)
    check(found.run, {"adapter.kind": "lora", "adapter.rank": 64})
    assert "trains adapters" in found.dropped["network"]


def test_pictures_for_regularisation_are_left_out(tmp_path: Path, imported: Import):
    datasets = [{"folder_path": "reg", "is_reg": True}, {"folder_path": "clips", "num_frames": 17, "resolution": 256}]
    found = imported(job(tmp_path, datasets=datasets))
    assert [source.path.name for source in found.run.data.sources] == ["clips"]
    assert "regularisation" in found.dropped["datasets.0"]


def test_sources_of_other_shapes_keep_them_apart(tmp_path: Path, imported: Import):
    datasets = [{"folder_path": "a", "num_frames": 33, "resolution": 512}, {"folder_path": "b", "num_frames": 81}]
    data = imported(job(tmp_path, datasets=datasets)).run.data
    assert data.buckets is None and [source.buckets.frames for source in data.sources] == [(33,), (81,)]


def test_a_section_that_is_no_section_is_refused(tmp_path: Path, imported: Import):
    path = tmp_path / "job.json"
    process = {"type": "sd_trainer", "train": 5, "model": {"name_or_path": "m", "arch": "wan21"}}
    path.write_text(json.dumps({"job": "extension", "config": {"name": "a", "process": [process]}}, indent=1))
    with pytest.raises(ConfigError, match=r"job\.json:\d+: 'train' is 5. Expected was a section of ai-toolkit's"):
        imported(path)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optimizer_params": 5}, "'train.optimizer_params' is 5. Expected was a section"),
        ({"optimizer_params": {"weight_decay": "much"}}, "Expected was a number as its 'weight_decay'"),
        ({"steps": float("inf")}, "'train.steps' is inf. Expected was a"),
        ({"lr_scheduler": "cosine", "lr_scheduler_params": {"eta_min": []}}, "Expected was a number as its 'eta_min'"),
    ],
)
def test_a_value_of_another_kind_is_refused(train: dict[str, object], said: str, tmp_path: Path, imported: Import):
    with pytest.raises(ConfigError, match=said):
        imported(job(tmp_path, train))


def test_the_model_that_the_user_names_goes_before_theirs(tmp_path: Path, imported: Import):
    assert imported(job(tmp_path), model="/my/wan").run.family.source == "/my/wan"


def test_every_reason_is_a_sentence():
    assert all(why.endswith(".") for why in {*REASONS.values(), *DATASET_REASONS.values()})
