"""Settings in sections are read by dotted names, and what nobody asked for is told once, without secrets."""

from pathlib import Path

import pytest

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.nested import beside, dotted, leave, put_folder, put_frames, put_source, run_name, whole_frames
from weft.importers.reading import read

TEXT = """\
train:
  lr: 1e-4
  options: {a: 1}
  empty: {}
  off: false
  token: abc
  home: ${HOME}/x
model:
  rank: 4
  rnak: 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    return path


def test_names_are_dotted_and_places_are_lines(file: Path):
    theirs = dotted(read(file), "theirs", whole=("train.options",))
    assert theirs.number("train.lr") == 1e-4 and theirs.place("model.rank").endswith("a.yaml:9")
    assert theirs.take("train.options") == {"a": 1} and "train.empty" not in theirs


def test_what_the_environment_would_say_is_refused(file: Path):
    with pytest.raises(ConfigError, match=r"a\.yaml:7: 'train.home' is .*nothing that is read here is run"):
        dotted(read(file), "theirs").text("train.home")


def test_what_is_left_is_told_and_secrets_are_hidden(file: Path):
    draft = Draft("theirs")
    theirs = dotted(read(file), "theirs", whole=("train.options",))
    theirs.whole("model.rank")
    leave(theirs, draft, {"train.options": "It is none."}, ("train.off", "train.lr", "train.home"), ("train.token",))
    told = {note.of: (note.theirs, note.text) for note in draft.notes if note.kind == "drop"}
    assert told["train.off"][0] == "off" and told["train.token"][0] == "(not shown)"
    assert told["train.options"] == ({"a": 1}, "It is none.")
    assert "Did you mean 'model.rank'?" in told["model.rnak"][1]


def test_a_name_on_the_hub_becomes_a_folder_with_the_command_that_fetches_it():
    draft = Draft("theirs")
    assert put_source(draft, "Wan-AI/Wan2.1", "model") == "models/Wan2.1"
    assert "hf download Wan-AI/Wan2.1 --local-dir models/Wan2.1" in draft.notes[0].text
    assert put_source(draft, "/models/wan", "model") == "/models/wan"
    assert put_source(draft, "files/wan.safetensors", "model") == "files/wan.safetensors"
    assert put_source(Draft("theirs", "mine"), "/models/wan", "model") == "mine"


@pytest.mark.parametrize(
    ("folder", "output", "name"),
    [("runs/a", "runs", "a"), ("a", ".", "a"), ("/runs/my run/", "/runs", "my-run"), ("D:\\runs\\b", "D:/runs", "b")],
)
def test_one_folder_of_theirs_is_our_output_and_name(folder: str, output: str, name: str):
    draft = Draft("theirs")
    put_folder(draft, folder, "output_dir")
    assert (draft.get("output"), draft.get("name")) == (output, name)


def test_frames_are_whole_latent_frames():
    assert [whole_frames(count) for count in (0, 1, 4, 5, 40, 81)] == [1, 1, 1, 5, 37, 81]
    draft = Draft("theirs")
    assert put_frames(draft, "data.buckets.frames", [34, 81, 33], "frames") == [81, 33]
    assert "34 became less" in draft.notes[0].text


def test_names_of_runs_are_names_of_folders():
    assert [run_name(text) for text in ("a b", "../x", "Ünï", "???")] == ["a-b", "x", "Ünï", "run"]


def test_a_named_file_is_looked_up_around_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "examples" / "deep").mkdir(parents=True)
    (tmp_path / "data.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "examples")
    assert beside(tmp_path / "examples" / "deep" / "a.yaml", "data.json") == tmp_path / "data.json"
    assert beside(tmp_path / "examples" / "deep" / "a.yaml", "none.json") is None
