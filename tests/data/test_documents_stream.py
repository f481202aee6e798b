"""Documents as they are drawn: order, glances, ranks, restarts, and what is replayed beside each batch."""

import json
import random
from collections import Counter
from math import ceil

import pytest
import torch

from tests.data.documents import WORDS, YEARS, drawn, equal, opened, rows_of, section, surveyed, words_of, write_csv
from weft.errors import DataError

MEMORY = {"size": 20, "batch": 3}


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("notes") / "n.csv", rows_of(160))


def test_an_epoch_shows_every_document_of_its_year_once_in_another_order_each_time(notes):
    dataset = opened(section(notes))
    rows = rows_of(160)
    assert [each.name for each in dataset.stream] == list(YEARS) == list(dataset.survey.stretches)
    for experience in dataset.stream:
        size = experience.epoch_draws
        assert size == dataset.survey.stretches[experience.name] == ceil(len(experience.order.documents) / 4)
        batches = drawn(experience, 0, 2 * size)
        first, second = ([key for batch in part for key in batch.keys] for part in (batches[:size], batches[size:]))
        assert Counter(first) == Counter(second) and first != second and max(Counter(first).values()) == 1
        assert {rows[int(key.split(":")[1]) - 1]["year"] for key in first} == {experience.name}
        assert [batch["fresh"].all().item() for batch in batches] == [True] * size + [False] * size
    assert dataset.survey.epoch_draws(4) == sum(dataset.survey.stretches.values())


def test_a_batch_holds_what_its_rows_say(notes):
    rows = rows_of(160)
    for batch in drawn(opened(section(notes)).stream[1], 0, 5):
        own = [rows[int(key.split(":")[1]) - 1] for key in batch.keys]
        assert words_of(batch["ids"], batch["mask"]) == [row["note"] for row in own]
        assert [("no", "yes")[label] for label in batch["labels"]] == [row["outcome"] for row in own]
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["mask"].dtype == batch["fresh"].dtype == torch.bool
        assert batch["mask"].any(0).all()  # no longer than its longest row


@pytest.mark.parametrize("replay", [None, MEMORY, {**MEMORY, "balance": "label_task"}, {**MEMORY, "scope": "past"}],
                         ids=["alone", "all", "balanced", "past"])  # fmt: skip
def test_trap_21_ranks_draw_what_one_process_draws_and_so_does_a_restart(notes, replay):
    data = section(notes, replay=replay, glances=2)
    survey = surveyed(data)
    for number in (0, 2):
        whole = drawn(opened(data, survey).stream[number], 0, 30)
        for world in (2, 3):
            for rank in range(world):
                own = drawn(opened(data, survey).stream[number], 6, 8, rank, world)
                assert all(equal(one, other) for one, other in zip(own, whole[6 + rank :: world], strict=False))
        late = opened(data, survey).stream[number]
        assert late.position(17) == {}
        late.resume_at({})
        assert all(equal(one, other) for one, other in zip(drawn(late, 17, 13), whole[17:], strict=True))


def test_another_seed_is_another_order_and_the_same_files_none(notes):
    one, same, other = (opened(section(notes), seed=seed).stream[0] for seed in (1, 1, 2))
    assert all(equal(a, b) for a, b in zip(drawn(one, 0, 6), drawn(same, 0, 6), strict=True))
    assert [batch.keys for batch in drawn(one, 0, 6)] != [batch.keys for batch in drawn(other, 0, 6)]


def test_without_shuffling_the_order_is_that_of_the_files(notes):
    stream = opened(section(notes, shuffle=False)).stream
    rows = [int(key.split(":")[1]) for batch in drawn(stream[0], 0, stream[0].epoch_draws) for key in batch.keys]
    assert rows == sorted(rows)


def test_a_glance_shows_a_batch_again_with_another_draw_of_the_memory(notes):
    data = section(notes, glances=3, replay=MEMORY)
    experience = opened(data).stream[2]
    assert experience.epoch_draws == 3 * ceil(len(experience.order.documents) / 4)
    batches = drawn(experience, 0, 12)
    assert [batch.keys for batch in batches] == [batch.keys for batch in batches[::3] for _ in range(3)]
    assert [batch["fresh"].all().item() for batch in batches] == [True, False, False] * 4
    replayed = [words_of(batch["replay/ids"], batch["replay/mask"]) for batch in batches[:3]]
    assert replayed[0] != replayed[1] != replayed[2]


