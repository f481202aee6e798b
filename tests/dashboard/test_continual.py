"""Continual runs on pages: the matrix of each metric, its numbers, and experiments over several seeds."""

import re
import time
from pathlib import Path

import pytest

from tests.dashboard import folders
from tests.dashboard.streams import YEARS, N, answered, scored_stream
from weft.dashboard.comparison import Side
from weft.dashboard.configs import identity
from weft.dashboard.continual import Experiment, experiments_of, representatives
from weft.dashboard.continual_charts import bins_of, places
from weft.dashboard.health import matrix
from weft.dashboard.report import write_report
from weft.dashboard.store import Store
from weft.math.intervals import t_interval
from weft.run.predictions import UNTRAINED

UNTAUGHT = (10, 10, 10)
BETTER = {0: [UNTAUGHT, (18, 12, 10), (16, 18, 12)], 1: [UNTAUGHT, (18, 12, 10), (17, 19, 12)],
          2: [UNTAUGHT, (18, 12, 10), (17, 18, 12)]}  # fmt: skip
WORSE = {0: [UNTAUGHT, (18, 12, 10), (13, 18, 12)], 1: [UNTAUGHT, (18, 12, 10), (12, 18, 12)],
         2: [UNTAUGHT, (18, 12, 10), (14, 18, 12)]}  # fmt: skip


