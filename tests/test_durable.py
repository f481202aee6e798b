"""Files and folders that are whole or absent."""

from pathlib import Path

import pytest

from weft.durable import (
    HALF_WRITTEN,
    REPLACED,
    draft_of,
    remove_drafts,
    remove_folder,
    take_place,
    whole_file,
    write_folder,
    write_whole,
)


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path):
    write_whole(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a") as draft:
        draft.write_text("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_could_not_be_filled_leaves_the_old_one(tmp_path: Path):
    write_folder(tmp_path / "a", lambda folder: write_whole(folder / "x", "old"))

    def fail(folder: Path) -> None:
        write_whole(folder / "x", "new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "a", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path: Path):
    write_folder(tmp_path / "a", lambda folder: write_whole(folder / "x", "old"))
    write_folder(tmp_path / "a", lambda folder: write_whole(folder / "y", "new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["y"]


def test_a_kill_between_the_two_renames_loses_neither_folder(tmp_path: Path):
    """As a process leaves it that ends after the old folder was moved away and before the new one has its name."""
    write_folder(tmp_path / f"{HALF_WRITTEN}1{REPLACED}a", lambda folder: write_whole(folder / "x", "old"))
    write_folder(tmp_path / f"{HALF_WRITTEN}2-a", lambda folder: write_whole(folder / "x", "new"))
    remove_drafts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_what_was_replaced_is_deleted_when_the_new_folder_stands(tmp_path: Path):
    write_folder(tmp_path / f"{HALF_WRITTEN}1{REPLACED}a", lambda folder: write_whole(folder / "x", "old"))
    write_folder(tmp_path / "a", lambda folder: write_whole(folder / "x", "new"))
    remove_drafts(tmp_path)
    assert (tmp_path / "a" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_draft_that_several_fill_takes_its_place_at_one_stroke(tmp_path: Path):
    draft = draft_of(tmp_path / "runs" / "a")
    (draft / "x").write_text("one")
    (draft / "y").write_text("another")
    assert not (tmp_path / "runs" / "a").exists()
    take_place(draft, tmp_path / "runs" / "a")
    assert sorted(p.name for p in (tmp_path / "runs").rglob("*")) == ["a", "x", "y"]


def test_a_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "a", lambda folder: write_whole(folder / "x", "old"))

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.durable.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "a")
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    remove_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []
