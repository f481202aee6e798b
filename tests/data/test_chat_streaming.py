"""Streamed text: the same rows whoever reads them, and after a resume at any draw, without reading from the start."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.chats import Spoken, says, talk
from tests.data.test_chat import drawn, equal, write
from weft.contracts import Batch
from weft.data import tapes
from weft.data.chat import ChatData
from weft.data.chat_loader import ChatDataset
from weft.data.chat_survey import ChatSurvey
from weft.errors import DataError
from weft.events import Event, Notice

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty conversations in four forms: three .jsonl files, two .parquet files, a saved dataset, one to be loaded."""
    root = tmp_path_factory.mktemp("streams")
    said = [talk(1 + i % 3, seed=i) for i in range(ROWS)]
    for part in range(3):
        write(root / "jsonl" / f"{part}.jsonl", said[part::3])
    rows = [{"messages": each} for each in said]
    (root / "parquet").mkdir()
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows[part::2])
        pyarrow.parquet.write_table(table, root / "parquet" / f"{part}.parquet", row_group_size=7)
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "saved"))
    write(root / "hub" / "data" / "train-00000-of-00002.jsonl", said[:25])
    write(root / "hub" / "data" / "train-00001-of-00002.jsonl", said[25:])
    return root


SOURCES = ["jsonl", "parquet", "saved", "hub"]


def source_of(folder: Path, name: str) -> dict[str, Any]:
    place = {"path": folder / name} if name in ("jsonl", "parquet") else {"dataset": str(folder / name)}
    return {**place, "streaming": True}


def data_of(sources: list[dict[str, Any]], **fields: Any) -> ChatData:
    plain = {"sources": sources, "length": 256, "batch_size": 2, "shuffle_buffer": 16, "cache": "memory"}
    return ChatData.model_validate({**plain, **fields})


def opened(sources: list[dict[str, Any]], heard: list[Event] | None = None, **fields: Any) -> ChatDataset:
    data = data_of(sources, **fields)
    return reopened(data, data.survey(Spoken()), heard)


def reopened(data: ChatData, survey: ChatSurvey, heard: list[Event] | None = None) -> ChatDataset:
    """A dataset that has drawn nothing."""
    return data.open(survey, (heard if heard is not None else []).append, seed=3, last_step=100)


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def resumed(dataset: ChatDataset, fresh: ChatDataset, draw: int) -> ChatDataset:
    """A dataset of another process at the draw where the first one stands."""
    fresh.train.resume_at(json.loads(json.dumps(dataset.train.position(draw))))
    return fresh


@pytest.mark.parametrize("name", SOURCES)
def test_after_a_resume_at_any_draw_of_several_epochs_the_rows_are_the_same(folder, name):
    data = data_of([source_of(folder, name)])
    survey = data.survey(Spoken())
    whole = drawn(reopened(data, survey), 0, 60)
    assert min(Counter(keys_of(whole)).values()) >= 3  # epochs
    dataset = reopened(data, survey)
    stream = dataset.train.batches(0, 0, 1)
    for draw in range(56):
        if draw % (2 if name == "jsonl" else 9) == 0:
            again = resumed(dataset, reopened(data, survey), draw)
            assert all(map(equal, whole[draw : draw + 3], drawn(again, draw, 3)))
        next(stream)


