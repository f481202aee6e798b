"""How a run that fails writes down its end, and what a user's terminal is spared."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.small import config_of
from weft.cli.launched import Rank
from weft.cli.train import again
from weft.engines.peers import LOST_PEER
from weft.errors import RunError
from weft.events import Event, RunEnded
from weft.run.resuming import resumed_state
from weft.run.start import open_run, train_run

RESET = "[pair.cc:537] Read error [127.0.0.1]:52650: Connection reset by peer. Check the logs before reporting. GLHF!"


def test_a_rank_that_lost_another_says_so_in_words_and_not_in_those_of_gloo(plain: dict[str, Any]):
    config, told = config_of(plain), list[Event]()
    with pytest.raises(RuntimeError), open_run(config, config.engine.open(), told.append, ""):
        raise RuntimeError(RESET)
    ends = [event for event in told if isinstance(event, RunEnded)]
    assert [(end.outcome, end.reason) for end in ends] == [("failed", LOST_PEER)]


@pytest.mark.parametrize("key", ["steps", "epochs"])
def test_a_run_beyond_its_end_is_told_which_key_to_raise(plain: dict[str, Any], key: str):
    plain["validation"]["every"] = plain["save"]["every"] = 0
    plain["schedule"] = {"steps": 2}
    ended = train_run(config_of(plain), lambda event: None)
    saved = ended.folder / "checkpoints" / "global_step_2"
    plain["resume_allow"] = ["schedule", "inputs"]
    shorter = config_of(plain, schedule={"steps": 1})
    if key == "epochs":
        schedule = shorter.schedule.model_copy(update={"epochs": 0.5})
        shorter = shorter.model_copy(update={"schedule": schedule})
    with pytest.raises(RunError, match=rf"beyond the 1 steps that schedule\.{key} makes\. Raise it\."):
        resumed_state(shorter, {}, saved)


def test_libraries_show_no_bars_and_no_remarks_of_their_own_but_their_warnings_still_come():
    code = """
import logging
from weft.cli.train import quiet_libraries
quiet_libraries()
from huggingface_hub.utils import are_progress_bars_disabled
assert are_progress_bars_disabled()
library = logging.getLogger("DeepSpeed")
library.addHandler(logging.StreamHandler())
library.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
library.warning("gradients overflow")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["gradients overflow"]


def test_the_way_to_go_on_is_a_command_only_where_it_is_known():
    path, overrides = Path("run.yaml"), ["name=a b"]
    assert again(path, overrides, Rank()) == "the same command again:\n  weft train run.yaml 'name=a b'"
    assert again(path, overrides, Rank(0, 2)) == "the launcher's command that started it once more."


def test_training_quiets_libraries_before_it_imports_one():
    code = """
import sys
from pathlib import Path
from weft.cli import train
from weft.cli.launched import Rank
def quieted():
    assert not {"huggingface_hub", "transformers", "datasets", "deepspeed"} & set(sys.modules)
    raise SystemExit(7)
train.quiet_libraries = quieted
train.train_here(Path("none.yaml"), [], Rank())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
