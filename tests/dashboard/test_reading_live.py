"""A run that is really training, read while it goes, is killed and goes on."""

import multiprocessing
import time
from multiprocessing.context import ForkProcess

import pytest
import torch

from tests.small import config_of, make_clips, make_wan, plain_config
from weft.dashboard.store import Store
from weft.run.config import RunConfig
from weft.run.listeners import read_steps
from weft.run.start import train_run

STEPS = 30
SAVE = {"every": 5, "background": False}  # else a kill may come before the first checkpoint is whole


@pytest.mark.slow
def test_a_real_run_is_read_while_it_trains_is_killed_and_goes_on(tmp_path) -> None:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that is not there
    plain = plain_config(tmp_path, make_wan(tmp_path / "model"), make_clips(tmp_path / "clips"))
    samples = {"prompts": ["a square"], "frames": 9, "width": 64, "height": 64, "steps": 1}
    config = config_of(plain, schedule={"steps": STEPS}, save=SAVE, validation={"every": 10}, samples=samples)
    store, seen = Store(tmp_path / "runs"), []

    killed = training(config)
    watched(store, killed, seen, until=12)
    killed.kill()
    while killed.is_alive():  # which also takes its leave of a zombie
        time.sleep(0.01)
    dead = store.run("run")
    assert (dead["state"], dead["commands"], dead["gpus"][0]["state"]) == ("crashed", [], "crashed")
    assert f"step {dead['step']}" in dead["reason"]

    again = training(config)
    watched(store, again, seen, until=None)
    assert again.exitcode == 0
    done = store.run("run")
    assert (done["state"], done["reason"], done["step"]) == ("finished", None, STEPS)
    [resume] = done["resumes"]
    newest = range(5, dead["step"] + 1, 5)  # it may have gone on for a while until the kill reached it
    assert resume["step"] in newest[-2:], "the newest checkpoint that was whole"
    assert [one["step"] for one in done["evaluations"]] == [0, 10, 20, 30]
    assert [(s["step"], s["adapter"]) for s in store.samples("run") if s["media"]] == [(0, False), (STEPS, True)]
    assert store.since("run", dead["position"]).reset, "what was drawn beyond the checkpoint is void"
    expected = read_steps(config.folder / "events.rank0.jsonl")
    curve = store.series("run", ["train/loss"])["series"]["train/loss"]
    assert curve["values"] == pytest.approx([expected[n]["metrics"]["train/loss"] for n in range(1, STEPS + 1)])
    assert "training" in seen and seen[-1] == "finished" and not {"stalled", "stopped"} & set(seen)
    assert seen.count("finished") == 1 and seen.count("crashed") <= 1


def training(config: RunConfig) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=train_run, args=(config, lambda event: None))
    process.start()
    return process


def watched(store: Store, process: ForkProcess, seen: list[str], until: int | None) -> None:
    """Look again and again, and note each new state, until the run has come to a step or its process ends."""
    deadline, ended = time.monotonic() + 240, False
    while not ended and time.monotonic() < deadline:
        ended = not process.is_alive()
        for run in store.summaries():
            store.run(run["id"])
            store.status(run["id"])
            if not seen or seen[-1] != run["state"]:
                seen.append(run["state"])
            if until is not None and run["state"] != "crashed" and run["step"] >= until:
                return
        time.sleep(0.05)
