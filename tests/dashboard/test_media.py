"""Samples over http: whole, in parts, and nothing that is no sample."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.dashboard.serving import Dashboard, Place
from weft.dashboard.media import Absent, sample_file

CONTENT = bytes(range(256)) * 40
SECRET = b"nobody's business"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a group, with samples, things that are none, and links that lead out."""
    root = tmp_path_factory.mktemp("media") / "runs"
    run = root / "group" / "a run"
    samples = run / "samples" / "step_000100"
    samples.mkdir(parents=True)
    (run / "config.yaml").write_text("name: a\n")
    (run / "events.rank0.jsonl").touch()
    (run / "secret.png").write_bytes(SECRET)
    (root.parent / "secret.mp4").write_bytes(SECRET)
    (root / "group" / "secret.mp4").write_bytes(SECRET)
    for name in ("00.mp4", "sheet.png", "x.jpg", "a b%2e.webm", "x.txt", "x.html", "x.svg", "x"):
        (samples / name).write_bytes(CONTENT)
    (samples / "out.mp4").symlink_to(root.parent / "secret.mp4")
    (samples / "near.png").symlink_to(run / "secret.png")
    (samples / "in.mp4").symlink_to(samples / "00.mp4")
    (samples / "folder.mp4").mkdir()
    (samples / "circle.mp4").symlink_to(samples / "circle.mp4")
    (run / "samples" / "elsewhere").symlink_to(root.parent)
    return run


@pytest.fixture(scope="module")
def place(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Dashboard(run.parents[1], tmp_path_factory.mktemp("state"), ("--port", "0", "--api-port", "none")) as served:
        yield served.page


FOLDER = "/media/group%2Fa%20run"
SAMPLES = FOLDER + "/samples/step_000100"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("00.mp4", "video/mp4"), ("sheet.png", "image/png"), ("x.jpg", "image/jpeg"), ("a b%2e.webm", "video/webm"),
     ("in.mp4", "video/mp4")],
)  # fmt: skip
def test_a_sample_comes_whole_and_as_what_it_is(place, name, kind):
    reply = place.ask(f"{SAMPLES}/{quote(name)}")
    assert (reply.status, reply.body) == (200, CONTENT)
    assert reply.headers["content-type"] == kind and reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["accept-ranges"] == "bytes" and reply.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-99", 0, 99), ("bytes=10000-", 10_000, 10_239), ("bytes=-40", 10_200, 10_239),
     ("bytes=9-99999", 9, 10_239)],
)  # fmt: skip
def test_a_part_of_a_video_comes_as_that_part_so_that_a_browser_can_seek(place, asked, first, last):
    reply = place.ask(f"{SAMPLES}/00.mp4", Range=asked)
    assert reply.status == 206 and reply.body == CONTENT[first : last + 1]
    assert reply.headers["content-range"] == f"bytes {first}-{last}/{len(CONTENT)}"


def test_a_part_beyond_the_end_is_refused_and_many_parts_get_the_whole(place):
    assert place.ask(f"{SAMPLES}/00.mp4", Range="bytes=20000-").status == 416
    many = place.ask(f"{SAMPLES}/00.mp4", Range="bytes=" + ",".join(f"{i}-" for i in range(500)))
    assert (many.status, many.body) == (200, CONTENT)


def test_its_head_tells_the_size_and_its_tag_saves_the_second_time(place):
    head = place.ask(f"{SAMPLES}/00.mp4", "HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(CONTENT)))
    assert "etag" in head.headers


OUT = [
    f"{FOLDER}/secret.png",
    f"{FOLDER}/config.yaml",
    f"{FOLDER}/samples",
    f"{FOLDER}/samples/",
    f"{SAMPLES}/",
    f"{SAMPLES}/absent.mp4",
    f"{SAMPLES}/folder.mp4",
    f"{SAMPLES}/out.mp4",
    f"{SAMPLES}/near.png",
    f"{SAMPLES}/circle.mp4",
    f"{FOLDER}/samples/elsewhere/secret.mp4",
    f"{SAMPLES}/../../secret.png",
    f"{SAMPLES}/%2e%2e/%2e%2e/secret.png",
    f"{SAMPLES}/..%2f..%2fsecret.png",
    f"{SAMPLES}/..%5c..%5csecret.png",
    f"{SAMPLES}/..\\..\\secret.png",
    f"{SAMPLES}/%252e%252e/%252e%252e/secret.png",
    f"{SAMPLES}/....//secret.png",
    f"{SAMPLES}/.%00./secret.png",
    f"{SAMPLES}/00.mp4%00.txt",
    f"{SAMPLES}/%c0%ae%c0%ae/secret.png",
    f"{FOLDER}/samples//etc/passwd",
    f"{FOLDER}/samples/%2fetc%2fpasswd",
    f"{FOLDER}//etc/passwd",
    f"{SAMPLES}/{'a' * 400}.mp4",
    "/media/group/a%20run/samples/step_000100/00.mp4",
    "/media/group%2F..%2F../samples/secret.mp4",
    "/media/..%2F..%2F/samples/secret.mp4",
    "/media/../secret.mp4",
    "/media/%2e%2e/secret.mp4",
    "/media//samples/secret.mp4",
    "/media/group/samples/../secret.mp4",
    "/media/group%2Fa%20run%00/samples/step_000100/00.mp4",
    "/static/../server.py",
    "/static/%2e%2e/server.py",
    "/static/..%2fserver.py",
    "/static//etc/passwd",
    "/static/",
]


@pytest.mark.parametrize("path", OUT)
def test_no_spelling_of_a_path_leads_out_of_the_samples(place, path):
    reply = place.ask(path)
    assert reply.status in (403, 404) and SECRET not in reply.body


@pytest.mark.parametrize("name", ["x.txt", "x.html", "x.svg", "x"])
def test_what_a_browser_could_run_or_is_no_picture_is_not_served(place, name):
    assert place.ask(f"{SAMPLES}/{name}").status == 404


def test_samples_that_are_a_link_to_elsewhere_are_none(tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x.mp4").write_bytes(SECRET)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "else")
    with pytest.raises(Absent):
        sample_file(tmp_path / "run", "samples/x.mp4")
