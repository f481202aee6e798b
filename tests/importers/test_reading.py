"""Files of other trainers are plain data with line numbers, and their mistakes are told with place."""

from collections.abc import Callable
from pathlib import Path

import pytest

from weft.errors import ConfigError
from weft.importers.reading import read

Write = Callable[..., Path]


def test_lines_of_a_toml_are_those_of_keys_tables_and_arrays_of_tables(script: Write):
    file = read(script('a = 1\n\n[b]\nc = [\n  2,\n]\n"d.e" = 3\n[[f]]\ng = 4\n[[f]]\ng = 5\n[f.h]\ni = 6\n', "x.toml"))
    assert file.lines[("a",)] == 1 and file.lines[("b", "c")] == 4 and file.lines[("b", "d.e")] == 7
    assert (file.lines[("f", 0, "g")], file.lines[("f", 1, "g")], file.lines[("f", 1, "h", "i")]) == (9, 11, 13)
    assert file.place("f", 1, "g") == f"{file.path}:11"
    assert file.place("f", 1, "unknown") == f"{file.path}:10"


def test_lines_of_a_json_are_found_also_for_keys_that_stand_twice(script: Write):
    file = read(script('{"a": {"b": 1},\n "c": [\n  {"b": 2},\n  {"b": 3}]}', "x.json"))
    assert [file.lines[path] for path in (("a", "b"), ("c", 0, "b"), ("c", 1, "b"))] == [1, 3, 4]


def test_a_file_without_ending_is_told_by_how_it_begins(script: Write):
    begin = {"#!/bin/bash\npython x": "shell", "--dit a": "args", '{"a": 1}': "json", "[a]\nb=1": "toml",
             "a = 1": "toml", "a: 1": "yaml", "accelerate launch x": "shell"}  # fmt: skip
    assert {text: read(script(text, "config")).kind for text in begin} == begin


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.toml", "a = 1\nb = \n", "x.toml:2:5: not TOML: invalid value"),
        ("x.toml", "a = 1\na = 2\n", "x.toml:2:6: not TOML: cannot overwrite a value"),
        ("x.json", '{"a": 1,\n "b"}', "x.json:2:5: not JSON: expecting ':' delimiter"),
        ("x.json", '{"a": 1, "a": 2}', "x.json: the key 'a' is given twice"),
        ("x.yaml", "a: 1\na: 2\n", "x.yaml:2:1: the key 'a' is given twice"),
        ("x.yaml", "a: !!python/name:os.system x\n", "x.yaml:1:4: 'x' cannot be read as"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(name: str, text: str, said: str, script: Write):
    with pytest.raises(ConfigError) as refused:
        read(script(text, name))
    assert said in str(refused.value)


def test_a_tag_that_would_make_python_call_something_calls_nothing(script: Write, tmp_path: Path):
    trace = tmp_path / "trace"
    file = read(script(f"a: !!python/object/apply:os.system ['touch {trace}']\n", "x.yaml"))
    assert file.content == {"a": [f"touch {trace}"]} and not trace.exists()


def test_aliases_that_grow_without_end_are_refused(script: Write):
    levels = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(ConfigError, match="aliases stand for more than"):
        read(script(f"a0: &a0 [x]\n{levels}", "x.yaml"))


@pytest.mark.parametrize("name", ["x.yaml", "x.toml", "x.json"])
def test_lists_without_end_are_refused(name: str, script: Write):
    opened = {"x.toml": "a = "}.get(name, "") + "[" * (800 if name == "x.yaml" else 3_000)
    with pytest.raises(ConfigError):
        read(script(opened, name))


def test_what_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    for path, said in (
        (tmp_path / "weights.yaml", "not UTF-8"),
        (tmp_path, "is a folder"),
        (tmp_path / "no", "no file"),
    ):
        with pytest.raises(ConfigError, match=said):
            read(path)


def test_a_page_of_text_is_no_config(script: Write):
    with pytest.raises(ConfigError, match=r"README.md' is neither a config nor a launch script"):
        read(script("# Title\n\nSome words: here.\nAnd *more*\n", "README.md"))
