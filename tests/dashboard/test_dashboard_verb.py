"""`weft dashboard` and `weft train --dashboard`: ports, the URL, one server for a folder, and its end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.dashboard.folders import finished
from tests.dashboard.serving import Dashboard, Listener, Place
from weft.cli.dashboard import API_PORT, USUAL, start_beside, state_folder, tunnel
from weft.cli.main import main
from weft.dashboard.launch import all_standing
from weft.errors import ConfigError, RunError


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's memory of the test's own; dashboards that were left in the background end with it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path / "state"
    for standing in all_standing(tmp_path / "state" / "weft"):
        os.kill(standing.pid, signal.SIGTERM)


def test_help_needs_neither_server_nor_numbers():
    code = (
        "import sys; from weft.cli.main import main; assert main(['dashboard', '--help']) == 0; "
        "assert not {'starlette', 'uvicorn', 'numpy', 'torch', 'rich', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_it_says_where_page_and_api_are_and_ctrl_c_ends_it_at_once(runs, state):
    with Dashboard(runs, state) as served:
        assert served.page.ask("/api/runs").json["runs"] == []
        stream = Listener(served.page, "/api/live")
        stream.until("runs")
        assert [one.port for one in all_standing(state / "weft")] == [served.ports[0]]
        code, seconds = served.end(signal.SIGINT)
        assert code == 0 and seconds < 3 and served.errors == ""
        assert list(stream) == []
        stream.close()
    assert all_standing(state / "weft") == []


def test_a_new_token_is_made_only_when_asked_for_and_two_serve_side_by_side(runs, state):
    with Dashboard(runs, state) as first, Dashboard(runs, state, ("--port", "0", "--new-token")) as second:
        assert first.token != second.token and not set(first.ports) & set(second.ports)
        assert second.page.ask("/").status == first.page.ask("/").status == 200
        assert second.page.ask("/", Authorization=f"Bearer {first.token}").status == 401
        assert (state / "weft" / "dashboard-token").read_text().strip() == second.token


def test_a_port_where_it_serves_already_is_told_and_another_folder_s_is_refused(runs, state, capsys):
    other = runs.with_name("others")
    other.mkdir()
    with Dashboard(runs, state) as served:
        port, api_port = map(str, served.ports)
        assert main(["dashboard", str(runs), "--port", port]) == 0
        assert f":{port}/?token={served.token}" in capsys.readouterr().out
        assert main(["dashboard", str(other), "--port", port]) == 2
        assert f"--port: {port} is taken by your dashboard of {runs}" in capsys.readouterr().err
        assert main(["dashboard", str(runs), "--port", "0", "--api-port", api_port]) == 2
        assert f"--api-port: {api_port} is taken" in (said := capsys.readouterr().err) and "none for no API" in said
        assert main(["dashboard", str(runs), "--port", port, "--new-token"]) == 2
        assert f"kill {served.process.pid}" in capsys.readouterr().err


def test_a_port_of_another_program_is_told(runs, state, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["dashboard", str(runs), "--port", port]) == 2
    assert f"--port: {port} is taken by another program" in capsys.readouterr().err


def test_a_killed_dashboard_is_not_taken_for_one_that_serves(runs, state):
    with Dashboard(runs, state) as served:
        served.process.kill()
        os.waitid(os.P_PID, served.process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert all_standing(state / "weft") == [] and list((state / "weft" / "dashboards").iterdir())


def test_beside_a_training_it_serves_in_the_background_once_for_a_folder(runs, state, capsys):
    start_beside("0", runs)
    url = capsys.readouterr().out.removeprefix("dashboard: ").strip()
    ((standing,), token) = all_standing(state / "weft"), (state / "weft" / "dashboard-token").read_text().strip()
    assert url == f"http://127.0.0.1:{standing.port}/?token={token}" and os.getsid(standing.pid) == standing.pid
    assert Place(standing.port, token).ask("/api/runs").json["root"] == str(runs)
    for place in (USUAL, "0", str(standing.port)):
        start_beside(place, runs)
    assert capsys.readouterr().out.split() == ["dashboard:", url] * 3
    assert all_standing(state / "weft") == [standing]
    assert token not in (runs / "dashboard.log").read_text()


def test_beside_a_training_a_port_that_cannot_be_had_is_refused(runs, state):
    with pytest.raises(ConfigError, match="--dashboard: expected a port"):
        start_beside("x", runs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"--dashboard: .*{port} is taken by another program"):
            start_beside(str(port), runs)


def test_beside_a_training_the_api_takes_a_free_port_where_another_folders_dashboard_has_the_usual_one(runs, state):
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as usual:
        usual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # another program has it: as good
            usual.bind(("127.0.0.1", API_PORT))
            usual.listen()
        asked = other.getsockname()[1]
        other.close()
        start_beside(str(asked), runs)
    (standing,) = all_standing(state / "weft")
    assert standing.port == asked and standing.api_port not in (None, API_PORT)


def test_the_word_dashboard_takes_no_config_for_its_port(tmp_path, capsys):
    for words in (["--dashboard", "no.yaml"], ["no.yaml", "--dashboard", "a.b=1"], ["--dashboard=7021", "no.yaml"]):
        assert main(["train", *words]) == 2
        assert "no.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rusn"], "Did you mean 'runs'?"), (["a.txt"], "a.txt is a file"), (["no/runs"], "no folder 'no'"),
        (["runs", "--host", "no such host"], "--host: 'no such host' is no address"),
        (["runs", "--host", "192.0.2.1", "--port", "0"], "--host: '192.0.2.1' is no address"),
        (["runs", "--port", "70000"], "0 to 65535"), (["runs", "--idle-exit", "0"], "above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_told(tmp_path, state, monkeypatch, capsys, words, said):
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.setattr("weft.cli.dashboard.find_spec", lambda name: None if name == "uvicorn" else True)
    assert main(["dashboard", str(runs)]) == 2
    assert "pip install 'weft[ui]'" in capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_told_and_served_all_the_same(runs, state):
    state.mkdir()
    (state / "weft").write_text("a file, and no folder")
    with Dashboard(runs, state) as served:
        assert served.page.ask("/").status == 200 and "cannot be written" in served.errors
        assert served.token in served.text.partition("curl")[2]  # no file to read it from


def test_all_addresses_are_served_with_a_warning_and_still_only_with_the_token(runs, state):
    with Dashboard(runs, state, ("--port", "0", "--host", "0.0.0.0", "--allow-host", "gpu.lab")) as served:
        assert "plain http" in served.errors
        assert served.page.ask("/", Authorization=None).status == 401
        for host, status in (("10.1.2.3:1", 200), ("GPU.lab:1", 200), ("evil.example:1", 403)):
            assert served.page.ask("/", Host=host).status == status


def test_it_ends_when_nobody_watches_and_nothing_runs(runs, state):
    finished(runs, time.time())
    with Dashboard(runs, state, ("--port", "0", "--idle-exit", "1")) as served:
        stream = Listener(served.page, "/api/live")
        stream.until("runs")
        time.sleep(1.5)
        assert served.process.poll() is None  # somebody watches
        stream.close()
        assert served.process.wait(10) == 0


def test_from_another_machine_a_tunnel_is_named():
    there = {"SSH_CONNECTION": "10.0.0.9 51234 10.0.0.5 22", "USER": "ada"}
    assert tunnel(7020, there) == "ssh -N -L 7020:127.0.0.1:7020 ada@10.0.0.5" and tunnel(7020, {}) == ""


def test_the_memory_of_a_user_is_where_the_xdg_specification_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert state_folder({}) == Path("/home/ada/.local/state/weft")
    assert state_folder({"XDG_STATE_HOME": "/s"}) == Path("/s/weft")
    assert state_folder({"XDG_STATE_HOME": "relative"}) == Path("/home/ada/.local/state/weft")
