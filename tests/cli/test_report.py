"""`weft report` writes one file and says where; it needs neither torch nor the server's packages."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dashboard import folders
from weft.cli.main import main

TOO_MUCH = {"torch", "starlette", "uvicorn", "transformers", "diffusers", "av"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folders.one_point(tmp_path / "runs", time.time())
    return tmp_path / "runs"


def test_the_file_lies_in_the_runs_folder_unless_told_otherwise(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(runs / "one-point")]) == 0
    written = runs / "one-point" / "report.html"
    assert written.read_text("utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out == f"{written} ({written.stat().st_size / 1e3:.1f} kB)\n"
    assert main(["report", str(runs / "one-point"), "--out", str(runs / "there" / "a.html"), "--no-config"]) == 0
    assert "<h2>Config" not in (runs / "there" / "a.html").read_text("utf-8")


def test_where_there_is_no_run_the_nearest_is_told(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(runs / "one-pont")]) == 2
    assert capsys.readouterr().err == f"error: {runs}/one-pont: there is no run here. Did you mean 'one-point'?\n"
    assert main(["report", str(runs)]) == 2
    assert "Runs within it: one-point." in capsys.readouterr().err


def test_what_cannot_be_written_or_cannot_hold_a_page_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(runs / "one-point"), "--out", str(runs)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["report", str(runs / "one-point"), "--max-mb", "0"]) == 2


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_reading_needs_no_torch_and_no_server(runs: Path, tmp_path: Path, verb: str):
    folders.no_points(runs, time.time())
    more = [str(runs / "no-points"), "--html"] if verb == "compare" else ["--out"]
    arguments = [verb, str(runs / "one-point"), *more, str(tmp_path / "a.html")]
    code = (
        "import sys; from weft.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert not set(done.stdout.rpartition("MODULES ")[2].split()) & TOO_MUCH
