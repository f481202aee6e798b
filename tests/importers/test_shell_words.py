"""A script is taken apart into words with its own plain variables, and nothing in it is run."""

from pathlib import Path

import pytest

from weft.errors import ConfigError
from weft.importers.shell_words import Command, Script, read_script


def words(text: str, name: str = "train.sh") -> list[str]:
    """Those of the last command."""
    return [word.text for word in commands(text, name)[-1].words]


def commands(text: str, name: str = "train.sh") -> tuple[Command, ...]:
    return script(text, name).commands


def script(text: str, name: str = "train.sh") -> Script:
    return read_script(text, Path(name))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python a.py --x 1 \\\n  --y 'two words' # why\n", ["python", "a.py", "--x", "1", "--y", "two words"]),
        ("A=3\npython --x $A --y \"${A}b\" --z '$A'", ["python", "--x", "3", "--y", "3b", "--z", "$A"]),
        ("python --x ${A:-7} --y ${1:-8}", ["python", "--x", "7", "--y", "8"]),
        ('A="--x 1"\npython $A "$A"', ["python", "--x", "1", "--x 1"]),
        ("A=(--x 1)\nA+=(--y 'a b')\npython \"${A[@]}\"", ["python", "--x", "1", "--y", "a b"]),
        ("A=a\nA+=b\npython $A", ["python", "ab"]),
        ("python --x 1 2>&1 | tee log", ["tee", "log"]),
        ("python --x 1 > log 2> errors", ["python", "--x", "1"]),
        ('python --x "it\'s \\"so\\""', ["python", "--x", 'it\'s "so"']),
        ("python --empty ''", ["python", "--empty", ""]),
        ("cat <<END\n--not a flag\nEND\npython b", ["python", "b"]),
    ],
)
def test_words_are_those_of_a_shell(text: str, expected: list[str]):
    assert words(text) == expected


def test_an_array_with_separators_in_it_comes_to_an_end():
    assert words('A=(--x 1; --y | 2)\npython "${A[@]}"') == ["python", "--x", "1", "--y", "2"]


def test_variables_before_a_command_and_exported_ones_are_its_environment():
    found = commands("export A=1\nB=2\nC=3 python x")[-1]
    assert {name: word.text for name, word in found.environment.items()} == {"A": "1", "C": "3"}


@pytest.mark.parametrize("text", ["$(date)", "`date`", "$((1 + 2))", "$HOME", "${A%/}", "$1"])
def test_what_only_a_shell_could_say_is_marked_and_not_run(text: str):
    word = commands(f"python --x {text} --y")[-1].words[2]
    assert word.unknown == text
    assert commands(f"python --x {text} --y")[-1].words[3].text == "--y"


def test_a_variable_made_of_a_command_marks_the_words_that_use_it():
    found = commands("A=run-$(date)\npython --x $A")[-1].words[-1]
    assert (found.text, found.unknown) == ("run-$(date)", "$(date)")


def test_a_command_substitution_leaves_no_trace_on_the_disk(tmp_path: Path):
    trace = tmp_path / "trace"
    script(f"A=$(touch {trace})\npython `touch {trace}` --x $A; eval touch {trace}")
    assert not trace.exists()


def test_lines_are_counted_over_continuations_and_quotes():
    found = commands("\n# one\nA='x\ny'\npython \\\n  --z")[-1]
    assert [word.line for word in found.words] == [5, 6]


def test_a_batch_file_has_carets_and_percent_signs_and_its_backslashes_are_paths():
    text = 'set D=C:\\wan\nset "E=D:\\a b"\npython ^\n  --dit %D%\\x.safetensors --vae "%E%\\y"\n'
    assert words(text, "train.bat") == ["python", "--dit", "C:\\wan\\x.safetensors", "--vae", "D:\\a b\\y"]


def test_powershell_has_backticks():
    assert words('$d = "C:\\wan"\npython `\n  --dit $d\n', "train.ps1") == ["python", "--dit", "C:\\wan"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python --x 'a\n", "train.sh:1: the quote ' is opened"),
        ('\npython --x "a\n', "train.sh:2: the quote"),
        ("A=(1 2\npython", "train.sh:1: a '(' is opened"),
    ],
)
def test_what_is_not_closed_is_told_with_its_line(text: str, said: str):
    with pytest.raises(ConfigError) as refused:
        script(text)
    assert str(refused.value).startswith(said)
