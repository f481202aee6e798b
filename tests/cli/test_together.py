"""`weft train --gpus N`: what is asked for, what is refused, and how the end is told; and one rank's part in it."""

import json
import signal
from pathlib import Path

import pytest

from weft.cli.launched import Rank, as_rank, own_rank
from weft.cli.main import main
from weft.cli.together import Asked, check_sizes, conclude, hosts_of, processes_here, refuse_nested, sizes
from weft.cli.train import StopRequest
from weft.engines.elastic import Ending, Failure
from weft.engines.visible import Gpu, Visible
from weft.errors import ConfigError, DataError, RunError
from weft.run.config import load_config


@pytest.fixture
def two_gpus(monkeypatch):
    gpus = tuple(Gpu(i, i, str(i), None, "H100", i) for i in range(2))
    monkeypatch.setattr("weft.engines.visible.gpus_here", lambda identify: Visible(gpus))


# ---- What is asked for ---------------------------------------------------------------------------------------------


def test_gpus_are_those_that_are_visible(run_yaml, two_gpus):
    config = load_config(run_yaml, ["engine.device=auto"])
    assert [processes_here(config, Asked(gpus=gpus)) for gpus in ("1", "2", "all")] == [1, 2, 2]
    assert processes_here(config, Asked(nodes="2", rendezvous="a:1")) == 2
    with pytest.raises(ConfigError, match=r"--gpus: 3 were asked for, and 2 are visible"):
        processes_here(config, Asked(gpus="3"))
    with pytest.raises(ConfigError, match=r"--gpus: expected a number from 1 to 2 or 'all', got 'two'"):
        processes_here(config, Asked(gpus="two"))
    with pytest.raises(ConfigError, match="--processes is for the processor"):
        processes_here(config, Asked(processes=2))


def test_without_a_gpu_the_command_for_the_processor_is_told(run_yaml):
    told = r"engine\.device is cpu\. To train on the processor: weft train --processes 4 RUN\.yaml engine\.device=cpu"
    with pytest.raises(ConfigError, match=told):
        processes_here(load_config(run_yaml), Asked(gpus="4"))
    assert processes_here(load_config(run_yaml), Asked(processes=3)) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "2", "--independent"], "--gpus joins processes in one run, and --independent parts them"),
        (["--nodes", "2", "--independent"], "--nodes joins processes in one run"),
        (["--gpus", "2", "--processes", "2"], "--gpus starts a process for each GPU"),
        (["--processes", "0"], "--processes: 0 is none"),
        (["--processes", "2", "--node-rank", "0"], "--node-rank is for several hosts"),
        (["--processes", "2", "--nodes", "2"], "--nodes: 2 hosts must know where to meet"),
        (["--processes", "2", "--nodes", "2", "--rendezvous", "first"], "--rendezvous: expected HOST:PORT"),
        (["--processes", "2", "--nodes", "3:2"], "--nodes: expected a number, or MIN:MAX"),
        (["--processes", "2", "--nodes", "2", "--node-rank", "2", "--rendezvous", "a:1"], "--node-rank: 2 is none of"),
        (["--processes", "2", "--patience", "1"], "--patience: 1 s are too few"),
        (["--processes", "4", "parallel.shard=3"], "parallel: "),
        (["--processes", "1", "--nodes", "1:2", "--rendezvous", "localhost:1"], "schedule.global_batch=N"),
    ],
)
def test_what_cannot_be_is_refused_once_before_any_process_starts(run_yaml, capsys, monkeypatch, words, told):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["train", str(run_yaml), *words]) == 2
    assert told in (said := capsys.readouterr().err) and said.count("error: ") == 1


