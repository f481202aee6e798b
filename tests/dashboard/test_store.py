"""What the store tells of runs: the shapes of the contract, of whatever stands in the folders."""

import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.dashboard import folders
from tests.dashboard.written import TEXT, VIDEO, RunWriter
from weft import events
from weft.dashboard import glance
from weft.dashboard.discover import find_runs
from weft.dashboard.store import Store, UnknownRun
from weft.run.listeners import EventLog, read_steps

NOW = 1_795_274_532.0
SUMMARY = {
    "id", "name", "state", "reason", "phase", "since", "step", "total_steps", "done", "total", "note", "eta",
    "seconds_per_step", "losses", "validation", "started_at", "updated_at", "world", "host", "family", "model",
    "objective", "adapter", "spark", "incidents", "sample", "medium",
}  # fmt: skip
RUN = SUMMARY | {
    "gpus", "phases", "optimizers", "series", "evaluations", "resumes", "entries", "position", "commands", "trainable",
    "has", "damaged", "rates", "log",
}  # fmt: skip
GPU = {
    "number", "rank", "name", "host", "state", "activity", "step", "total_steps", "loss", "smoothed_losses", "lr",
    "memory", "seconds_per_step", "eta", "data_wait", "updated_at", "error",
}  # fmt: skip


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, build in folders.GALLERY.items():
        if name != "long":
            build(root, NOW)
    return root


@pytest.fixture
def store(gallery: Path) -> Store:
    return Store(gallery, lambda: NOW)


def test_every_run_has_the_shape_that_the_page_expects(store) -> None:
    assert len(store.ids()) == len(folders.GALLERY) - 1
    for summary, run in zip(store.summaries(), store.ids(), strict=True):
        assert summary["id"] == run and summary.keys() == SUMMARY
        whole = store.run(run)
        assert whole.keys() == RUN
        assert all(gpu.keys() == GPU for gpu in whole["gpus"])
        answers = [whole, store.series(run, whole["series"], smooth=0.9), store.samples(run), store.config(run),
                   store.health(run), store.scores(run), store.log(run), store.status(run)]  # fmt: skip
        json.dumps(answers, allow_nan=False)


def test_no_name_of_a_training_item_leaves_the_store(store) -> None:
    for run in store.ids():
        told = [store.run(run), store.samples(run), store.status(run), store.since(run, 0).records]
        assert "secret clip" not in json.dumps(told)


def test_a_run_tells_what_it_is_and_what_came_of_it(store) -> None:
    run = store.run("finished")
    assert (run["family"], run["objective"], run["adapter"], run["medium"]) == (
        "wan", "flow-matching", "lora, rank 16", "video"
    )  # fmt: skip
    assert (run["step"], run["total_steps"], run["eta"], run["world"]) == (200, 200, None, 1)
    assert run["validation"]["step"] == 200 and run["validation"]["baseline"] == 0.36
    assert [one["step"] for one in run["evaluations"]] == [0, 50, 100, 150, 200]
    assert run["sample"] == "/media/finished/samples/step_000200/00.mp4"
    assert len(run["spark"]) == 60 and run["spark"][0] > run["spark"][-1]
    assert (run["phases"], run["optimizers"], run["rates"]) == (["train"], ["default"], {"default": 1e-4})
    assert run["has"] == {"health": True, "scores": False, "samples": True}
    assert store.run("text")["medium"] == "text"


def test_a_long_log_is_told_in_the_list_from_its_two_ends_as_if_it_were_read_whole(gallery, monkeypatch) -> None:
    for run in ("finished", "resumed", "failed"):
        whole = Store(gallery, lambda: NOW).summary(run)
        with monkeypatch.context() as patched:
            for name, size in (("WHOLE", 10_000), ("HEAD", 2_000), ("END", 9_000)):
                patched.setattr(glance, name, size)
            assert Store(gallery, lambda: NOW).summary(run) == whole


def test_curves_of_few_runs_are_kept_and_the_rest_is_read_again(store, monkeypatch) -> None:
    monkeypatch.setattr("weft.dashboard.store.OPEN_LOGS", 2)
    for _ in range(2):
        curves = [store.series(run, ["train/loss"])["series"]["train/loss"] for run in ("text", "failed", "resumed")]
        steps = [curve["steps"][-1:] for curve in curves]
        assert (steps, len(store._logs)) == ([[200], [81], [200]], 2)