def test_joint_mode_is_one_experience_that_is_tested_on_every_task(notes):
    dataset = opened(section(notes, mode="joint"))
    assert [each.name for each in dataset.stream] == ["joint"]
    years = {key.split(":")[0] for batch in drawn(dataset.stream[0], 0, 6) for key in batch.keys}
    assert len(years) > 2
    sequential = opened(section(notes))
    assert set(dataset.tests) == set(sequential.tests) == set(YEARS)
    assert all(equal(a, b) for y in YEARS for a, b in zip(dataset.tests[y], sequential.tests[y], strict=True))


def test_tests_are_in_a_fixed_order_and_know_their_patients_by_number(notes):
    rows = rows_of(160)
    survey = surveyed(section(notes))
    one, other = opened(section(notes), survey, seed=1), opened(section(notes), survey, seed=2)
    for sets, again in ((one.tests, other.tests), (one.validations, other.validations)):
        assert all(equal(a, b) for task in sets for a, b in zip(sets[task], again[task], strict=True))
    patients = {}
    for batch in (batch for task in one.tests for batch in one.tests[task]):
        for key, group in zip(batch.keys, batch["group"].tolist(), strict=True):
            patients.setdefault(group, set()).add(rows[int(key.split(":")[1]) - 1]["patient"])
    assert patients and all(len(each) == 1 for each in patients.values())
    assert list(one.tests) == list(survey.tasks)
    assert len(one.validation()[0]) == sum(map(len, one.validations.values()))


# The memory.


def replayed_rows(batch) -> list[str]:
    return words_of(batch["replay/ids"], batch["replay/mask"]) if "replay/ids" in batch.tensors else []


def test_trap_13_the_memory_is_drawn_before_a_batch_enters_and_it_enters_once(notes):
    """With room for everything: what may be drawn beside a draw is exactly what was shown before it."""
    data = section(notes, replay={"size": 1000, "batch": 1000}, glances=2)
    shown: Counter[str] = Counter()
    for experience in opened(data).stream[:2]:
        for draw, batch in enumerate(drawn(experience, 0, 2 * experience.epoch_draws)):
            assert Counter(replayed_rows(batch)) == shown
            if draw < experience.epoch_draws and draw % 2 == 0:
                shown.update(words_of(batch["ids"], batch["mask"]))


def test_scope_past_replays_earlier_years_alone_and_none_in_the_first(notes):
    rows = {row["note"]: row["year"] for row in rows_of(160)}
    data = section(notes, replay={"size": 1000, "batch": 1000, "scope": "past"})
    for number, experience in enumerate(opened(data).stream):
        for batch in drawn(experience, 0, 3):
            assert {rows[text] for text in replayed_rows(batch)} == set(YEARS[:number])
            assert ("replay/ids" in batch.tensors) == (number > 0)


def test_replayed_rows_are_as_long_as_the_others_and_at_most_as_many_as_asked(notes):
    for batch in drawn(opened(section(notes, replay=MEMORY)).stream[0], 0, 8)[1:]:
        assert batch["replay/ids"].shape == batch["replay/mask"].shape == (3, batch["ids"].shape[1])
        assert batch["replay/labels"].shape == (3,) and len(batch.keys) == len(batch["ids"])
        whole = torch.cat([batch["mask"], batch["replay/mask"]])
        assert whole.any(0).all()
        assert len(set(replayed_rows(batch))) == 3


def test_trap_15_a_balanced_memory_replays_a_rare_label_as_often_as_the_other(tmp_path):
    rows = [{**row, "outcome": "yes" if i % 25 == 0 else "no"} for i, row in enumerate(rows_of(500, years=("2019",)))]
    path = write_csv(tmp_path / "n.csv", rows)
    for balance, least, most in (("none", 0, 0.2), ("label", 0.35, 0.65)):
        stream = opened(section(path, replay={"size": 20, "batch": 10, "balance": balance})).stream
        labels = torch.cat([batch["replay/labels"] for batch in drawn(stream[0], stream[0].epoch_draws, 60)])
        assert least <= labels.float().mean() <= most


