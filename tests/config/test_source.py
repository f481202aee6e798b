"""Reading YAML: its scalars, its places, its faults; files that extend files; the command line."""

from pathlib import Path

import pytest

from weft.config.source import Source, read_source, read_text
from weft.errors import ConfigError


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "run.yaml", overrides)
    return str(caught.value)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4),
        ("5.", 5.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("-3", -3),
        ("true", True),
        ("off", "off"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("007", "007"),
        ("1e", "1e"),
        ("~", None),
        ("'1'", "1"),
        ("${HOME}", "${HOME}"),
        (".inf", float("inf")),
    ],
)
def test_scalars_follow_yaml_1_2(written: str, meant: object):
    value = read_text(f"a: {written}").data["a"]
    assert value == meant and type(value) is type(meant)
    assert read_text("", overrides=[f"a={written}"]).data["a"] == meant


def test_every_key_and_item_remembers_its_place():
    source = read_text("a: 1\nb:\n  c:\n    - x\n    - y: 2\n", "run.yaml")
    assert str(source.place(("b", "c"))) == "run.yaml:3:3"
    assert str(source.place(("b", "c", 1, "y"))) == "run.yaml:5:7"
    assert str(source.place(("b", "missing"))) == "run.yaml:2:1"


def test_an_empty_file_is_an_empty_config():
    assert read_text("# nothing\n").data == {}


def test_a_doubled_key_is_refused_with_both_places():
    said = refused("a: 1\nb: {c: 1, c: 2}\na: 2\n")
    assert "run.yaml:2:11: the key 'c' is given twice, first at run.yaml:2:5" in said
    assert "run.yaml:3:1: the key 'a' is given twice, first at run.yaml:1:1" in said


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("a:\n\tb: 1\n", "run.yaml:2:1", "a tab stands here"),
        ('a: "C:\\data"\n', "run.yaml:1:8", "forward slashes"),
        ("a: b: c\n", "run.yaml:1:5", "a second ':'"),
        ("a: [1, 2\n", "run.yaml:2:1", "not closed"),
        ("a: 1\nb\n", "run.yaml:3:1", "no ':' behind it"),
        ("a: *x\n", "run.yaml:1:4", "is an alias"),
        ("a: &x [*x]\n", "run.yaml:1:4", "inside its own anchor"),
        ("a: !!python/name:os.system x\n", "run.yaml:1:4", "Take the tag out"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2:1", "one document"),
        ("a: \x07\n", "run.yaml:1:4", "cannot stand in YAML"),
        ("- a\n", "run.yaml:1:1", "keys with values"),
    ],
)
def test_what_is_not_yaml_is_answered_in_one_line_with_its_place(text: str, place: str, hint: str):
    said = refused(text)
    assert said.startswith(f"{place}: ") and hint in said and "\n" not in said


def test_anchors_and_merge_keys_work_and_own_keys_win():
    source = read_text("base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\n")
    assert source.data["mine"] == {"x": 1, "y": 3}
    assert source.place(("mine", "y")).line == 2


def test_a_missing_file_names_the_folder_and_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, run="a: 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such file 'rum.yaml' \(in .*\)\. Did you mean 'run.yaml'\?"):
        read_source(Path("rum.yaml"))


def test_a_file_extends_others_key_by_key_and_places_stay_with_their_files(tmp_path: Path):
    write(tmp_path, base="a: {x: 1, y: 2}\nl: [1, 2]\n", run="extends: base.yaml\na: {y: 3}\nl: [9]\n")
    source = read_source(tmp_path / "run.yaml")
    assert source.data == {"a": {"x": 1, "y": 3}, "l": [9]}
    assert source.place(("a", "x")).file.endswith("base.yaml")
    assert source.place(("a", "y")).file.endswith("run.yaml")
    assert ("l", 1) not in source.places


def test_of_several_bases_the_later_wins(tmp_path: Path):
    write(tmp_path, one="a: 1\nb: 1\n", two="b: 2\n", run="extends: [one.yaml, two.yaml]\n")
    assert read_source(tmp_path / "run.yaml").data == {"a": 1, "b": 2}


def test_a_section_of_another_kind_takes_over_no_keys(tmp_path: Path):
    write(tmp_path, base="o: {kind: adamw, eps: 1}\n", run="extends: base.yaml\no: {kind: custom, path: x}\n")
    assert read_source(tmp_path / "run.yaml").data == {"o": {"kind": "custom", "path": "x"}}


def test_files_that_extend_one_another_in_a_circle_are_refused(tmp_path: Path):
    write(tmp_path, one="extends: two.yaml\n", two="extends: one.yaml\n")
    with pytest.raises(ConfigError, match=r"in a circle: one.yaml -> two.yaml -> one.yaml"):
        read_source(tmp_path / "one.yaml")


def test_a_missing_base_is_told_where_it_was_asked_for(tmp_path: Path):
    write(tmp_path, base="a: 1\n", run="a: 1\nextends: bsae.yaml\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2:1: extends: no such file .*Did you mean '.*base.yaml'\?"):
        read_source(tmp_path / "run.yaml")


def overridden(text: str, *overrides: str) -> Source:
    return read_text(text, "run.yaml", overrides)


def test_the_command_line_reaches_sections_and_list_items():
    source = overridden("a: {x: 1}\nl:\n  - p: 1\n", "a.x=2", "l.0.p=off", "l.1.p=[1, 2]", "new.deep={q: 1e-4}")
    assert source.data == {"a": {"x": 2}, "l": [{"p": "off"}, {"p": [1, 2]}], "new": {"deep": {"q": 1e-4}}}
    assert str(source.place(("a", "x"))) == str(source.place(("new", "deep", "q"))) == "(command line)"
    assert str(source.place(("a",))) == "run.yaml:1:1"


def test_text_on_the_command_line_needs_no_quotes_for_a_colon():
    assert overridden("", "prompt=a cat: asleep #1").data == {"prompt": "a cat: asleep #1"}


def test_what_cannot_be_set_is_told_all_at_once():
    said = refused("l: [1]\nn: 5\n", "rank", "l.3=1", "n.x=1", "a..b=1", "q=[1")
    assert said.count("(command line): ") == 5
    assert "'rank' is no assignment. Write key=value" in said
    assert "l is a list of 1, so '3' is no place in it" in said
    assert "n is 5, so it has no 'x' in it" in said
