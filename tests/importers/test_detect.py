"""Whose file it is, is told by what stands in it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.importers.conftest import CONFIGS
from weft.errors import ConfigError
from weft.importers.detect import IMPORTERS, hints, importer, likely, recognised
from weft.importers.reading import read

ALL = sorted(path for program in ("musubi", "videox-fun") for path in (CONFIGS / program).iterdir())
UNREADABLE = ("broken.toml", "open_quote.sh")
OF_NOBODY = "name: a\nfamily: {kind: wan, source: m}\nadapter: {kind: lora, rank: 4}\n"


@pytest.mark.parametrize("path", [path for path in ALL if path.name not in (*UNREADABLE, "prompts.txt")], ids=str)
def test_each_file_is_told_to_be_its_own_program_s(path: Path):
    assert recognised([read(path)]) == path.parent.name


@pytest.mark.parametrize("name", IMPORTERS)
def test_every_importer_of_the_table_is_there_and_says_its_name(name: str):
    assert importer(name).name


def test_our_own_config_is_nobody_s(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(OF_NOBODY)
    assert likely([read(tmp_path / "run.yaml")]) is None
    with pytest.raises(ConfigError, match="no trainer is recognised"):
        recognised([read(tmp_path / "run.yaml")])


def test_a_dataset_of_kohya_s_sd_scripts_is_not_musubi_s(tmp_path: Path):
    (tmp_path / "d.toml").write_text('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n')
    assert likely([read(tmp_path / "d.toml")]) is None


def test_a_bare_list_of_flags_is_told_by_its_flags(script: Callable[..., Path]):
    text = "--task t2v-14B --dit a.safetensors --network_module networks.lora_wan --blocks_to_swap 3"
    assert recognised([read(script(text, "flags.txt"))]) == "musubi"


def test_an_unknown_importer_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'musubi'"):
        importer("musubi-tuner")


def test_a_verb_that_was_handed_another_trainer_s_file_hints_at_import(tmp_path: Path):
    path = CONFIGS / "musubi" / "wan21_i2v.toml"
    assert list(hints(["train", str(path)])) == [
        f"{path} is a file of musubi-tuner. Turn it into ours with: weft import {path} --out run.yaml"
    ]
    (tmp_path / "run.yaml").write_text(OF_NOBODY)
    assert not list(hints(["train", str(tmp_path / "run.yaml")]))
    assert not list(hints(["train", str(CONFIGS / "musubi" / "broken.toml")]))
    assert not list(hints(["show", str(path)])) and not list(hints(["train", "missing.yaml"]))
