"""Reading a log while it is written: whatever bytes come when, the same whole lines are had, once."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.dashboard import tail
from weft.dashboard.tail import Tail, lines_after, parsed

PIECES = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"{}", b"\xff", b"\x00", b"\r", b'{"x": 1}\n']), max_size=40)


@settings(max_examples=150, deadline=None)
@given(PIECES, st.data())
def test_however_the_bytes_are_split_in_time_the_lines_are_the_same(tmp_path_factory, pieces, data) -> None:
    path = tmp_path_factory.mktemp("tail") / "log"
    text, tailed, had = b"".join(pieces), Tail(path), []
    path.touch()
    written = 0
    while written < len(text):
        more = data.draw(st.integers(1, len(text) - written))
        with path.open("ab") as file:
            file.write(text[written : written + more])
        written += more
        had += tailed.read().lines
    assert had == text.split(b"\n")[:-1]
    assert tailed.read().lines == []


def test_a_line_that_is_too_long_is_passed_over_and_counted_wherever_a_turn_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tail, "LONGEST", 10)
    path = tmp_path / "log"
    path.write_bytes(b"first\n" + b"x" * 35 + b"\nsecond\n" + b"y" * 11 + b"\nthird\n")
    for turn in (10, 11, 16, 40, 1000):
        tailed, had, more = Tail(path), [], True
        while more:
            found = tailed.read(turn)
            had, more = had + found.lines, found.more
        assert (had, tailed.overlong) == ([b"first", b"second", b"third"], 2), f"turns of {turn} bytes"


def test_an_overlong_line_that_is_still_being_written_is_not_held(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tail, "LONGEST", 10)
    path, tailed = tmp_path / "log", Tail(tmp_path / "log")
    path.write_bytes(b"x" * 20)
    assert tailed.read().lines == [] and tailed.offset == 20
    with path.open("ab") as file:
        file.write(b"xxx\nwhole\nhal")
    assert (tailed.read().lines, tailed.overlong) == ([b"whole"], 1)
    with path.open("ab") as file:
        file.write(b"f\n")
    assert tailed.read().lines == [b"half"]


@pytest.mark.parametrize("how", ["shorter", "another", "written over"])
def test_a_file_that_shrank_or_was_replaced_is_begun_anew(tmp_path, how) -> None:
    path, tailed = tmp_path / "log", Tail(tmp_path / "log")
    path.write_bytes(b"one\ntwo\n")
    tailed.read()
    if how == "shorter":
        path.write_bytes(b"new\n")
    elif how == "another":
        (tmp_path / "other").write_bytes(b"new\nand more\nthan before\n")
        (tmp_path / "other").replace(path)
    else:
        path.write_bytes(b"new\nand more\nthan before\n")
    found = tailed.read()
    assert found.reset and found.lines[0] == b"new"
    assert not tailed.read().reset


def test_a_missing_file_has_no_lines_and_is_read_once_it_is_there(tmp_path) -> None:
    tailed = Tail(tmp_path / "log")
    assert tailed.read().lines == []
    (tmp_path / "log").write_bytes(b"here\n")
    assert tailed.read().lines == [b"here"]


@pytest.mark.parametrize("line", [
    b"", b"\x00" * 100, b"\xff\xfe", b"[]", b"12", b"null", b'{"event": "step"', b'{"event": "step"}', b"[" * 100_000,
    b'{"event": 3, "time": 1}', b'{"event": "step", "time": "now"}', b'{"event": "step", "time": 1e999}',
    b'{"event": "step", "time": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_what_is_no_event_is_none(line) -> None:
    assert parsed(line) is None


def test_a_position_is_understood_by_a_reader_that_has_just_begun(tmp_path) -> None:
    path, tailed = tmp_path / "log", Tail(tmp_path / "log")
    first = json.dumps({"time": 1.0, "event": "phase", "note": "x" * 200}).encode() + b"\n"
    path.write_bytes(first)
    tailed.read()
    with path.open("ab") as file:
        file.write(b"two\nthr")
    position, lines = lines_after(path, tailed.position) or (0, [])
    assert lines == [b"two"] and position < 1 << 53
    with path.open("ab") as file:
        file.write(b"ee\n")
    assert (lines_after(path, position) or (0, []))[1] == [b"three"]
    path.write_bytes(first.replace(b"1.0", b"2.0") + b"two\nthree\nfour\n")
    assert lines_after(path, position) is None, "another run's file"


def test_a_position_within_a_line_or_beyond_the_end_or_too_far_back_is_refused(tmp_path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    assert lines_after(path, 2) is None
    assert lines_after(path, 9) is None
    assert lines_after(path, 0, limit=5) is None
    assert lines_after(path, 4) == (8, [b"two"])
    assert lines_after(Path(tmp_path / "none"), 0) == (0, [])
