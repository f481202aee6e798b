"""`weft init` writes a config that parses as it stands, for every model that it knows."""

import shutil
from pathlib import Path

import pytest

import weft
from weft.cli.init import run
from weft.cli.models import MODELS, WAN_I2V
from weft.cli.plan import run as plan
from weft.errors import ConfigError, DataError, ModelError
from weft.run.config import RunConfig, load_config

TINY = Path(weft.__file__).parent / "demo" / "tiny_wan"


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of twenty clips in the working folder, by their names alone."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my clips"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.mp4").touch()
    return Path("my clips")


def init(*arguments: str | Path) -> RunConfig:
    assert run([str(argument) for argument in arguments]) == 0
    return load_config(Path("run.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_for_a_known_model_parses_and_names_its_sizes(model: str, clips: Path):
    config = init(model, "--data", clips)
    assert config.samples.frames == MODELS[model].sample[2]
    assert config.objective.timesteps.shift == MODELS[model].shift
    assert config.data.sources[0].path == clips
    assert config.data.validation_items == 2


def test_every_line_but_headings_says_why_or_in_which_unit(clips: Path):
    init("wan2.1-t2v-1.3b", "--data", clips)
    text = Path("run.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=file:///")
    bare = [line for line in text.splitlines()[2:] if line and not line.endswith(":") and "#" not in line]
    assert [line.strip() for line in bare] == ["kind: lora", "kind: flow-matching", "kind: video"]


def test_the_next_commands_are_told_with_the_download_when_it_is_needed(clips: Path, capsys):
    init("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "--data", clips)
    commands = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert commands == [["hf", "download"], ["weft", "plan"], ["weft", "train"]]


def test_a_folder_in_diffusers_layout_is_recognised(clips: Path):
    config = init(TINY, "--data", clips)
    assert config.family.source == TINY.as_posix() and config.data.fps == 8


def test_a_long_folder_does_not_swallow_the_comment_behind_it(tmp_path: Path, clips: Path):
    long = tmp_path / ("a" * 60)
    shutil.copytree(TINY, long)
    assert init(long, "--data", clips).family.source == long.as_posix()


def test_a_folder_that_is_no_model_is_refused(clips: Path):
    with pytest.raises(ModelError, match="is no model that Weft knows"):
        run([str(clips), "--data", str(clips)])


@pytest.mark.parametrize("model", ["tiny-wann", "Tiny_Wan", "Wan-AI/tiny-wam"])
def test_an_unknown_model_is_answered_with_the_nearest(model: str, clips: Path):
    with pytest.raises(ConfigError, match=r"Did you mean 'tiny-wan'\?"):
        run([model, "--data", str(clips)])


def test_a_config_that_is_there_is_not_overwritten(clips: Path):
    Path("run.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.yaml is already there"):
        run(["tiny-wan", "--data", str(clips)])
    assert Path("run.yaml").read_text() == "mine"


def test_data_that_is_not_there_is_answered_before_anything_is_written(clips: Path):
    with pytest.raises(DataError, match=r"there is no 'my clip' .* Did you mean 'my clips'\?"):
        run(["tiny-wan", "--data", "my clip"])
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"'empty' holds no clip \(\.mp4"):
        run(["tiny-wan", "--data", "empty"])
    assert not Path("run.yaml").exists()


def test_musubis_dataset_file_is_written_out_in_our_own_keys(tmp_path: Path, clips: Path):
    """960 x 544 pixels are an area of 722.7 squared."""
    toml = tmp_path / "set.toml"
    toml.write_text(
        '[general]\nresolution = [960, 544]\nenable_bucket = true\ncaption_extension = ".txt"\n'
        '[[datasets]]\nvideo_directory = "my clips"\ntarget_frames = [1, 25]\nframe_extraction = "uniform"\n'
        "frame_sample = 4\nnum_repeats = 2\n"
    )
    config = init("wan2.2-t2v-a14b", "--data", toml)
    (source,) = config.data.sources
    assert (source.path, source.repeats, source.caption_extension) == (Path("my clips"), 2, ".txt")
    assert config.data.buckets.frames == (1, 25) and config.data.buckets.sides == (723,)
    assert source.extraction.count == 4


def test_a_model_of_two_networks_is_written_with_both_and_their_turns(clips: Path):
    config = init("wan2.2-t2v-a14b", "--data", clips)
    assert (config.family.expert, config.objective.turn, config.samples.guidance_low) == ("both", 50, 3.0)


def test_hunyuan_video_is_written_as_its_own_family(clips: Path):
    config = init("hunyuan-video", "--data", clips)
    assert (config.family.kind, config.samples.guidance) == ("hunyuan-video", 6.0)


# ---- Distillation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("# what is to be learned\na red square\n\na blue circle: it moves\na green ring\n")
    return Path("prompts.txt")


@pytest.mark.parametrize("model", [name for name, known in MODELS.items() if known.does != WAN_I2V])
def test_a_model_is_distilled_on_captions_alone_at_the_size_that_it_is_sampled_in(model: str, captions: Path):
    config, known = init(model, "--data", captions, "--distill"), MODELS[model]
    assert (config.objective.kind, config.data.kind, config.data.files) == ("dmd", "prompts", (captions,))
    assert (*config.data.buckets.sizes[0], *config.data.buckets.frames) == known.sample
    assert [prompt.text for prompt in config.samples.prompts] == ["a red square", "a blue circle: it moves"]
    assert config.optimizer_of("critic").lr == pytest.approx(4 * config.optimizer_of("student").lr)
    assert config.optimizer_of("student").betas == config.optimizer_of("critic").betas == (0.0, 0.999)


@pytest.mark.parametrize("model", ["wan2.1-i2v-14b-480p", "wan2.2-ti2v-5b", "tiny-wan"])
def test_a_folder_of_clips_is_distilled_on_them_and_none_is_held_out(model: str, clips: Path):
    config = init(model, "--data", clips, "--distill")
    assert (config.objective.kind, config.data.kind, config.data.validation_items) == ("dmd", "video", 0)


def test_every_line_of_a_distillation_says_why_too(captions: Path):
    init("wan2.2-t2v-a14b", "--data", captions, "--distill")
    lines = Path("run.yaml").read_text().splitlines()[2:]
    bare = [line.strip() for line in lines if line and not line.endswith(":") and "#" not in line]
    assert bare == ["kind: lora", "kind: adamw", "kind: adamw"]
    assert max(map(len, lines)) <= 160


def test_a_model_that_goes_on_from_an_image_is_not_distilled_on_captions(captions: Path):
    with pytest.raises(ConfigError, match=r"prompts\.txt' has captions alone, and this model goes on from an image"):
        run(["wan2.1-i2v-14b-480p", "--data", "prompts.txt", "--distill"])


def test_a_language_model_is_not_distilled_into_steps(captions: Path):
    with pytest.raises(ConfigError, match=r"'qwen3-0\.6b' is a language model"):
        run(["qwen3-0.6b", "--data", "prompts.txt", "--distill"])


def test_captions_that_are_not_there_are_answered_with_the_nearest(captions: Path):
    with pytest.raises(DataError, match=r"Did you mean 'prompts\.txt'\?"):
        run(["tiny-wan", "--data", "prompt.txt", "--distill"])


def test_what_is_written_for_the_shipped_model_can_be_planned(captions: Path, capsys):
    init("tiny-wan", "--data", captions, "--distill")
    assert plan(["run.yaml", "objective.steps=2"]) == 0  # of fewer steps it is sooner planned
    said = capsys.readouterr().out
    assert "student: LoRA" in said and "every 5th step, 120 steps" in said
