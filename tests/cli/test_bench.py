"""weft bench on the command line: a case as JSON, comparisons with their exit codes, and mistakes in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from weft.cli.main import main


def figures(seconds: float, name: str = "a", gpu: str = "one") -> dict[str, Any]:
    return {"schema": 2, "case": {"name": name, "batch": 1, "source": str(seconds)}, "hardware": {"gpu": gpu},
            "step_seconds": {"median": seconds}, "memory_bytes": {"peak": 100, "by": "counted"}}  # fmt: skip


@pytest.fixture
def compare(tmp_path: Path) -> Any:
    def run(first: list[dict[str, Any]], second: list[dict[str, Any]], *options: str) -> int:
        for name, cases in (("first", first), ("second", second)):
            (tmp_path / name).write_text(json.dumps(cases))
        return main(["bench", "compare", str(tmp_path / "first"), str(tmp_path / "second"), *options])

    return run


def test_a_case_that_takes_longer_than_it_may_ends_with_1(compare, capsys) -> None:
    assert compare([figures(1.0)], [figures(1.02)], "--fail-above", "1.03") == 0
    assert compare([figures(1.0)], [figures(1.05)]) == 0
    assert compare([figures(1.0)], [figures(1.05)], "--fail-above", "1.03") == 1
    said = capsys.readouterr().out
    assert "x1.050" in said and "x1.000" in said and "1 of 1 cases took more than 1.03 times" in said


def test_other_cases_and_other_hardware_are_refused_unless_forced(compare, capsys) -> None:
    assert compare([figures(1.0)], [figures(1.0, name="b")]) == 2
    assert compare([figures(1.0)], [figures(1.0, gpu="two")]) == 2
    said = capsys.readouterr().err
    assert "only one file has 'a'" in said and "hardware.gpu is one in the first and two in the second" in said
    assert compare([figures(1.0)], [figures(2.0, gpu="two")], "--force") == 0


def test_figures_of_an_earlier_schema_are_refused(compare, capsys) -> None:
    assert compare([figures(1.0) | {"schema": 1}], [figures(1.0)]) == 2
    assert "has schema 1, and this Weft reads 2" in capsys.readouterr().err


def test_mistakes_are_told_in_words(capsys) -> None:
    assert main(["bench", "--model", "wan2.1-1.3", "--clip", "1x64x64"]) == 2
    assert main(["bench", "--suite", "smoke", "--model", "wan2.1-1.3b"]) == 2
    assert main(["bench", "--blocks", "2"]) == 2
    assert main(["bench", "--steps", "0"]) == 2
    said = capsys.readouterr().err
    assert "Did you mean 'wan2.1-1.3b'?" in said and "Use one." in said and "belong to --model" in said
    assert "are 1 at least" in said


def test_what_was_measured_before_ctrl_c_stays(tmp_path, monkeypatch, capsys) -> None:
    told = figures(1.0) | {"hardware": {"processor": "p"}, "clips_per_second": 5.0}

    def measured(*_: Any) -> Any:
        yield told
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.cli.bench.figures_of", measured)
    assert main(["bench", "--json", str(tmp_path / "out.json")]) == 130
    assert json.loads((tmp_path / "out.json").read_text()) == [told]
    assert "1 cases were measured, and they are in" in capsys.readouterr().err
