"""The page of a run: whole in itself, harmless, true at every time of the run's life."""

import base64
import re
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.dashboard import folders
from tests.dashboard.folders import HOSTILE
from weft.dashboard.report import Contents, outcome, write_report
from weft.dashboard.report_origin import adapters_of
from weft.dashboard.report_parts import Privacy, duration, number
from weft.dashboard.store import Store


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_of(folder: Path, **contents) -> str:
    store = Store(folder)
    return write_report(store, store.ids()[0], Contents(**contents))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.finished(tmp_path_factory.mktemp("report"), time.time())


def test_a_finished_run_has_all_its_parts_in_one_file_that_asks_for_nothing(finished: Path):
    page = page_of(finished)
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads[:5] == ["What was trained", "Curves", "Samples", "How much the adapter changes", "What happened"]
    assert heads[5:] == ["Config", "Where it comes from"]  # no adapter lies in this folder, so none is to be used
    sources = [a[key] for _, a in Tags(page).found for key in ("src", "href", "poster", "data", "srcset") if key in a]
    assert sources and all(source.startswith("data:video/mp4;base64,") for source in sources)
    assert not re.search(r"url\(|@import|https?://", page.partition("<h2>Config")[0])
    assert "default-src 'none'" in page


def test_the_first_sentence_tells_the_outcome_beside_the_base_with_its_error(finished: Path):
    # 0.16 + 0.2 e^-3 = 0.1700 against 0.36
    said = "Validation loss 0.1700 at step 200: lower than without the adapter by 0.1900 ± 0.0100 (one standard error)."
    assert said in page_of(finished)


def test_a_difference_within_two_standard_errors_is_said_to_be_chance_perhaps():
    last = {"step": 5, "loss": 1.0, "baseline": 1.01, "standard_error": 0.02}
    run = {"state": "training", "step": 5, "total_steps": 9, "eta": None, "reason": None, "evaluations": [last]}
    assert outcome(run).endswith("by 0.0100 ± 0.0200 (one standard error, which may be chance).")
    worse = {**run, "evaluations": [{**last, "loss": 1.5}]}
    assert "higher than without the adapter by 0.4900" in outcome(worse)
    assert outcome({**run, "evaluations": []}) == " at 5 of 9 steps."


def test_the_bytes_of_a_sample_are_those_of_its_file(finished: Path):
    videos = Tags(page_of(finished)).named("video")
    files = {(finished / "samples" / name).read_bytes() for name in ("base/00.mp4", "step_000200/01.mp4")}
    held = {base64.b64decode(video["src"].partition(",")[2]) for video in videos}
    assert files <= held and len(videos) == 6  # two prompts: the base, steps 100 and 200
    assert all({"controls", "loop", "muted", "playsinline", "aria-label"} <= video.keys() for video in videos)


def test_samples_that_do_not_fit_are_counted_and_the_newest_and_the_base_come_first(finished: Path):
    bare = len(page_of(finished, samples=False).encode())
    newest = [finished / "samples" / part / f"0{i}.mp4" for part in ("base", "step_000200") for i in (0, 1)]
    most = bare + sum(4 * path.stat().st_size // 3 + 1_100 for path in newest)
    page = page_of(finished, most=most)
    labels = [video["aria-label"].rpartition(", ")[2] for video in Tags(page).named("video")]
    assert sorted(set(labels)) == ["step 200", "without the adapter"]
    assert "2 files did not fit" in page and "Left out" in page and len(page.encode()) <= most


def test_what_is_not_wanted_is_not_there(finished: Path):
    page = page_of(finished, samples=False, config=False)
    assert (
        "<video" not in page
        and "Wan-AI" in page
        and "sources:" not in page
        and "This file holds numbers and events." in page
    )
    assert "a red ring" not in page


def test_words_of_a_run_are_shown_and_never_obeyed(tmp_path: Path):
    page = page_of(folders.hostile(tmp_path, time.time()), log=True)
    tags = Tags(page)
    assert len(tags.named("script")) == 1 and not tags.named("img")
    assert "alert" not in page.partition("<script>")[2].partition("</script>")[0].partition("const button")[2]
    assert all(not name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5
    assert HOSTILE not in page


def test_no_key_of_an_item_no_home_and_no_host_leaves_with_the_page(finished: Path):
    import platform

    page = page_of(finished)
    assert "secret clip" not in page
    assert not re.search(rf"\b{re.escape(platform.node())}\b", re.sub(r"base64,[^\"]*", "", page))
    assert "Machine</dt>" in page_of(finished, host=True) or not Store(finished).summaries()[0]["host"]


def test_home_folders_are_shortened_and_hosts_covered_in_any_text():
    private = Privacy("/data/users/ada", "gpu-7")
    assert private("/data/users/ada/runs and /home/bob/clips on gpu-7") == "~/runs and ~/clips on (host)"
    superuser = "/" + "root"
    assert private(f"C:\\Users\\Eve\\a.mp4, /Users/eve/b, {superuser}/c, {superuser}ed/d, gpu-77") == (
        "~\\a.mp4, ~/b, ~/c, /rooted/d, gpu-77"
    )
    assert private.tree({"a": ["/home/x", 3]}) == {"a": ["~", 3]}


def test_a_run_that_goes_on_says_as_of_when_and_where_it_is(tmp_path: Path):
    page = page_of(folders.training(tmp_path, time.time()))
    assert f"as of {time.strftime('%Y-%m-%d')}" in page and "at 81 of 200 steps" in page


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (folders.one_point, "at 1 of 200 steps"),
        (folders.no_points, "caching"),
        (folders.crashed, "crashed"),
        (folders.failed, "CUDA out of memory"),
        (folders.corrupt, "of the run&#x27;s log could not be read"),
        (folders.resumed, "Resumed from the checkpoint of step 100"),
    ],
)
def test_every_state_of_a_run_has_its_page(tmp_path: Path, build: folders.Builder, said: str):
    page = page_of(build(tmp_path, time.time()))
    assert said in page and page.endswith("</html>\n")


