"""`weft compare` of continual runs: experiments over seeds, with a paired test and what they cost."""

from pathlib import Path

import pytest

from tests.dashboard.streams import scored_stream
from tests.dashboard.test_continual import BETTER, WORSE
from weft.cli.main import main


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiments")
    for seed in range(3):
        scored_stream(root / "plain" / f"seed{seed}", WORSE[seed], seed)
        scored_stream(root / f"er-seed{seed}", BETTER[seed], seed, cost=120, data={"replay": {"size": 9, "batch": 4}})
    return root


def cells(text: str, row: str, after: str = "") -> list[str]:
    """The cells of the first line that begins so, below another one."""
    lines = text.partition(after)[2].splitlines() if after else text.splitlines()
    line = next(line for line in lines if line.startswith(row))
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


def test_folders_of_runs_and_patterns_name_experiments(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(root / "plain"), str(root / "er-*")]) == 0
    out = capsys.readouterr().out
    assert cells(out, "Experiments") == ["Experiments", "plain", "er"]
    assert cells(out, "seeds") == ["seeds", "3 (0, 1, 2)", "3 (0, 1, 2)"]
    assert cells(out, "ACC")[2] == "0.875 ± 0.062"  # 0.85, 0.9, 0.875: 4.303 x 0.025 / sqrt 3
    assert cells(out, "gradient evaluations") == ["gradient evaluations", "60", "120"]
    assert "95 % interval" in out


def test_trap_35_a_difference_stands_beside_its_interval_its_p_and_its_cost(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", str(root / "plain"), str(root / "er-*")]) == 0
    out = capsys.readouterr().out
    (told,) = cells(out, "ACC", after="Less plain")[1:]
    assert told.startswith("+0.100 ± ") and "(p " in told and "0.250 by sign flips; 3 pairs)" in told
    assert cells(out, "gradient evaluations", after="Less plain")[1] == "× 2.00"


def test_what_is_told_of_single_runs_is_told_of_the_first_seed(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(root / "plain"), str(root / "er-*")]) == 0
    out = capsys.readouterr().out
    assert cells(out, "Last numbers") == ["Last numbers", "seed0", "er-seed0"]
    assert cells(out, "data.replay.size") == ["data.replay.size", "–", "9"]


def test_trap_26_one_seed_is_called_so_and_has_no_interval(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(root / "plain" / "seed0"), str(root / "er-seed0")]) == 0
    out = capsys.readouterr().out
    assert cells(out, "seeds")[1] == "one (0): no interval"
    assert "±" not in " ".join(cells(out, "ACC"))
    assert cells(out, "ACC", after="Less seed0")[1].endswith("(one pair)")
    assert "One seed each." in out


def test_another_metric_is_compared_when_it_is_asked_for(root: Path, capsys: pytest.CaptureFixture[str]):
    runs = [str(root / "plain"), str(root / "er-*")]
    assert main(["compare", *runs, "--metric", "auroc"]) == 0
    assert "of auroc." in capsys.readouterr().out
    assert main(["compare", *runs, "--metric", "aurc"]) == 2
    assert "Did you mean 'auroc'?" in capsys.readouterr().err


def test_one_experiment_alone_has_its_means_and_nothing_beside_it(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(root / "plain")]) == 0
    out = capsys.readouterr().out
    assert cells(out, "Experiments") == ["Experiments", "plain"] and "Less" not in out


def test_a_page_has_the_table_and_the_figures(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "all.html"
    assert main(["compare", str(root / "plain"), str(root / "er-*"), "--html", str(out)]) == 0
    page = out.read_text("utf-8")
    assert page.count('class="heat scores"') == 2, "a matrix of each experiment"
    assert "<h1>plain and er</h1>" in page
    for words in ("accuracy on each task at the end", "Reliability at the end", "Difference to plain", "sign flips"):
        assert words in page
    assert 'class="band s1"' in page and "default-src 'none'" in page


def test_a_pattern_that_fits_nothing_is_refused(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(root / "nothing-*"), str(root / "plain")]) == 2
    assert "there is no run here" in capsys.readouterr().err
