"""Commands as files: who may give which, what is refused, and what a trainer takes out of its inbox."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from weft.errors import RunError
from weft.run.folder import claim
from weft.run.inbox import COMMANDS, Inbox, checked, post


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder in which this process trains, as far as anybody can see."""
    folder = tmp_path / "zorp"
    folder.mkdir()
    claim(folder)
    return folder


def test_a_command_is_taken_once_with_what_was_said_and_who_said_it(run):
    inbox = Inbox(run)
    assert not inbox.waiting()
    identity = post(run, "rate", {"lr": 5e-5, "optimizer": "critic"}, by="dashboard")
    assert inbox.waiting()
    (command,) = inbox.take()
    assert (command.id, command.command, command.by, command.refusal) == (identity, "rate", "dashboard", "")
    assert command.arguments == {"lr": 5e-5, "optimizer": "critic"}
    assert not inbox.waiting() and inbox.take() == [] and os.listdir(inbox.folder) == []


def test_commands_are_taken_in_the_order_in_which_they_were_given(run):
    inbox = Inbox(run)
    given = [post(run, name, {}, by="ctl") for name in ("pause", "sample", "save", "resume")]
    assert [command.id for command in inbox.take()] == given


def test_what_lay_there_before_the_training_began_is_kept_apart(run):
    early = post(run, "stop", {}, by="ctl")
    inbox = Inbox(run)
    post(run, "save", {}, by="ctl")
    assert [command.id for command in inbox.early] == [early]
    assert [command.command for command in inbox.take()] == ["save"]


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("puase", {}, "no command 'puase'. Did you mean 'pause'"),
        ("pause", {"for": 3}, "'for' is no argument of it; it takes none"),
        ("rate", {}, "got neither"),
        ("rate", {"lr": 1e-4, "factor": 2}, "got both"),
        ("rate", {"lr": 0}, "must be a number above 0, and got 0"),
        ("rate", {"lr": -1e-4}, "above 0"),
        ("rate", {"lr": float("nan")}, "above 0"),
        ("rate", {"factor": float("inf")}, "above 0"),
        ("rate", {"lr": "much"}, "above 0, and got 'much'"),
        ("rate", {"lr": True}, "above 0"),
        ("rate", {"lr": 1e-4, "optimizer": 3}, "name of one"),
        ("rate", {"lr": 1e-4, "warmup": 3}, "'warmup' is no argument of it; it takes lr, factor, optimizer"),
    ],
)
def test_what_is_no_command_is_refused_before_it_is_given(run, command, arguments, told):
    with pytest.raises(RunError, match=told):
        post(run, command, arguments, by="ctl")
    assert not (run / "inbox").exists()


def test_all_commands_are_known_and_only_the_rate_takes_anything():
    assert set(COMMANDS) == {"pause", "resume", "stop", "save", "validate", "sample", "rate"}
    assert all(checked(name, {}) == {} for name in COMMANDS if name != "rate")
    assert checked("rate", {"factor": 2}) == {"factor": 2.0, "optimizer": None}


# ---- Files that are no commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no JSON"),
        (b'{"command": "pau', "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 50_000, "no JSON"),
        (b'["pause"]', "no JSON object"),
        (b'{"command": 3}', "no JSON object"),
        (b" " * 70_000, "at most 65536 bytes"),
        (b'{"command": "sotp"}', "Did you mean 'stop'"),
        (b'{"command": "rate", "arguments": {"lr": 0}}', "above 0"),
        (b'{"command": "rate", "arguments": [1]}', "arguments are named"),
        (b'{"command": "rate", "arguments": {"lr": NaN}}', "above 0"),
    ],
)
def test_a_file_that_is_no_command_is_taken_away_with_the_reason(run, content, told):
    inbox = Inbox(run)
    (inbox.folder / "1.json").write_bytes(content)
    (command,) = inbox.take()
    assert command.id == "1" and told in command.refusal
    assert not inbox.waiting()


