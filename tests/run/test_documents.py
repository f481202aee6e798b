"""A stream of years through the one loop: whole runs of each learner, killed and resumed, and what a run refuses."""

import csv
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.small import config_of, merged
from tests.small_encoders import invented, save_tiny_encoder
from weft.cli.independent import refuse_contradictions
from weft.errors import ConfigError, RunError, WeftError
from weft.events import Evaluated, Event, Notice, Scored, StepEnded
from weft.run.documents import last_steps
from weft.run.plan import plan
from weft.run.start import train_run

YEARS = ("2019", "2020", "2021")
LEARNERS: dict[str, dict[str, Any]] = {
    "traditional": {},
    "replay": {"data": {"replay": {"size": 12, "batch": 4}}},
    "agem": {"data": {"replay": {"size": 12, "batch": 4}}},
    "cmaml": {"data": {"replay": {"size": 12, "batch": 4}}, "objective": {"inner_steps": 2}},
    "sync": {"data": {"replay": {"size": 12, "batch": 4}}, "objective": {"inner_steps": 2, "order": "first"}},
    "lamaml": {"data": {"replay": {"size": 12, "batch": 4}}, "objective": {"inner_steps": 2}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three years of documents whose first word tells the class, another word each year; and a bare BERT."""
    root, words, chance = tmp_path_factory.mktemp("documents"), invented(40), random.Random(0)
    save_tiny_encoder(root / "bert", words=words)
    with (root / "notes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "year", "patient"))
        for number in range(90):
            year, label = number % 3, chance.randrange(2)
            told = words[2 * year + label]
            filler = [chance.choice(words[10:]) for _ in range(chance.randrange(3, 9))]
            writer.writerow((" ".join([told, *filler]), ("low", "high")[label], YEARS[year], f"p{number // 3}"))
    return root


@pytest.fixture
def plain(world: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "notes", "output": str(tmp_path / "runs"), "seed": 3,
        "family": {"kind": "encoder", "source": str(world / "bert")},
        "adapter": {"kind": "none"},
        "objective": {"kind": "traditional"},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "data": {"kind": "documents", "path": str(world / "notes.csv"), "year": "year", "group": "patient",
                 "batch_size": 8, "test": 0.3},
        "engine": {"device": "cpu"},
        "schedule": {"epochs": 1},
        "save": {"every": 0}, "validation": {"every": 0},
    }  # fmt: skip


def run(plain: dict[str, Any], **change: Any) -> tuple[Any, list[Event]]:
    heard: list[Event] = []
    return train_run(config_of(merged(plain, change)), heard.append), heard


def of_kind(kind: str) -> dict[str, Any]:
    return merged({"objective": {"kind": kind}}, LEARNERS[kind])


def row(heard: list[Event], after: str, metric: str = "accuracy") -> dict[str, float]:
    (found,) = [e for e in heard if isinstance(e, Scored) and (e.after, e.metric) == (after, metric)]
    return dict(found.scores)


# ---- Whole runs ----


@pytest.mark.parametrize("kind", LEARNERS)
def test_each_learner_goes_through_the_years_and_is_scored_on_all_of_them_after_each(plain, kind):
    result, heard = run(plain, **of_kind(kind))
    steps = [event for event in heard if isinstance(event, StepEnded)]
    assert list(dict.fromkeys(event.experience for event in steps)) == list(YEARS) and result.finished
    scored = [event for event in heard if isinstance(event, Scored) and event.metric == "accuracy"]
    assert [event.after for event in scored] == ["(untrained)", *YEARS]
    assert all(tuple(event.scores) == YEARS for event in scored)
    assert sorted(path.name for path in (result.folder / "predictions").iterdir())[0].startswith("0")
    assert json.loads((result.folder / "summary.json").read_text())


def test_a_stream_that_is_learned_well_is_told_so(plain):
    _, heard = run(plain, schedule={"epochs": 12}, **of_kind("replay"))
    last = row(heard, "2021")
    assert sum(last.values()) / 3 > 0.8 > 0.7 > sum(row(heard, "(untrained)").values()) / 3


def test_all_years_at_once_are_one_experience(plain):
    _, heard = run(plain, data={"mode": "joint"})
    assert {e.experience for e in heard if isinstance(e, StepEnded)} == {"joint"}
    assert [e.after for e in heard if isinstance(e, Scored) and e.metric == "accuracy"] == ["(untrained)", "joint"]


def test_validation_measures_the_years_so_far_and_has_no_base_to_compare_with(plain):
    _, heard = run(plain, validation={"every": 1}, data={"validation": 0.3, "test": 0.2})
    events = [event for event in heard if isinstance(event, Evaluated)]
    items = [event.items for event in events]
    assert items == sorted(items) and len(set(items)) == 3 and all(event.baseline is None for event in events)


# ---- Killed and resumed ----


def assert_alike(one: Path, other: Path) -> None:
    """The same weights, checkpoints' numbers, predictions and rows, to the bit."""
    for name in (
        "adapter/model.safetensors",
        *(f"predictions/{path.name}" for path in (one / "predictions").iterdir()),
    ):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    told = [rows_of(folder) for folder in (one, other)]
    assert told[0] == told[1]


def rows_of(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "events.rank0.jsonl").read_text().splitlines()]
    return [(e["after"], e["metric"], e["step"], e["scores"]) for e in lines if e["event"] == "scored"]


@pytest.mark.parametrize("kind", ["replay", "lamaml"])
@pytest.mark.parametrize("step", [4, 9])
def test_a_run_that_was_stopped_goes_on_to_the_bit(plain, kind, step):
    """Step 9 is the last one of the second year's first half, 4 the last one of the first year or beside it."""
    change = merged(of_kind(kind), {"schedule": {"epochs": 2}, "data": {"glances": 2 if kind == "replay" else 1}})
    whole, _ = run(plain, name="whole", **change)
    done = iter([False] * step + [True])
    train_run(config_of(merged(plain, {**change, "name": "parts"})), lambda event: None, lambda: next(done))
    parts, _ = run(plain, name="parts", **change)
    assert_alike(whole.folder, parts.folder)


def test_a_kill_between_a_year_s_last_checkpoint_and_its_scores_loses_neither(plain):
    """The checkpoint of that step is whole already, and the next year's first draw is its own first."""
    change = merged(of_kind("replay"), {"schedule": {"epochs": 2}, "save": {"every": 1, "background": False}})
    whole, heard = run(plain, name="whole", **change)
    last = max(event.step for event in heard if isinstance(event, StepEnded) and event.experience == "2019")

    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, Scored) and event.after == "2019":
            raise Killed

    with pytest.raises(Killed):
        train_run(config_of(merged(plain, {**change, "name": "parts"})), kill)
    folder = Path(plain["output"]) / "parts"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == f"global_step_{last}"
    parts, _ = run(plain, name="parts", **change)
    assert_alike(whole.folder, parts.folder)