def test_all_mistakes_of_a_config_are_told_at_once_and_once_for_all_processes(run_yaml, capsys):
    assert main(["train", "--processes", "2", str(run_yaml), "adapter.rnak=4", "schedule.steps=0"]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 2 and "rnak" in said and "schedule.steps" in said


def test_hosts_meet_where_the_option_or_else_the_environment_says(run_yaml):
    config, environment = load_config(run_yaml), {"MASTER_ADDR": "10.0.0.9", "NODE_RANK": "1"}
    found = hosts_of(config, Asked(nodes="2"), environment)
    assert (found.endpoint, found.is_host, found.least, found.most) == ("10.0.0.9:29500", False, 2, 2)
    found = hosts_of(config, Asked(nodes="1:4", node_rank=0, rendezvous="10.0.0.1:400"), environment)
    assert (found.endpoint, found.is_host, found.least, found.most) == ("10.0.0.1:400", True, 1, 4)
    assert hosts_of(config, Asked(), environment).endpoint == "127.0.0.1:0"  # one host meets nobody
    assert sizes("3") == (3, 3)


def test_every_number_of_hosts_must_fit_the_layout(run_yaml):
    config = load_config(run_yaml, ["parallel.shard=4", "schedule.global_batch=8"])
    fits = hosts_of(config, Asked(nodes="2:3", rendezvous="10.0.0.1:400"), {})
    check_sizes(config, 4, fits)
    with pytest.raises(ConfigError, match=r"parallel: .*6 were started"):
        check_sizes(config, 2, fits)


def test_processes_are_not_started_within_another_launchers(capsys):
    with pytest.raises(ConfigError, match="already rank 1 of 4 of another launcher"):
        refuse_nested({"RANK": "1", "WORLD_SIZE": "4"})
    refuse_nested({"RANK": "0", "WORLD_SIZE": "1"})


# ---- One rank ------------------------------------------------------------------------------------------------------


def test_a_rank_is_what_its_launcher_says(tmp_path):
    assert own_rank({}) == Rank() and own_rank({}).alone
    assert own_rank({"RANK": "3", "WORLD_SIZE": "4"}) == Rank(3, 4)
    assert own_rank({"WEFT_OUTCOME": str(tmp_path)}).outcome == tmp_path
    with pytest.raises(ConfigError, match="RANK is 'x' and WORLD_SIZE '2', and both must be numbers"):
        own_rank({"RANK": "x", "WORLD_SIZE": "2"})


@pytest.fixture
def of_ours(tmp_path, monkeypatch) -> Rank:
    """Rank 1 of `weft train --gpus 2`, whose launcher is this very test."""
    monkeypatch.setattr("weft.cli.launched.end_with_parent", lambda: None)
    return Rank(1, 2, tmp_path / "rank1.outcome")


def outcome(rank: Rank) -> dict:
    assert rank.outcome is not None
    return json.loads(rank.outcome.read_text())


def test_a_stopped_rank_ends_well_and_leaves_word_for_its_launcher_does_not_end_the_others(of_ours):
    assert as_rank(of_ours, lambda: 143) == 0 and outcome(of_ours) == {"stopped": True}
    assert as_rank(of_ours, lambda: 0) == 0 and outcome(of_ours) == {"stopped": False}


def raises(error: Exception):
    def work() -> int:
        raise error

    return work


def test_a_mistake_is_left_to_the_launcher_with_all_its_problems(of_ours, capsys):
    assert as_rank(of_ours, raises(ConfigError("a: wrong.", "b: wrong too."))) == 2
    assert outcome(of_ours) == {"said": "a: wrong.", "problems": ["a: wrong.", "b: wrong too."]}
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_leaves_its_trace_in_a_file(of_ours, capsys):
    assert as_rank(of_ours, raises(ValueError("bad shape"))) == 1
    assert outcome(of_ours)["said"] == "ValueError: bad shape"
    assert "Traceback" in of_ours.outcome.with_suffix(".trace").read_text() and capsys.readouterr().err == ""


def test_a_lost_peer_is_no_fault_of_this_rank(of_ours, capsys):
    gloo = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    wrapped = RunError("the checkpoint could not be written")
    wrapped.__cause__ = gloo
    for error in (gloo, wrapped):
        assert as_rank(of_ours, raises(error)) == 1 and outcome(of_ours)["lost_peer"]
    assert as_rank(Rank(1, 2), raises(gloo)) == 1
    assert capsys.readouterr().err.startswith("[rank 1] error: another process of this run has ended")


def test_under_another_launcher_without_a_store_each_rank_tells_its_mistake(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert as_rank(Rank(1, 2), raises(DataError("no clips."))) == 2
    assert capsys.readouterr().err == "[rank 1] error: no clips.\n"
    with pytest.raises(DataError):
        as_rank(Rank(0, 2), raises(DataError("no clips.")))


def test_a_process_alone_is_as_before():
    assert as_rank(Rank(), lambda: 130) == 130
    with pytest.raises(DataError):
        as_rank(Rank(), raises(DataError("no clips.")))


def test_the_same_sigterm_within_moments_is_heard_once_and_a_second_ctrl_c_ends():
    request = StopRequest(silent=True)
    request._hear(signal.SIGTERM, None)
    request._hear(signal.SIGTERM, None)
    assert request() and request.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        request._hear(signal.SIGINT, None)


# ---- The end -------------------------------------------------------------------------------------------------------


def failure(rank: int, code: int = 1, *problems: str, lost_peer: bool = False, log: Path | None = None) -> Failure:
    return Failure(rank, 100 + rank, code, "ValueError: bad shape", lost_peer, log, problems)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (Ending(), 0),
        (Ending(heard=signal.SIGTERM), 0),  # it was just finishing
        (Ending(stopped=True, heard=signal.SIGINT), 130),
        (Ending(stopped=True, heard=signal.SIGTERM), 143),
        (Ending(stopped=True), 143),  # another host was asked
        (Ending((failure(1, 137),)), 137),
        (Ending((failure(0, 2, "no clips."),)), 2),
        (Ending(lost=True), 1),
    ],
)
def test_exit_codes_are_those_of_one_process(ending, code, tmp_path):
    assert conclude(ending, "weft train", tmp_path) == code


def test_one_mistake_of_all_ranks_is_told_once_and_one_ranks_own_under_its_number(tmp_path, capsys):
    ending = Ending((failure(1, 2, "no clips.", "no disk."), failure(0, 2, "no clips.")))
    assert conclude(ending, "weft train", tmp_path) == 2
    assert capsys.readouterr().err == "error: no clips.\n[rank 1] error: no disk.\n"


def test_a_failure_is_one_block_with_the_cause_its_place_and_what_to_do(tmp_path, capsys):
    trace = tmp_path / "rank3.trace"
    trace.write_text("Traceback\n  line 7\nValueError: bad shape\n")
    ending = Ending((failure(3, log=trace), failure(0, lost_peer=True)))
    assert conclude(ending, "weft train", tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["[rank 3] Traceback", "[rank 3]   line 7", "[rank 3] ValueError: bad shape"]
    assert said[3] == "error: 1 of this host's processes failed, and all were ended."
    assert "rank 3 on " in said[4] and f"(process 103, exit code 1); its output: {trace}" in said[4]
    assert said[5].strip() == "ValueError: bad shape" and "--restarts 3" in said[6]


def test_when_all_lost_a_peer_the_cause_is_on_another_host(tmp_path, capsys):
    conclude(Ending((failure(0, lost_peer=True), failure(1, lost_peer=True))), "weft train", tmp_path)
    assert "The cause is on another host" in capsys.readouterr().err
