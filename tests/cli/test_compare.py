"""`weft compare` sets runs beside one another: in the terminal, in a pipe, as a page."""

import time
from pathlib import Path

import pytest
import yaml

from tests.dashboard import folders
from weft.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    for name, rank in (("first", 16), ("second", 32)):
        config = folders.finished(root, time.time(), name) / "config.yaml"
        resolved = yaml.safe_load(config.read_text("utf-8"))
        resolved["adapter"]["rank"] = rank
        config.write_text(yaml.safe_dump(resolved))
    return root


def test_a_pipe_gets_plain_lines_with_the_last_numbers_and_only_the_keys_that_differ(
    runs: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", str(runs / "first"), str(runs / "second")]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("  ")[0]: line.split() for line in lines if line}
    assert cells["Last numbers"][-2:] == cells["Config"][-2:] == ["first", "second"]
    assert cells["state"][-2:] == ["finished", "finished"] and cells["steps"][1:4] == ["200", "of", "200"]
    assert "0.1700 at step 200" in next(line for line in lines if line.startswith("best validation loss"))
    assert "-0.1900 ± 0.0100" in next(line for line in lines if line.startswith("difference"))
    after = lines[next(i for i, line in enumerate(lines) if line.startswith("Config")) + 1 :]
    assert after[0].split() == ["adapter.rank", "16", "32"] and after[1].endswith("keys are the same in all.")
    assert all(line == line.rstrip() and line.isprintable() for line in lines)


def test_a_page_overlays_the_curves_and_sets_samples_side_by_side(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "both.html"
    assert main(["compare", str(runs / "first"), str(runs / "second"), "--html", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out} (")
    page = out.read_text("utf-8")
    assert page.count("<video") == 4 and "first, step 200" in page and "second, step 200" in page
    legend = page.partition('<ul class="legend">')[2].partition("</ul>")[0]
    assert "</svg>first</li>" in legend and 's2"' in legend
    assert "adapter.rank" in page and "default-src 'none'" in page


def test_two_runs_of_one_name_are_told_apart_by_their_folders(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    twin = folders.one_point(tmp_path / "a", time.time()), folders.one_point(tmp_path / "b", time.time())
    assert main(["compare", *map(str, twin)]) == 0
    assert all(str(folder) in capsys.readouterr().out for folder in twin[:1])


def test_one_run_alone_and_one_that_is_not_there_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(runs / "first"), str(runs / "." / "first")]) == 2
    assert "Name two or more" in capsys.readouterr().err
    assert main(["compare", str(runs / "first"), str(runs / "secund")]) == 2
    assert "Did you mean 'second'?" in capsys.readouterr().err