def test_a_run_goes_on_from_what_another_has_trained_with_its_head_and_its_order_of_classes(plain, world):
    """Traditional fine-tuning first, La-MAML from what it has exported (row E5)."""
    first, heard = run(plain, name="first", data={"labels": ["low", "high"]})
    change = merged(of_kind("lamaml"), {"family": {"source": str(first.adapter)}})
    _, then = run(plain, name="then", **change)
    assert row(then, "(untrained)") == row(heard, "2021") and row(then, "(untrained)", "brier") == row(
        heard, "2021", "brier"
    )


def test_optimizers_begin_anew_with_each_year_where_they_are_told_to_also_in_a_run_that_resumes_there(plain):
    """Trap 20: the moments of one year are a choice in the next."""
    change = merged(of_kind("sync"), {"schedule": {"epochs": 2, "reset_optimizer": True}})
    kept, _ = run(plain, name="kept", **merged(of_kind("sync"), {"schedule": {"epochs": 2}}))
    whole, heard = run(plain, name="whole", **change)
    notices = [event.text for event in heard if isinstance(event, Notice)]
    assert [text for text in notices if "begin anew" in text] == [
        f"{year}: the optimizers begin anew" for year in YEARS[1:]
    ]
    first = max(event.step for event in heard if isinstance(event, StepEnded) and event.experience == "2019")
    done = iter([False] * first + [True])
    train_run(config_of(merged(plain, {**change, "name": "parts"})), lambda event: None, lambda: next(done))
    parts, _ = run(plain, name="parts", **change)
    assert_alike(whole.folder, parts.folder)
    weights = [load_file(each.adapter / "model.safetensors") for each in (whole, kept)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_document_may_have_several_labels(plain, world):
    """Columns of 0 and 1; one of them nobody has filled in for the first year."""
    with (world / "notes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    path = Path(plain["output"]).parent / "several.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "a", "b"])
        writer.writeheader()
        for row in rows:
            late = "" if row["year"] == "2019" else str(int("ba" in row["text"]))
            writer.writerow({**row, "a": int(row["label"] == "high"), "b": late})
    _, heard = run(plain, data={"path": str(path), "label": ["a", "b"]})
    metrics = {event.metric for event in heard if isinstance(event, Scored)}
    assert {"micro_f1", "macro_f1", "macro_auroc", "ece"} <= metrics and "accuracy" not in metrics
    assert all(math.isfinite(e.metrics["train/loss"]) for e in heard if isinstance(e, StepEnded))