def test_a_pipe_a_folder_and_a_link_out_of_the_run_are_not_opened(run, tmp_path):
    inbox = Inbox(run)
    secret = tmp_path / "secret"
    secret.write_text('{"command": "stop"}')
    os.mkfifo(inbox.folder / "1.json")
    (inbox.folder / "2.json").mkdir()
    (inbox.folder / "3.json").symlink_to(secret)
    taken = inbox.take()
    assert [command.command for command in taken] == ["unreadable"] * 3
    assert secret.exists()
    assert not inbox.waiting() and inbox.take() == []  # the folder stays, and is answered once


def test_drafts_and_files_of_other_kinds_are_left_alone(run):
    inbox = Inbox(run)
    (inbox.folder / ".tmp-1234-5.json").write_text("{")
    (inbox.folder / "notes.txt").write_text("hello")
    assert not inbox.waiting() and inbox.take() == []
    assert len(os.listdir(inbox.folder)) == 2


# ---- Whom it reaches -----------------------------------------------------------------------------------------------


def claimed_by(folder: Path, **facts: Any) -> Path:
    folder.mkdir(exist_ok=True)
    own = {"pid": os.getpid(), "born": None, "host": platform.node(), "started": time.time()}
    (folder / "process.rank0.json").write_text(json.dumps({**own, **facts}))
    return folder


def test_where_nobody_trains_no_command_is_left(tmp_path):
    (tmp_path / "quiet").mkdir()
    with pytest.raises(RunError, match="nobody trains here now"):
        post(tmp_path / "quiet", "pause", {}, by="ctl")
    with pytest.raises(RunError, match=r"no such run\. Did you mean 'quiet'"):
        post(tmp_path / "qiuet", "pause", {}, by="ctl")
    with pytest.raises(RunError, match="There is no folder"):
        post(tmp_path / "none" / "quiet", "pause", {}, by="ctl")
    claimed_by(tmp_path / "torn", pid="x")
    (tmp_path / "torn" / "process.rank0.json").write_text('{"pid": 1')
    with pytest.raises(RunError, match="damaged"):
        post(tmp_path / "torn", "pause", {}, by="ctl")


def test_a_process_that_was_killed_hears_nothing_nor_does_another_under_its_number(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = claimed_by(tmp_path / "run", pid=child.pid)
    post(folder, "pause", {}, by="ctl")
    claimed_by(folder, pid=child.pid, born="1")
    with pytest.raises(RunError, match="ended without signing off"):
        post(folder, "pause", {}, by="ctl")
    claimed_by(folder, pid=child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked how it ended: a zombie
    with pytest.raises(RunError, match="ended without signing off"):
        post(folder, "pause", {}, by="ctl")
    child.wait()


def test_a_trainer_on_another_host_is_told_through_the_shared_folder(tmp_path):
    folder = claimed_by(tmp_path / "run", pid=1, born="1", host="elsewhere")
    identity = post(folder, "save", {}, by="ctl")
    assert (folder / "inbox" / f"{identity}.json").is_file()


def test_a_run_of_another_user_is_named_so(tmp_path):
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = claimed_by(Path(open_to_all))
        Inbox(folder)
        os.chmod(open_to_all, 0o555)
        os.chmod(folder / "inbox", 0o555)
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write everywhere, nobody may not
            try:
                post(folder, "save", {}, by="ctl")
            except RunError as refused:
                os._exit(7 if "as the user who trains there" in str(refused) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.chmod(open_to_all, 0o755)
        os.chmod(folder / "inbox", 0o755)


def test_an_inbox_that_is_no_folder_is_told_in_words(run):
    (run / "inbox").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        post(run, "save", {}, by="ctl")


def test_neither_commands_nor_their_answers_need_torch():
    code = "import sys, weft.run.inbox, weft.cli.ctl; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
