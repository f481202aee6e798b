"""Rows of files become conversations, whatever their columns; what cannot be read is told with its file and line."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.chats import says
from weft.data.chat import TextSource
from weft.data.conversations import Conversation, Reader, Unfit
from weft.data.tapes import Row
from weft.errors import DataError

ASKED = [says("user", "2+2?"), says("assistant", "4")]


def read(row: Any, **reader: Any) -> Conversation:
    return Reader(**reader).conversation(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"messages": json.dumps(ASKED)},
        {"messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"]}},
        {"messages": [{**message, "name": None} for message in ASKED]},
        {"messages": [says("user", [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]), ASKED[1]]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": ASKED},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4", "text": "a rendered copy that is not used"},
    ],
)
def test_every_format_gives_the_same_conversation(row):
    assert [dict(message) for message in read(row).messages] == ASKED


def test_alpaca_puts_the_input_behind_the_instruction_and_the_history_before_it():
    row = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be short.", "history": [["hi", "hello"]]}
    assert [(message["role"], message["content"]) for message in read(row).messages] == [
        ("system", "Be short."), ("user", "hi"), ("assistant", "hello"), ("user", "Add\n\n2 2"), ("assistant", "4"),
    ]  # fmt: skip


def test_columns_of_other_names_are_found_where_they_are_told():
    assert read({"chat": ASKED}, columns={"messages": "chat"}).messages == read({"messages": ASKED}).messages
    assert read({"body": "a text", "messages": ASKED}, form="text", columns={"text": "body"}).text == "a text"


def test_tool_calls_and_tools_that_come_as_json_become_objects():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": '[{"n": 1}]'}
    said = read(row)
    assert said.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1} and "content" not in said.messages[1]
    assert said.tools == [{"n": 1}]


def test_a_system_prompt_is_given_to_those_that_have_none():
    assert read({"messages": ASKED}).led_by("Be short.").messages[0] == says("system", "Be short.")
    own = read({"messages": [says("system", "Own."), *ASKED]})
    assert own.led_by("Be short.") == own


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["a"], "expected an object, found a value of type list"),
        ({"question": "a"}, "it has question. Expected 'messages', 'conversations', 'instruction' or 'text'"),
        ({"messages": []}, "'messages' is not a list of turns, or has none"),
        ({"messages": [says("usr", "a")]}, "message 1 has the role 'usr'. Did you mean 'user'?"),
        ({"messages": [says("user", 3)]}, r"message 1 \('user'\) has no content that is a string"),
        ({"messages": [says("user", [{"type": "image"}])]}, "message 1 has a part of type 'image'"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "turn 1 is from 'robot'"),
        ({"instruction": "a"}, "'instruction' stands without 'output'"),
        ({"text": " "}, "'text' is missing or empty"),
        ({"messages": ASKED, "tools": "{"}, "'tools' is a string that is not JSON"),
    ],
)
def test_what_is_no_conversation_says_what_was_expected(row, told):
    with pytest.raises(Unfit, match=told):
        read(row)


def rows_of(path: Path, **fields: Any) -> list[Row]:
    tapes, _ = TextSource.model_validate({"path": path, **fields}).tapes()
    return [row for tape in tapes for row in tape.rows({})]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"row {i} é"} for i in range(count)]


def test_jsonl_json_and_parquet_hold_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows(5))), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows(5), indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(5)), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert [row.value for row in rows_of(tmp_path / name)] == rows(5)
    assert [row.key for row in rows_of(tmp_path / "a.jsonl")] == [
        f"{tmp_path.name}/a.jsonl:{n}" for n in (1, 3, 5, 7, 9)
    ]
    assert len(rows_of(tmp_path)) == 15


def test_a_line_that_is_not_json_or_not_utf_8_is_told_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": "b"}\n')
    found = rows_of(tmp_path / "a.jsonl")
    assert [row.value for row in found] == [{"text": "a"}, None, None, {"text": "b"}]
    assert found[1].place.endswith("a.jsonl, line 2") and "not JSON" in found[1].problem
    assert "not UTF-8" in found[2].problem


def test_reading_goes_on_at_any_place(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(7)), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows(7)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(7)), tmp_path / "a.parquet", row_group_size=3)
    for name in ("a.jsonl", "a.json", "a.parquet"):
        source = TextSource.model_validate({"path": tmp_path / name})
        (tape,), _ = source.tapes()
        for done, _ in enumerate(tape.rows({}), start=1):
            place = json.loads(json.dumps(tape.here()))
            (other,), _ = source.tapes()
            assert [row.value for row in other.rows(place)] == rows(7)[done:]
        assert tape.count() == 7


def test_places_that_are_not_there_or_hold_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no file that ends in"):
        rows_of(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="ends in none of"):
        rows_of(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_text("a")
    with pytest.raises(DataError, match="no parquet file"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "either a path"),
        ({"path": "a.jsonl", "dataset": "b"}, "either a path"),
        ({"path": "a.jsonl", "split": "test"}, "are of a dataset"),
        ({"path": "a.json", "streaming": True}, "cannot be streamed"),
        ({"path": "a.jsonl", "columns": {"mesages": "chat"}}, "Did you mean 'messages'"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        TextSource.model_validate(fields)