# ---- Numbers that follow from others ----


def config(plain: dict[str, Any], **schedule: Any) -> Any:
    return config_of({**plain, "schedule": schedule})


def test_epochs_are_passes_over_each_year(plain):
    assert last_steps(config(plain, epochs=2), {"a": 5, "b": 3}, 2) == {"a": 5, "b": 8}


def test_steps_are_divided_as_the_years_have_data_and_each_has_one(plain):
    assert last_steps(config(plain, steps=10), {"a": 6, "b": 4}, 1) == {"a": 6, "b": 10}
    assert last_steps(config(plain, steps=4), {"a": 1, "b": 100, "c": 1}, 1) == {"a": 1, "b": 3, "c": 4}
    assert last_steps(config(plain, steps=3), {"a": 100, "b": 1, "c": 1}, 1) == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(ConfigError, match="fewer than the 3 experiences"):
        last_steps(config(plain, steps=2), {"a": 1, "b": 1, "c": 1}, 1)


@pytest.mark.parametrize("kind", ["traditional", "replay", "lamaml"])
def test_a_plan_knows_steps_classes_and_memory(plain, kind):
    made = plan(config_of(merged(plain, of_kind(kind))))
    assert made.problems == () and made.steps == 9 and made.survey.labels == ("high", "low")
    (memory,) = made.memory.values()
    assert memory.activations > 0 and memory.adapter >= 4 * 4 * made.parameters.trainable


def test_a_step_that_was_not_finite_is_told_by_rows_and_keeps_no_document(plain):
    """A batch of token ids, with the tokenizer beside it, is the text."""
    with pytest.raises(RunError, match="a gradient that is not finite"):
        run(plain, optimizer={"lr": 1e37}, schedule={"epochs": 4, "incidents": 2})
    kept = [path for path in (Path(plain["output"]) / "notes" / "incidents").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["incident.rank0.json"] * 2
    for path in kept:
        (keys,) = json.loads(path.read_text())["keys"]
        assert len(keys) > 0 and all(re.fullmatch(r"20\d\d:\d+", key) for key in keys)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"kind": "lamaml"}}, "data.replay"),
        ({"samples": {"prompts": ["x"]}}, "samples.prompts"),
        ({"objective": {"kind": "next-token"}}, "objective.kind"),
        (merged(of_kind("lamaml"), {"engine": {"recompute": True}}), "engine.recompute: a block that runs again"),
        ({"family": {"dtype": "bf16"}, "engine": {"precision": "bf16"}}, "family.dtype: all weights are trained"),
        ({"engine": {"stream_blocks": 1}}, "engine.stream_blocks: frozen weights wait"),
        ({"engine": {"kind": "deepspeed", "zero": 3}}, "engine.zero: ZeRO-3 parts frozen weights"),
        ({"data": {"year": "yaer"}}, "none of its 4 columns is called 'yaer'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_weight_is_read(plain, change, said):
    with pytest.raises((WeftError, ValueError), match=said):
        run(plain, **change)
    assert not (Path(plain["output"]) / "notes" / "checkpoints").exists()


def test_years_are_not_parted_between_independent_runs(plain):
    with pytest.raises(ConfigError, match=r"documents are learned year by year.*weft train --seeds"):
        refuse_contradictions(config_of(plain))