def test_experts_and_roles_have_curves_of_their_own(tmp_path: Path):
    page = page_of(folders.experts(tmp_path, time.time()))
    assert ">Loss of high<" in page and ">Loss of low<" in page
    page = page_of(folders.distillation(tmp_path, time.time()))
    assert ">Loss of student<" in page and ">student/gap<" in page


def test_replies_stand_beside_the_bases_and_losses_are_in_nats(tmp_path: Path):
    page = page_of(folders.text(tmp_path, time.time()))
    assert "created by somebody" in page and "created to be helpful" in page and "nats per token" in page


def test_the_matrix_marks_what_was_learned_and_tells_the_mean_of_it(tmp_path: Path):
    page = page_of(folders.continual(tmp_path, time.time()))
    rows = re.findall(r"<tr>(.*?)</tr>", page.partition("accuracy on each experience")[2].partition("</table>")[0])
    assert [row.count('class="past"') for row in rows] == [0, 0, 1, 2, 3, 4]  # head, untrained, four experiences
    assert rows[3].endswith("<td>0.870</td>")  # (0.90 + 0.84) / 2


def test_numbers_and_durations_read_well():
    assert [number(v) for v in (0.25, 1234.5, 1e-5, None, float("nan"))] == ["0.2500", "1,234.5", "1e-5", "–", "–"]
    assert [duration(s) for s in (3.14, 59, 60, 125, 7260, 90_000)] == [
        "3.1 s", "59 s", "1 min", "2 min 5 s", "2 h 1 min", "1 d 1 h",
    ]  # fmt: skip


def test_finished_adapters_tell_their_fingerprints_their_data_and_how_they_are_loaded(tmp_path: Path):
    run = folders.experts(tmp_path, time.time())
    for expert in ("low", "high"):
        (run / f"adapter_{expert}").mkdir()
        told = {"weft.data.items": "48", "weft.data": "a1b2c3", "weft.base": "d4e5f6"}
        save_file({"x": numpy.zeros(1)}, run / f"adapter_{expert}" / "pytorch_lora_weights.safetensors", told)
    page = unescape(page_of(run))
    assert "48 clips" in page and "a1b2c3" in page and "d4e5f6" in page
    assert "pipe.load_lora_weights('experts/adapter_high', " in page
    assert "adapter_name='low', load_into_transformer_2=True)" in page


def test_adapters_in_other_programs_formats_alone_are_told_of_and_exports_beside_them_are_none(tmp_path: Path):
    for folder, file in (("adapter", "lora_musubi"), ("adapter-peft", "adapter_model")):
        (tmp_path / folder).mkdir()
        save_file({"x": numpy.zeros(1)}, tmp_path / folder / f"{file}.safetensors", {"weft.base": "ab12"})
    (found,) = adapters_of(tmp_path)
    assert found.folder.name == "adapter" and found.metadata["weft.base"] == "ab12"
