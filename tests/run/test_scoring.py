"""The rows of the matrix: asked as a user would ask, kept whole and private, told once."""

import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_encoders import save_tiny_encoder
from weft import events
from weft.config.source import read_text
from weft.contracts import UNLEARNED, Batch
from weft.errors import RunError
from weft.run.assemble import assemble
from weft.run.config import parse_config
from weft.run.evaluate import copy_in
from weft.run.learner import Learner
from weft.run.listeners import EventLog
from weft.run.moving_average import MovingAverage
from weft.run.predictions import FOLDER, UNTRAINED, Row, is_scored, read_row, read_rows, write_row
from weft.run.score_table import SUMMARY, scored_run, table_lines
from weft.run.scoring import Scorer, told_rows

YEARS = ("2019", "2020", "2021")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"), words=40, attention_probs_dropout_prob=0.3)


@pytest.fixture
def learner(model: Path, tmp_path: Path) -> Learner:
    return learner_of(model, tmp_path)


def learner_of(model: Path, root: Path, labels: Sequence[str] = ("no", "yes"), several: bool = False) -> Learner:
    """An encoder whose every weight is trained, on a stream of two of the three years, ten steps each."""
    names = ", ".join(f"'{name}'" for name in labels)
    text = f"""
name: run
output: {root}
family: {{kind: encoder, source: {model}, labels: [{names}], multi_label: {several}, seed: 1}}
adapter: {{kind: none}}
objective: {{kind: traditional}}
optimizer: {{kind: adamw, lr: 1.0e-3}}
data: {{kind: documents, path: nowhere.csv, year: year}}
engine: {{device: cpu, precision: fp32}}
"""
    config = parse_config(read_text(text))
    learner = assemble(config, config.engine.open())
    learner.stream = [stretch(name, 10 * i) for i, name in enumerate(YEARS[:2], 1)]
    return learner


def stretch(name: str, last_step: int) -> Any:
    """What scoring knows of an experience."""
    return SimpleNamespace(name=name, last_step=last_step)


