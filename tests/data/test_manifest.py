"""Sources: folders with captions beside clips, and the manifests of other trainers."""

import json
from pathlib import Path

import pytest

from weft.data.manifest import read_source
from weft.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_folder_is_read_to_its_depth_in_sorted_order_without_hidden_files(tmp_path):
    touch(tmp_path, "b.mp4", "a/z.PNG", "a/c.webm", ".hidden.mp4", "notes.md")
    (tmp_path / "b.txt").write_text("  a bee \n")
    entries = read_source(tmp_path).entries
    assert [(e.key, e.media, e.captions) for e in entries] == [
        ("a/c.webm", "video", ()),
        ("a/z.PNG", "image", ()),
        ("b.mp4", "video", ("a bee",)),
    ]


def test_the_captions_ending_can_be_chosen(tmp_path):
    touch(tmp_path, "b.mp4")
    (tmp_path / "b.caption").write_text("a bee")
    assert read_source(tmp_path, ".caption").entries[0].captions == ("a bee",)


@pytest.mark.parametrize(("path", "caption"), [("file_path", "text"), ("video", "caption"), ("video_path", "prompt")])
def test_the_keys_of_other_trainers_are_understood(tmp_path, path, caption):
    touch(tmp_path, "clips/a.mp4")
    row = json.dumps({path: "clips/a.mp4", caption: "a bee"})
    (tmp_path / "m.jsonl").write_text(f"{row}\n\n")
    (tmp_path / "m.csv").write_text(f"{path},{caption}\nclips/a.mp4,a bee\n")
    (tmp_path / "m.json").write_text(f"[{row}]")
    for name in ("m.jsonl", "m.csv", "m.json"):
        (entry,) = read_source(tmp_path / name).entries
        assert (entry.key, entry.captions, entry.path) == ("clips/a.mp4", ("a bee",), tmp_path / "clips/a.mp4")


def test_a_list_of_videox_with_types_and_sizes_is_understood(tmp_path):
    touch(tmp_path, "a.mp4", "b.bin")
    rows = [
        {"file_path": "a.mp4", "text": "one", "type": "video", "width": 832, "height": 480},
        {"file_path": "b.bin", "text": "two", "type": "image"},
    ]
    (tmp_path / "metadata.json").write_text(json.dumps(rows, indent=1))
    assert [e.media for e in read_source(tmp_path / "metadata.json").entries] == ["video", "image"]


def test_a_file_that_is_not_there_is_named_with_its_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('\n{"video": "clips/7.mp4", "text": "x"}\n')
    (entry,) = read_source(tmp_path / "m.jsonl").entries
    assert entry.problem == (
        f"{tmp_path / 'm.jsonl'}, line 2: 'video' is clips/7.mp4, and there is no such file. "
        "Paths count from the manifest's folder."
    )


def test_paths_can_count_from_elsewhere(tmp_path):
    touch(tmp_path, "videos/a.mp4")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.jsonl").write_text('{"video": "a.mp4"}\n{"video": "b.mp4"}')
    here, lost = read_source(tmp_path / "lists" / "m.jsonl", root=tmp_path / "videos").entries
    assert (here.key, here.path, here.problem) == ("a.mp4", tmp_path / "videos" / "a.mp4", "")
    assert f"Paths count from the source's root, {tmp_path / 'videos'}." in lost.problem


def test_a_clip_may_have_several_captions(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4", "text": ["a bee", " a fly ", ""]}')
    assert read_source(tmp_path / "m.jsonl").entries[0].captions == ("a bee", "a fly")
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4", "text": ["a bee", 7]}')
    with pytest.raises(DataError, match=r"line 1: 'text' is 7\. Expected a string"):
        read_source(tmp_path / "m.jsonl")


def test_one_kind_can_be_taken_from_a_mixed_source(tmp_path):
    touch(tmp_path, "a.mp4", "b.png")
    assert [entry.key for entry in read_source(tmp_path, only="image").entries] == ["b.png"]
    assert [entry.key for entry in read_source(tmp_path, only="video").entries] == ["a.mp4"]


def test_all_problems_of_a_manifest_are_told_at_once_with_their_lines(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    lines = [
        '{"video": "a.mp4", "captoin": "x"}',
        "{not json",
        '{"text": "no path"}',
        '{"video": "a.mp4", "text": "again"}',
        '{"video": "b.mp4", "type": "image"}',
        '{"video": "b.mp4", "image": "b.png"}',
        '["a.mp4"]',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_source(tmp_path / "m.jsonl")
    said = str(caught.value)
    assert "line 1: there is no key 'captoin'. Did you mean 'caption'?" in said
    assert "line 2: not JSON" in said
    assert "line 3: a path is lost" in said
    assert "line 4: a.mp4 stands in line 1 already" in said
    assert "line 5: 'type' is 'image', but b.mp4 is a file of type 'video'" in said
    assert "line 6: a path stands under 'video' and 'image'" in said
    assert "line 7: expected an object" in said


def test_a_member_of_a_json_list_is_named_by_its_line(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "m.json").write_text('[\n  {"video": "a.mp4"},\n\n  {\n   "text": "x"\n  }\n]')
    with pytest.raises(DataError, match=r"m\.json, line 4: a path is lost"):
        read_source(tmp_path / "m.json")


@pytest.mark.parametrize("text", ["{}", '[{"video": "a.mp4"} {"video": "b.mp4"}]', '[{"video": ]', "["])
def test_a_broken_json_list_is_refused_without_a_traceback(tmp_path, text):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match=r"m\.json, line 1"):
        read_source(tmp_path / "m.json")


def test_an_unquoted_comma_in_a_csv_is_named_with_its_line(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "m.csv").write_text("video,text\na.mp4,one, two\n")
    with pytest.raises(DataError, match=r"line 2: 1 more cells than columns"):
        read_source(tmp_path / "m.csv")


def test_a_source_that_is_not_there_names_the_working_directory(tmp_path):
    with pytest.raises(DataError, match="Paths count from the working directory"):
        read_source(tmp_path / "nowhere")


def test_a_binary_manifest_is_refused_without_a_traceback(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_source(tmp_path / "m.csv")
