"""Ready configs by their names: here first, then those that ship; composed of model, paths and experiment."""

from pathlib import Path

import pytest
import yaml

from weft.cli.seeds import seeds_of
from weft.config.ready import SHIPPED, experiments, find_config, ready_names
from weft.config.source import read_source
from weft.errors import ConfigError
from weft.run.config import load_config

SHIPPED_NAMES = [file.stem for file in experiments(SHIPPED)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_every_learner_ships_with_and_without_peft():
    learners = ("traditional", "replay", "agem", "cmaml", "sync", "lamaml")
    names = {f"{learner}_seq_2019_2024{peft}" for learner in learners for peft in ("", "_peft")}
    assert names | {"traditional_joint_2019_2024", "traditional_joint_2019_2024_peft"} == set(SHIPPED_NAMES)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_shipped_experiment_is_what_its_name_says(name):
    config = load_config(Path(name))
    learner, mode, *_ = name.split("_")
    assert (config.name, config.objective.kind) == (name, learner)
    assert config.adapter.kind == ("lora" if name.endswith("_peft") else "none")
    assert config.data.mode == {"seq": "sequential", "joint": "joint"}[mode]
    assert config.data.tasks == "2019..2024"
    assert (config.data.replay is None) == (learner == "traditional")


def test_an_experiment_is_composed_of_the_users_own_model_and_paths():
    write("configs/model.yaml", "family: {kind: encoder, source: models/own}")
    write("configs/paths.yaml", "output: elsewhere\ndata: {kind: documents, path: own.csv, date: when}")
    config = load_config(Path("replay_seq_2019_2024_peft"))
    assert (config.family.source, config.output, config.data.date) == ("models/own", Path("elsewhere"), "when")
    assert config.data.year is None  # the shipped paths are no part of it
    assert config.objective.kind == "replay"


def test_a_part_of_ones_own_takes_the_place_of_the_shipped_one():
    write("configs/parts/memory.yaml", "data: {replay: {size: 7, batch: 3}}")
    assert load_config(Path("replay_seq_2019_2024")).data.replay.size == 7


def test_an_experiment_of_ones_own_may_extend_shipped_parts():
    write("configs/mine.yaml", "extends: [model.yaml, paths.yaml, parts/peft.yaml, parts/replay.yaml]\nname: mine")
    assert find_config(Path("mine")) == Path("configs/mine.yaml")
    assert load_config(Path("mine"), ["adapter.rank=3"]).adapter.rank == 3


def test_a_config_here_comes_before_the_shipped_one_of_its_name():
    write("configs/replay_seq_2019_2024.yaml", "name: own")
    assert read_source(Path("replay_seq_2019_2024")).data == {"name": "own"}
    assert ready_names().count("replay_seq_2019_2024") == 1


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'lamaml_seq_2019_204_peft'. Did you mean 'lamaml_seq_2019_2024_peft'\?"):
        find_config(Path("lamaml_seq_2019_204_peft"))


def test_a_file_stays_a_file_and_a_stray_word_is_told_as_before():
    write("replay_seq_2019_2024", "name: a-file")
    assert find_config(Path("replay_seq_2019_2024")) == Path("replay_seq_2019_2024")
    with pytest.raises(ConfigError, match="no such file 'zzz'"):
        read_source(Path("zzz"))


def test_a_base_that_nobody_has_is_told_with_its_place():
    write("configs/mine.yaml", "extends: parts/nothing.yaml\nname: mine")
    with pytest.raises(ConfigError, match=r"mine.yaml:1.*no such file 'configs/parts/nothing.yaml'"):
        read_source(Path("mine"))


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("3", [3]), ("0,7", [0, 7]), ("0-1,5", [0, 1, 5])]
)
def test_seeds_are_ranges_and_lists(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "4-0", "a", "1,,2", "0-2,1", "-1"])
def test_seeds_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_of(text)


def test_shipped_configs_say_why_in_their_first_line():
    for file in SHIPPED.rglob("*.yaml"):
        assert file.read_text().startswith("# "), file
        assert isinstance(yaml.safe_load(file.read_text()), dict)