def batches(task: str, labels: Sequence[Any], seed: int, width: int = 2, group: bool = False) -> list[Batch]:
    """Documents of 6 tokens, the last two of them padding, in batches of so many."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (len(labels), 6), generator=chance)
    mask = torch.arange(6).expand(len(labels), 6) < 4
    more = {"group": torch.arange(len(labels)) // 2} if group else {}
    whole = {"ids": ids, "mask": mask, "labels": torch.tensor(labels), **more}
    return [
        Batch({name: t[i : i + width] for name, t in whole.items()},
              tuple(f"{task}:{n}" for n in range(i, min(i + width, len(labels)))))
        for i in range(0, len(labels), width)
    ]  # fmt: skip


TESTS = {
    "2019": batches("2019", [0, 1, 1, 0, 1], 1, group=True),
    "2020": batches("2020", [1, 1, 1, 1], 2, group=True),  # one class only
    "2021": batches("2021", [0, UNLEARNED, 1], 3, group=True),
}
HELD_OUT = {year: batches(year, [0, 1, 1], 10 + i) for i, year in enumerate(YEARS)}


class Heard(list[events.Event]):
    """Events as they come, of which those of scores are looked at."""

    def __call__(self, event: events.Event) -> None:
        self.append(event)

    @property
    def scored(self) -> dict[tuple[str, str], events.Scored]:
        return {(one.metric, one.after): one for one in self if isinstance(one, events.Scored)}


def scorer_of(run: Path, tell: Any, tests: Mapping[str, list[Batch]] = TESTS) -> Scorer:
    return Scorer(tests, HELD_OUT, run, tell)


def after(learner: Learner, year: str, run: Path, tell: Any = lambda event: None) -> Row:
    learner.step = next(each.last_step for each in learner.stream if each.name == year)
    row = scorer_of(run, tell).score(learner, year)
    assert row is not None
    return row


# ---- What is asked ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_document_is_answered_as_the_plain_model_answers_it_alone(learner: Learner, tmp_path: Path):
    row, network = after(learner, "2019", tmp_path), learner.model.network
    assert network.training, "the mode that it had"
    network.eval()
    for task, asked in TESTS.items():
        ids = torch.cat([batch["ids"] for batch in asked])[:, :4]  # without padding
        known = torch.cat([batch["labels"] for batch in asked]) != UNLEARNED
        plain = torch.stack([network(input_ids=one[None]).logits[0] for one in ids]).softmax(1)
        np.testing.assert_allclose(row.tests[task].probabilities, plain[known].double().numpy(), atol=1e-6)


def test_documents_without_a_label_are_left_out_with_their_keys(learner: Learner, tmp_path: Path):
    found = after(learner, "2019", tmp_path).tests["2021"]
    assert len(found) == 2
    assert [key.decode() for key in found.keys] == ["2021:0", "2021:2"]


def test_every_task_is_scored_and_a_year_of_one_class_has_no_auroc(learner: Learner, tmp_path: Path):
    heard = Heard()
    after(learner, "2019", tmp_path, heard)
    told = heard.scored
    assert {metric for metric, _ in told} == {"accuracy", "macro_f1", "auroc", "auprc", "f1", "ece", "brier"}
    assert all(tuple(one.scores) == YEARS and one.step == 10 for one in told.values())
    assert math.isnan(told["auroc", "2019"].scores["2020"])
    assert not math.isnan(told["auroc", "2019"].scores["2019"])


def test_of_several_labels_unknown_ones_are_masked(model: Path, tmp_path: Path):
    nan = float("nan")
    tests = {"2019": batches("2019", [[1.0, 0.0, nan], [0.0, 1.0, 1.0], [nan, nan, nan]], 4)}
    learner, heard = learner_of(model, tmp_path, ("a", "b", "c"), several=True), Heard()
    learner.step = 10
    row = Scorer(tests, {}, tmp_path, heard).score(learner, "2019")
    assert row is not None and row.tests["2019"].probabilities.shape == (2, 3)
    assert {metric for metric, _ in heard.scored} == {"micro_f1", "macro_f1", "macro_auroc", "macro_auprc", "ece"}


def test_trap_23_validation_documents_of_years_to_come_are_not_asked(learner: Learner, tmp_path: Path):
    assert tuple(after(learner, "2019", tmp_path).validations) == ("2019",)
    second = after(learner, "2020", tmp_path)
    assert tuple(second.validations) == ("2019", "2020")
    untrained = scorer_of(tmp_path / "other", Heard())
    learner.step = 0
    row = untrained.score(learner, UNTRAINED)
    assert row is not None and not row.validations and row.threshold is None and "f1" not in row.scores
    learner.stream, learner.step = [stretch("joint", 20)], 20
    joint = scorer_of(tmp_path / "joint", Heard()).score(learner, "joint")
    assert joint is not None and tuple(joint.validations) == YEARS


def test_the_moving_average_is_what_is_scored(learner: Learner, tmp_path: Path):
    plain = after(learner, "2019", tmp_path)
    kept = {name: p.detach().clone() for name, p in learner.parameters("default").items()}
    learner.ema["default"] = MovingAverage(0.9, 0)
    learner.ema["default"].tensors = kept
    copy_in(learner.parameters("default"), {name: torch.zeros_like(t) for name, t in kept.items()})
    averaged = after(learner, "2020", tmp_path)
    np.testing.assert_array_equal(averaged.tests["2019"].probabilities, plain.tests["2019"].probabilities)
    assert not any(p.any() for p in learner.parameters("default").values()), "the weights are back"


def test_ranks_that_share_the_batches_have_all_answers(learner: Learner, tmp_path: Path):
    alone = after(learner, "2019", tmp_path)
    said: list[torch.Tensor] = []

    class First:
        """Of two ranks the one whose sums are heard first."""

        data_world, data_rank = 2, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

        def total(self, value: torch.Tensor) -> torch.Tensor:
            said.append(value)
            return value

    class Second(First):
        data_rank = 1

        def total(self, value: torch.Tensor) -> torch.Tensor:
            return value + said.pop(0)

    own = learner.engine
    learner.engine = First()  # type: ignore[assignment]
    after(learner, "2019", tmp_path / "first")
    learner.engine = Second()  # type: ignore[assignment]
    both = after(learner, "2019", tmp_path / "second")
    assert not said, "both sum equally often"
    for task in TESTS:
        np.testing.assert_allclose(both.tests[task].probabilities, alone.tests[task].probabilities, atol=1e-6)
        np.testing.assert_array_equal(both.tests[task].labels, alone.tests[task].labels)


# ---- What is kept -------------------------------------------------------------------------------------------------


def test_a_row_is_read_as_it_was_written_and_is_for_its_owner_alone(learner: Learner, tmp_path: Path):
    row = after(learner, "2019", tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()
    assert path.name == "001-2019.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = read_row(path)
    assert (found.number, found.after, found.step) == (1, "2019", 10)
    assert found.scores == row.scores
    for task, answers in row.tests.items():
        for name in ("probabilities", "labels", "keys", "groups"):
            np.testing.assert_array_equal(getattr(found.tests[task], name), getattr(answers, name))
    assert found.validations["2019"].groups is None


def test_rows_beyond_the_one_that_is_written_are_of_an_earlier_life_and_go(learner: Learner, tmp_path: Path):
    first, second = after(learner, "2019", tmp_path), after(learner, "2020", tmp_path)
    assert [row.after for row in read_rows(tmp_path)] == ["2019", "2020"]
    write_row(tmp_path, second)
    assert len(read_rows(tmp_path)) == 2
    write_row(tmp_path, first)
    assert [row.after for row in read_rows(tmp_path)] == ["2019"]


def test_names_of_tasks_that_no_file_may_have_are_kept_inside(learner: Learner, tmp_path: Path):
    row = replace(after(learner, "2019", tmp_path), after="../up & away")
    path = write_row(tmp_path, row)
    assert path.parent == tmp_path / FOLDER
    assert read_row(path).after == "../up & away"


def test_a_damaged_file_is_named_and_a_run_without_scores_has_none(learner: Learner, tmp_path: Path):
    assert not is_scored(tmp_path) and scored_run(tmp_path) is None
    after(learner, "2019", tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"001-2019\.safetensors: these are no predictions"):
        read_rows(tmp_path)


# ---- What is told -------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_after_a_row_does_not_tell_it_twice(learner: Learner, tmp_path: Path):
    log = EventLog(tmp_path / "events.rank0.jsonl")
    after(learner, "2019", tmp_path, log)
    told = told_rows(tmp_path / "events.rank0.jsonl")
    lines = (tmp_path / "events.rank0.jsonl").read_text().count('"scored"')
    log(begun(10))
    scorer_of(tmp_path, log).score(learner, "2019")
    assert told_rows(tmp_path / "events.rank0.jsonl") == told
    assert (tmp_path / "events.rank0.jsonl").read_text().count('"scored"') == lines


def test_a_run_that_goes_on_from_before_a_row_tells_it_again_the_same(learner: Learner, tmp_path: Path):
    """Killed between scoring and saving: what was told is beyond the step of the checkpoint."""
    path = tmp_path / "events.rank0.jsonl"
    log = EventLog(path)
    after(learner, "2019", tmp_path, log)
    told, (file,) = told_rows(path), (tmp_path / FOLDER).iterdir()
    content = file.read_bytes()
    log(begun(5))
    assert told_rows(path) == {}
    after(learner, "2019", tmp_path, log)
    assert told_rows(path) == told
    assert file.read_bytes() == content


def test_the_untrained_row_of_another_config_in_the_same_folder_is_made_anew(learner: Learner, tmp_path: Path):
    log, learner.step = EventLog(tmp_path / "events.rank0.jsonl"), 0
    scorer_of(tmp_path, log).score(learner, UNTRAINED)
    log(begun(0))
    copy_in(learner.parameters("default"), {n: p * 1.5 for n, p in learner.parameters("default").items()})
    heard = Heard()
    scorer_of(tmp_path, heard).score(learner, UNTRAINED)
    assert ("brier", UNTRAINED) in heard.scored


def begun(step: int) -> events.RunStarted:
    return events.RunStarted(name="run", step=step, total_steps=20, resumed_from=None, trainable=1, device="cpu")


def test_no_event_and_no_file_holds_tokens_and_events_hold_no_keys(learner: Learner, tmp_path: Path):
    canary = 31
    tests = {"2019": batches("2019:SECRET", [0, 1], 1)}
    tests["2019"][0]["ids"][:] = canary
    log = EventLog(tmp_path / "events.rank0.jsonl")
    learner.step = 10
    scorer_of(tmp_path, log, tests).score(learner, "2019")
    assert "SECRET" not in (tmp_path / "events.rank0.jsonl").read_text()
    row = read_rows(tmp_path)[0]
    assert {"probabilities", "labels", "keys", "groups"} == set(vars(row.tests["2019"]))


# ---- At the end ---------------------------------------------------------------------------------------------------


def test_the_summary_has_every_number_with_its_formula(learner: Learner, tmp_path: Path):
    scorer, learner.step = scorer_of(tmp_path, Heard()), 0
    scorer.score(learner, UNTRAINED)
    for year in YEARS[:2]:
        after(learner, year, tmp_path)
    scorer.conclude(learner, micro_batches=3)
    told = json.loads((tmp_path / SUMMARY).read_text())
    assert told["gradient_evaluations"] == 20 * 3
    assert told["documents"] == {"2019": 5, "2020": 4, "2021": 2}
    accuracy, found = told["metrics"]["accuracy"], scored_run(tmp_path)
    assert found is not None and told["main"] == "accuracy"
    rows = read_rows(tmp_path)
    assert accuracy["matrix"] == [list(row.scores["accuracy"].values()) for row in rows[1:]]
    assert accuracy["untrained"] == list(rows[0].scores["accuracy"].values())
    (first, second), b = accuracy["matrix"], accuracy["untrained"]
    assert accuracy["average"] == pytest.approx((second[0] + second[1]) / 2)
    assert accuracy["bwt"] == pytest.approx(second[0] - first[0])
    assert accuracy["fwt"] == pytest.approx(first[1] - b[1])
    assert accuracy["next"] == pytest.approx((first[1] + second[2]) / 2)
    assert told["metrics"]["auroc"]["matrix"][0][1] is None
    assert set(told["formulas"]) >= {"average", "bwt", "bti", "forgetting", "fwt", "next", *told["metrics"]}


def test_the_table_has_a_line_for_each_row_and_the_numbers_below(learner: Learner, tmp_path: Path):
    scorer, learner.step = scorer_of(tmp_path, Heard()), 0
    scorer.score(learner, UNTRAINED)
    for year in YEARS[:2]:
        after(learner, year, tmp_path)
    found = scored_run(tmp_path)
    assert found is not None
    lines = table_lines(found)
    assert lines[1].split() == ["after", "learning", *YEARS, "mean", "learned"]
    assert [line.split()[0] for line in lines[2:5]] == [UNTRAINED, "2019", "2020"]
    assert len(lines[2].split()) == 4, "nothing was learned by then"
    assert lines[5].startswith("ACC ") and "BWT" in lines[5] and "next" in lines[5]