@pytest.mark.parametrize("name", SOURCES)
def test_each_epoch_of_a_stream_shows_every_conversation_once(folder, name):
    for pack in (True, False):
        shown = keys_of(drawn(opened([source_of(folder, name)], pack=pack), 0, 70))
        assert len(set(shown)) == ROWS and set(Counter(shown[: 2 * ROWS]).values()) == {2}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_a_stream_draw_what_one_process_draws_also_after_a_resume_on_fewer(folder, world):
    sources = [source_of(folder, "jsonl")]
    whole = drawn(opened(sources), 0, 48)
    for rank in range(world):
        assert all(map(equal, whole[rank:36:world], drawn(opened(sources), 0, 36 // world, rank, world)))
    first = opened(sources)
    drawn(first, 0, 36 // world, 0, world)
    assert all(map(equal, whole[36:], drawn(resumed(first, opened(sources), 36), 36, 12)))


def test_what_was_read_before_the_present_stretch_is_not_read_again(folder, monkeypatch):
    sources = [source_of(folder, "jsonl")]
    dataset = opened(sources)
    whole = drawn(dataset, 0, 40)
    position = dataset.train.position(36)
    assert position["draw"] > 20 and "answer" not in json.dumps(position)
    read: list[str] = []
    row = tapes.JsonLines._row

    def counted(self: tapes.JsonLines, content: bytes) -> tapes.Row:
        read.append(self._name)
        return row(self, content)

    fresh = opened(sources)
    monkeypatch.setattr(tapes.JsonLines, "_row", counted)
    fresh.train.resume_at(position)
    assert equal(next(fresh.train.batches(36, 0, 1)), whole[36])
    # Its own stretch, and those of the three batches that are made ahead.
    assert 16 <= len(read) <= 16 * 4 < len(keys_of(whole[:36]))


def test_epochs_differ_in_the_order_of_files_and_rows(folder):
    shown = keys_of(drawn(opened([source_of(folder, "jsonl")]), 0, 80))
    assert shown[:ROWS] != shown[ROWS : 2 * ROWS]
    first_file = [key.rpartition(":")[0] for key in (shown[0], shown[ROWS], shown[2 * ROWS])]
    in_order = keys_of(drawn(opened([source_of(folder, "jsonl")], shuffle=False, pack=False), 0, 60))
    assert in_order[:20] == [f"jsonl/0.jsonl:{n}" for n in range(1, 21)] and len(first_file) == 3


def test_sources_are_mixed_by_their_weights(folder, tmp_path):
    other = write(tmp_path / "other.jsonl", [talk(1, seed=i) for i in range(10)])
    sources = [{**source_of(folder, "jsonl"), "repeats": 3}, {"path": other, "streaming": True}]
    shown = keys_of(drawn(opened(sources, pack=False), 0, 300))
    share = sum(key.startswith("jsonl/") for key in shown) / len(shown)
    assert abs(share - 0.75) < 3 * (0.75 * 0.25 / 600) ** 0.5
    dataset = opened(sources)
    whole = drawn(dataset, 0, 30)
    assert all(map(equal, whole[20:], drawn(resumed(dataset, opened(sources), 20), 20, 10)))


def test_take_ends_the_epoch_early(folder):
    for name in SOURCES:
        shown = keys_of(drawn(opened([{**source_of(folder, name), "take": 10}], pack=False, shuffle=False), 0, 10))
        assert set(Counter(shown).values()) == {2} and len(set(shown)) == 10


def test_what_a_stream_loses_is_told_and_counted_over_a_resume(tmp_path):
    path = write(tmp_path / "a.jsonl", [talk(1), [says("user", "a"), says("assistant", "x" * 300)], [says("usr", "b")]])
    heard: list[Event] = []
    dataset = opened([{"path": path, "streaming": True}], heard, unreadable=4)
    drawn(dataset, 0, 1)
    told = [event.text for event in heard if isinstance(event, Notice)]
    assert told[0] == "data: left out of a stretch of the stream: 1 unreadable, 1 too long."
    fresh = opened([{"path": path, "streaming": True}], unreadable=4)
    fresh.train.resume_at({**dataset.train.position(1), "counts": {"unreadable": 4}})
    with pytest.raises(DataError, match=r"a\.jsonl, line 3"):
        drawn(fresh, 1, 3)


def test_a_stream_that_gives_nothing_stops_and_does_not_search_for_ever(tmp_path):
    path = write(tmp_path / "a.jsonl", [talk(1), *([[says("user", "a"), says("assistant", "x" * 300)]] * 40)])
    dataset = opened([{"path": path, "streaming": True}], shuffle=False)
    with pytest.raises(DataError, match=r"16 rows of the streams none can be trained on: .* too long"):
        drawn(dataset, 0, 9)


def test_a_dataset_is_tokenised_whole_where_it_does_not_stream(folder):
    for name in ("saved", "hub"):
        data = {"sources": [{"dataset": str(folder / name)}], "length": 256, "cache_folder": folder / "cache"}
        survey = ChatData.model_validate(data).survey(Spoken())
        assert len(survey.train) == ROWS
    with pytest.raises(DataError, match=r"cannot be opened"):
        ChatData.model_validate({"sources": [{"dataset": str(folder / "none")}]}).survey(Spoken())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl", "streaming": True}]}, "some sources stream"),
        ({"sources": [{"path": "b.jsonl", "streaming": True}], "validation_items": 3}, "name validation_sources"),
        ({"sources": [{"path": "b.jsonl", "streaming": True}], "share": [0, 2]}, "cannot be chosen before"),
        ({"sources": [{"path": "a.jsonl"}], "validation_sources": [{"path": "b.jsonl", "streaming": True}]}, "'take'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_when_the_config_is_read(fields, told):
    with pytest.raises(ValueError, match=told):
        ChatData.model_validate(fields)


def test_a_survey_of_a_stream_looks_into_its_first_rows_alone(folder):
    survey = opened([source_of(folder, "jsonl")], validation_sources=[{**source_of(folder, "hub"), "take": 7}]).survey
    assert survey.lines()[0].startswith("The first rows of each stream hold 60 conversations")
    assert survey.epoch_draws(2) is None and len(survey.validation) == 7
    assert list(islice(survey.notices, 1)) == [
        "7 conversations of data.validation_sources are trained on as well, so their loss says nothing about new ones."
    ]


def test_a_stream_with_another_file_is_another_stream(folder, tmp_path):
    for part in range(2):
        (tmp_path / f"{part}.jsonl").write_bytes((folder / "jsonl" / f"{part}.jsonl").read_bytes())
    source = [{"path": tmp_path, "streaming": True, "take": 5}]
    before = opened(source, shuffle=False).survey.digest()
    assert opened(source, shuffle=False).survey.digest() == before
    (tmp_path / "2.jsonl").write_bytes((folder / "jsonl" / "2.jsonl").read_bytes())
    assert opened(source, shuffle=False).survey.digest() != before