def test_two_experts_and_two_roles_have_a_curve_each(store) -> None:
    assert store.run("experts")["phases"] == ["high", "low"]
    assert store.series("experts", ["high/loss"])["series"]["high/loss"]["steps"][49:51] == [50, 101]
    assert store.run("distillation")["optimizers"] == ["critic", "student"]
    assert store.series("distillation", ["student/loss"])["series"]["student/loss"]["steps"][:3] == [5, 10, 15]


def test_eight_gpus_are_eight_and_each_rank_has_its_curves(store) -> None:
    run = store.run("eight-gpus")
    assert run["world"] == 8 and [gpu["rank"] for gpu in run["gpus"]] == list(range(8))
    assert {gpu["state"] for gpu in run["gpus"]} == {"active"}
    assert len(store.series("eight-gpus", ["seconds/total"], rank=7)["series"]["seconds/total"]["steps"]) == 100
    status = store.status()
    mine = [gpu for gpu in status["gpus"] if gpu["id"] == "eight-gpus"]
    assert status["format"] == 1 and len(mine) == 8 and len(mine[0]["history"]) == 100
    assert mine[0]["history"][0].keys() == {"step", "time", "loss", "smoothed_loss", "lr", "seconds"}


def test_a_corrupt_log_is_read_past_its_damage_and_the_damage_is_counted(store) -> None:
    run = store.run("corrupt")
    assert store.series("corrupt", ["train/loss"])["series"]["train/loss"]["steps"] == list(range(1, 101))
    assert run["damaged"] == 7  # NULs, no UTF-8, 5 MB, a list, a number, no time, infinity
    assert run["state"] == "crashed" and store.health("corrupt") == {"roles": {}}


def test_a_resumed_run_has_what_it_repeated_and_not_what_was_cut(store, gallery) -> None:
    run = store.run("resumed")
    curve = store.series("resumed", ["train/loss"])["series"]["train/loss"]
    expected = read_steps(gallery / "resumed" / "events.rank0.jsonl")
    assert curve["steps"] == sorted(expected) == list(range(1, 201))
    assert curve["values"] == [expected[step]["metrics"]["train/loss"] for step in curve["steps"]]
    assert [resume["step"] for resume in run["resumes"]] == [100]
    assert len([s for s in store.samples("resumed") if s["step"] == 100]) == 2, "the later sample of each prompt"


def test_hostile_words_are_told_as_they_are_and_lead_nowhere(store) -> None:
    run = next(run for run in store.ids() if run.startswith("odd"))
    assert store.run(run)["reason"] == f"Failed at step 50: {folders.HOSTILE}"
    [base, sample] = store.samples(run)
    assert (base["adapter"], sample["text"], sample["prompt"]) == (False, folders.HOSTILE, folders.HOSTILE)
    assert store.scores(run)["experiences"] == [folders.HOSTILE]


def test_replies_are_told_as_text_and_videos_as_paths(store) -> None:
    [base, *later] = store.samples("text")
    assert (base["kind"], base["adapter"], base["media"]) == ("text", False, None)
    assert base["text"] == "I am a language model, created by somebody."
    assert [sample["step"] for sample in later] == [100, 200]
    videos = store.samples("finished")
    assert {video["kind"] for video in videos} == {"video"} and len(videos) == 6
    assert (videos[0]["adapter"], videos[0]["media"]) == (False, "/media/finished/samples/base/00.mp4")


def test_samples_are_found_where_the_run_lies_now_whatever_folder_they_were_told_in(tmp_path) -> None:
    run = RunWriter(tmp_path / "a" / "was called" / "run", NOW, VIDEO)
    run.begin()
    run.sampled(0, adapter=False, cwd=tmp_path / "a")
    run.sampled(10)
    (tmp_path / "b").mkdir()
    shutil.move(run.folder, tmp_path / "b" / "now & then")
    told = Store(tmp_path / "b").samples("now & then")
    assert [sample["media"] for sample in told] == [
        f"/media/now%20%26%20then/samples/{step}/0{i}.mp4" for step in ("base", "step_000010") for i in (0, 1)
    ]
    assert all((tmp_path / "b" / unquote(str(s["media"]).removeprefix("/media/"))).is_file() for s in told)


def test_a_sample_whose_file_is_gone_is_told_without_it(tmp_path) -> None:
    run = RunWriter(tmp_path / "run", NOW, VIDEO)
    for file in ("/etc/passwd", "samples/../../secret.mp4", "samples", "elsewhere/samples/x.mp4"):
        run.tell(events.Sampled(step=1, prompt=file, seed=0, file=file, adapter=True))
    assert [(s["prompt"], s["media"]) for s in Store(tmp_path).samples("run")] == [("elsewhere/samples/x.mp4", None)]