def sides(root: Path) -> list[Side]:
    """Every run in a folder, by name."""
    store = Store(root)
    return [Side(store, store.run(id), store.config(id)["resolved"]) for id in sorted(store.ids())]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments of three seeds each."""
    root = tmp_path_factory.mktemp("experiments")
    for seed in range(3):
        scored_stream(root / f"er-seed{seed}", BETTER[seed], seed, cost=120, data={"replay": {"size": 9, "batch": 4}})
        scored_stream(root / f"plain-seed{seed}", WORSE[seed], seed)
    return root


@pytest.fixture(scope="module")
def experiments(root: Path) -> list[Experiment]:
    return experiments_of(sides(root))


# ---- Events as the dashboard draws them ---------------------------------------------------------------------------


def test_each_metric_has_its_matrix_and_the_untrained_row_stands_apart(tmp_path: Path):
    scores = Store(folders.continual(tmp_path, time.time())).scores("continual")
    assert list(scores["metrics"]) == ["accuracy", "ece"] and scores["metric"] == "accuracy"
    for one in scores["metrics"].values():
        assert [row["after"] for row in one["rows"]] == scores["experiences"]
        assert [row["learned"] for row in one["rows"]] == [1, 2, 3, 4]
        assert (one["untrained"]["after"], one["untrained"]["learned"]) == (UNTRAINED, 0)
    assert scores["rows"] == scores["metrics"]["accuracy"]["rows"]
    assert scores["metrics"]["ece"]["rows"][0]["values"][0] == pytest.approx(0.05)


def test_joint_training_has_learned_every_column():
    row = {"after": "joint", "metric": "accuracy", "step": 9, "scores": {"2019": 0.5, "2020": 0.6}}
    found = matrix([row])
    assert found["experiences"] == ["2019", "2020"]
    assert found["rows"][0]["learned"] == 2


def test_a_run_that_went_on_from_before_a_row_has_it_no_more(tmp_path: Path):
    folder = scored_stream(tmp_path / "run", BETTER[0])
    with (folder / "events.rank0.jsonl").open("a") as log:
        log.write('{"time": 9e9, "event": "run_started", "step": 15}\n')
    scores = Store(folder).scores("run")
    assert [row["after"] for row in scores["rows"]] == ["2019"]
    assert scores["untrained"] is not None


def test_a_run_on_documents_is_known_as_such():
    assert identity({"family": {"kind": "encoder"}, "objective": {"kind": "replay"}})["medium"] == "documents"


# ---- One run's report ---------------------------------------------------------------------------------------------


def test_a_report_has_every_metric_its_numbers_and_its_formulas(root: Path):
    page = write_report(Store(root), "er-seed0")
    table = page.partition("accuracy on each experience")[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)[1:]
    assert [row.count('class="past"') for row in rows] == [0, 1, 2]
    assert rows[0].startswith(f'<th scope="row">{UNTRAINED}')
    numbers = page.partition("What was kept and foreseen")[2].partition("</table>")[0]
    accuracy = re.findall(r"<td>(.*?)</td>", numbers.partition('"row">accuracy')[2].partition("</tr>")[0])
    assert accuracy[:3] == ["0.8500", "-0.1000", "-0.0500"]  # (16 + 18)/40, (16 - 18)/20, half of it
    assert "auroc on each experience" in page and "Eval-Fix" in page and "P(positive)" in page
    assert "Lopez-Paz" in page and "Chaudhry" in page
    assert 'class="heat scores"' in page and "Reliability at the end" in page and "Training data" not in page
    assert "documents of one group are drawn together" in page


def test_a_report_tells_no_key_of_a_document(root: Path, tmp_path: Path):
    assert "secret" not in write_report(Store(root), "er-seed0")


# ---- Experiments --------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_experiment(root: Path, experiments: list[Experiment]):
    assert [one.name for one in experiments] == ["er", "plain"]
    assert [[run.seed for run in one.runs] for one in experiments] == [[0, 1, 2], [0, 1, 2]]
    shown = representatives(sides(root), experiments_of(every := sides(root)))
    assert len(shown) == 6, "sides of others are not these"
    assert [side.name for side in representatives(every, experiments_of(every))] == ["er-seed0", "plain-seed0"]


def test_a_path_that_has_the_seed_in_its_name_is_the_same_path(tmp_path: Path):
    """A run that begins with what a run of the same seed has left."""
    for seed in range(2):
        source = {"kind": "encoder", "source": f"runs/first-seed{seed}/adapter", "seed": seed}
        scored_stream(tmp_path / f"second-seed{seed}", BETTER[seed], seed, family=source)
    assert [len(one.runs) for one in experiments_of(sides(tmp_path))] == [2]


def test_the_same_seed_twice_is_no_further_evidence(tmp_path: Path):
    for name in ("run-a", "run-b"):
        scored_stream(tmp_path / name, BETTER[0])
    assert [one.name for one in experiments_of(sides(tmp_path))] == ["run-a", "run-b"]


def test_means_intervals_and_paired_differences_are_over_seeds(experiments: list[Experiment]):
    er, plain = experiments
    finals = [(16 + 18) / 40, (17 + 19) / 40, (17 + 18) / 40]
    found, by_hand = er.interval("ACC", "accuracy"), t_interval(finals)
    assert found is not None and by_hand is not None
    assert (found.mean, found.half, found.n) == pytest.approx((by_hand.mean, by_hand.half, 3))
    kept = er.interval("BWT", "accuracy")
    assert kept is not None and kept.mean == pytest.approx(((16 - 18) + (17 - 18) + (17 - 18)) / 20 / 3)
    paired = er.against(plain, "ACC", "accuracy")
    assert paired is not None and paired.difference.n == 3
    assert paired.difference.mean == pytest.approx(((16 - 13) + (17 + 19 - 12 - 18) + (17 - 14)) / 40 / 3)
    assert paired.flips == 2 / 2**3


def test_bins_of_the_reliability_plot_hold_every_test_document_of_what_was_learned(experiments: list[Experiment]):
    scored = [run.scored for run in experiments[0].runs]
    assert sum(one.count for one in bins_of(scored)) == 3 * 2 * N  # seeds, years learned, documents


def test_years_stand_at_their_numbers_and_other_tasks_in_a_row():
    assert places(YEARS) == [2019, 2020, 2021]
    assert places(("a", "b")) == [1, 2]


def test_fixtures_are_right_as_often_as_they_say():
    answers = answered(13)
    assert (answers.probabilities.argmax(1) == answers.labels).sum() == 13