def test_a_memory_holds_no_more_of_an_earlier_year_than_was_shown(notes):
    """Runs shorter than an epoch: per_step says how many draws an experience had."""
    data = section(notes, replay={"size": 1000, "batch": 1000})
    ends = {year: 2 * (1 + i) for i, year in enumerate(YEARS)}  # two steps each
    stream = opened(data, last_steps=ends, per_step=3).stream
    shown = [text for batch in drawn(stream[0], 0, 6) for text in words_of(batch["ids"], batch["mask"])]
    assert Counter(replayed_rows(drawn(stream[1], 0, 1)[0])) == Counter(shown)
    whole = opened(data, last_steps=ends).stream
    assert len(replayed_rows(drawn(whole[1], 0, 1)[0])) == len(whole[0].order.documents)


def test_a_hundred_thousand_documents_may_be_entered_in_the_middle(notes):
    """Replay of the order alone; tests/data/test_reservoir.py has its time."""
    stream = opened(section(notes, replay=MEMORY)).stream
    late = drawn(stream[3], 10**6, 1)[0]
    assert len(replayed_rows(late)) == 3 and not late["fresh"].any()


def test_trap_23_nothing_that_comes_later_changes_an_earlier_batch(tmp_path):
    """Rows of 2021 and 2022 say something else, have other labels and other texts, some of them those of earlier years;
    every batch and every test of 2019 and 2020 stays the same."""
    rows, chance = rows_of(240), random.Random(1)
    earlier = [row["note"] for row in rows if row["year"] < "2021"]
    spoilt = [
        row if row["year"] < "2021" else {**row, "note": chance.choice([*earlier, " ".join(WORDS[:50])]),
                                          "outcome": "yes"}
        for row in rows
    ]  # fmt: skip
    sound, other = (
        opened(section(write_csv(tmp_path / f"{name}.csv", each), replay={**MEMORY, "balance": "label_task"}))
        for name, each in (("a", rows), ("b", spoilt))
    )
    assert len(sound.survey.documents) > len(other.survey.documents)  # a text that leaks is left out later, not earlier
    for number in (0, 1):
        pairs = zip(drawn(sound.stream[number], 0, 60), drawn(other.stream[number], 0, 60), strict=True)
        assert all(equal(one, two) for one, two in pairs)
    for sets, others in ((sound.tests, other.tests), (sound.validations, other.validations)):
        for year in ("2019", "2020"):
            assert [b.keys for b in sets[year]] == [b.keys for b in others[year]]
            assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(sets[year], others[year], strict=True))


def test_trap_34_steps_of_a_year_are_as_many_as_its_documents(tmp_path):
    rows = rows_of(100, years=("2019",)) + rows_of(300, seed=3, years=("2020",))
    survey = surveyed(section(write_csv(tmp_path / "n.csv", rows)))
    sizes = {name: len(own) for name, own in survey.experiences.items()}
    assert survey.stretches == {name: ceil(size / 4) for name, size in sizes.items()}
    assert survey.steps_per_epoch(4, accumulate=2) == ceil(sum(survey.stretches.values()) / 2)


def test_the_digest_knows_texts_labels_and_splits(notes, tmp_path):
    digest = surveyed(section(notes)).digest()
    assert digest == surveyed(section(notes, replay=MEMORY)).digest()
    assert digest != surveyed(section(notes, split_seed=4)).digest()
    for column in ("note", "outcome", "year"):
        rows = rows_of(160)
        rows[5][column] = {"note": WORDS[3], "outcome": "yes" if rows[5]["outcome"] == "no" else "no",
                           "year": "2020" if rows[5]["year"] != "2020" else "2021"}[column]  # fmt: skip
        assert surveyed(section(write_csv(tmp_path / "n.csv", rows))).digest() != digest


def test_a_data_set_is_opened_only_when_it_is_usable_and_its_notices_are_told(tmp_path):
    rows = rows_of(60)
    rows[0]["note"] = ""
    data = section(write_csv(tmp_path / "n.csv", rows), labels=())
    with pytest.raises(DataError, match="1 of 60 rows"):
        opened(data)
    heard = []
    survey = surveyed(data)
    ends = dict.fromkeys(survey.stretches, 10)
    data.model_copy(update={"unreadable": 1}).open(survey, heard.append, seed=1, last_steps=ends)
    assert [event.text for event in heard] == list(survey.notices)
    assert json.dumps([event.record() for event in heard])