def test_the_matrix_has_a_row_for_each_experience_that_was_learned(store) -> None:
    scores = store.scores("continual")
    assert (scores["metric"], scores["experiences"]) == ("accuracy", ["reviews", "news", "questions", "topics"])
    assert [row["after"] for row in scores["rows"]] == scores["experiences"]
    assert scores["rows"][1]["values"] == [pytest.approx(0.84), pytest.approx(0.9), 0.25, 0.25]


def test_health_has_a_row_of_layers_for_each_step_and_the_later_line_counts(tmp_path, store) -> None:
    role = store.health("finished")["roles"]["default"]
    assert (role["kind"], role["rank"], role["steps"], len(role["paths"])) == ("lora", 16, [50, 100, 150, 200], 48)
    assert len(role["change"]) == 4 and all(len(row) == 48 for row in role["change"] + role["effective_rank"])
    run = RunWriter(tmp_path / "run", NOW)
    run.begin()
    folders.write_health(run, range(50, 151, 50), layers=1)  # killed at 150
    run.clock.now += 60
    run.begin(step=50)
    run.clock.now += 60
    folders.write_health(run, range(100, 101), layers=1)
    assert Store(tmp_path).health("run")["roles"]["default"]["steps"] == [50, 100]


def test_two_configs_differ_in_what_was_written_differently(tmp_path) -> None:
    other = {**VIDEO, "optimizer": {"kind": "adamw", "lr": 3e-4}}
    RunWriter(tmp_path / "a", NOW, VIDEO)
    RunWriter(tmp_path / "b", NOW, other)
    RunWriter(tmp_path / "c", NOW, TEXT)
    store = Store(tmp_path)
    found = store.compare(["a", "b"])
    assert found["differing"] == [{"key": "optimizer.lr", "values": [1e-4, 3e-4]}]
    assert found["same"] > 100
    keys = {row["key"]: row["values"] for row in store.compare(["a", "b", "c"])["differing"]}
    assert keys["family.kind"] == ["wan", "wan", "causal-lm"] and keys["data.fps"][2] is None


def test_a_changed_learning_rate_is_the_rate_at_the_top_of_its_schedule(tmp_path) -> None:
    run = RunWriter(tmp_path / "run", NOW)
    run.begin()
    run.step(1, ("critic", "student"))
    for arguments, done in (({"lr": 5e-5, "optimizer": None}, True), ({"factor": 0.5, "optimizer": "critic"}, True),
                            ({"lr": 9.0, "optimizer": "student"}, False)):  # fmt: skip
        run.tell(events.Controlled(step=1, id="x", command="rate", arguments=arguments, by="ctl", done=done))
    assert Store(tmp_path).run("run")["rates"] == {"critic": 2.5e-5, "student": 5e-5}


def test_a_command_is_told_as_one_sentence_and_a_factor_is_no_rate(tmp_path) -> None:
    run = RunWriter(tmp_path / "ordered", NOW)
    run.begin()
    for arguments, done, reason in (
        ({"factor": 0.5, "optimizer": None}, True, "default: 0.003 -> 0.0015"),
        ({"lr": 1e-3, "optimizer": "critic"}, False, "there is none. Choose another."),
    ):
        order = {"step": 3, "id": "1", "command": "rate", "arguments": arguments, "by": "ctl"}
        run.tell(events.Controlled(**order, done=done, reason=reason))
    assert [entry["text"] for entry in Store(tmp_path).run("ordered")["entries"]] == [
        "Rate times 0.5, asked from a shell: default: 0.003 -> 0.0015.",
        "Rate 0.001 critic, asked from a shell, was refused: there is none. Choose another.",
    ]


def test_the_gpu_of_a_paused_run_is_paused_and_has_no_time_left(store) -> None:
    (gpu,) = store.run("paused")["gpus"]
    assert (gpu["activity"], gpu["eta"]) == ("paused", None)


def test_what_came_since_is_had_once_and_a_resume_that_cuts_asks_for_all(tmp_path) -> None:
    run = RunWriter(tmp_path / "run", NOW)
    run.begin()
    for step in range(1, 11):
        run.step(step)
    store = Store(tmp_path)
    position = store.run("run")["position"]
    run.step(11)
    run.tell(events.Notice(text="heard"))
    news = store.since("run", position)
    assert ([r["step"] for r in news.records], [e["text"] for e in news.entries]) == ([11], ["heard"])
    assert news.records[0].keys() == {"step", "time", "metrics", "seconds"} and not news.reset
    again = Store(tmp_path).since("run", news.position)
    assert (again.records, again.entries, again.reset) == ([], [], False)
    run.begin(step=11)
    assert not store.since("run", news.position).reset, "it went on where it had ended"
    position = store.since("run", news.position).position
    run.begin(step=8)
    news = store.since("run", position)
    assert news.reset and store.since("run", news.position) == type(news)(news.position, [], [], False)
    assert store.series("run", ["train/loss"])["series"]["train/loss"]["steps"] == list(range(1, 9))


def test_a_log_that_was_replaced_asks_for_all(tmp_path) -> None:
    run = RunWriter(tmp_path / "run", NOW)
    run.begin()
    for step in range(1, 11):
        run.step(step)
    store = Store(tmp_path)
    position = store.run("run")["position"]
    (run.folder / "events.rank0.jsonl").unlink()
    again = RunWriter.reopened(run.folder, NOW + 7)
    again.begin()
    for step in range(1, 31):
        again.step(step, train__loss=7.0)
    assert store.since("run", position).reset
    assert store.series("run", ["train/loss"])["series"]["train/loss"]["values"] == [7.0] * 30


def test_runs_are_found_in_groups_newest_first_and_not_within_runs(tmp_path) -> None:
    for i, name in enumerate(["old", "group/new", "a/b/deep", "a/b/c/too deep", "old/checkpoints/inner"]):
        RunWriter(tmp_path / name, NOW)
        os.utime(tmp_path / name / "config.yaml", (NOW + i, NOW + i))
    shutil.copytree(tmp_path / "old", tmp_path / ".tmp-1-draft")
    (tmp_path / "my project").mkdir()
    (tmp_path / "my project" / "config.yaml").write_text("a: 1")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(find_runs(tmp_path)) == ["a/b/deep", "group/new", "old"]
    assert Store(tmp_path / "old").ids() == ["old"]
    assert Store(tmp_path / "old").summary("old")["id"] == "old"


@pytest.mark.parametrize("run", ["", ".", "..", "../x", "/etc", "group", "finished/samples", "finished/", "./finished",
                                 "finished/../finished", "finished\x00", "a" * 5000])  # fmt: skip
def test_an_id_that_is_no_run_leads_nowhere(store, run) -> None:
    for ask in (store.folder, store.summary, store.run, store.samples, store.config, store.log, store.status):
        with pytest.raises(UnknownRun):
            ask(run)


def test_the_nearest_run_is_named(store) -> None:
    with pytest.raises(UnknownRun, match="Did you mean 'finished'"):
        store.folder("finishd")


def test_a_run_that_vanishes_while_it_is_read_is_unknown_afterwards(tmp_path) -> None:
    folders.stopped(tmp_path, NOW)
    store = Store(tmp_path)
    assert store.run("stopped")["state"] == "stopped"
    shutil.rmtree(tmp_path / "stopped")
    with pytest.raises(UnknownRun):
        store.run("stopped")
    assert store.summaries() == []


def test_an_empty_or_missing_root_has_no_runs(tmp_path) -> None:
    assert Store(tmp_path).summaries() == [] and Store(tmp_path / "none").ids() == []


def test_many_threads_read_one_growing_run_at_once(tmp_path) -> None:
    run = RunWriter(tmp_path / "run", NOW)
    run.begin()
    store, faults, done = Store(tmp_path), [], threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                steps = store.series("run", ["train/loss"])["series"]["train/loss"]["steps"]
                assert steps == list(range(1, len(steps) + 1))
                store.run("run")
            except Exception as fault:
                faults.append(fault)
                return

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(1, 301):
        run.step(step)
    done.set()
    for thread in threads:
        thread.join()
    assert faults == [] and store.run("run")["step"] == 300


def test_the_galleries_quick_way_writes_what_the_trainers_log_writes(tmp_path) -> None:
    slow, quick = RunWriter(tmp_path / "a" / "run", NOW), RunWriter(tmp_path / "b" / "run", NOW)
    for step in range(1, 4):
        slow.step(step)
    quick.many(quick.stepped(step, ("train",), 1.5) for step in range(1, 4))
    name = "events.rank0.jsonl"
    assert (quick.folder / name).read_text() == (slow.folder / name).read_text()
    assert isinstance(slow._logs[0], EventLog)
