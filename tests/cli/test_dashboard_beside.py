"""`weft train --dashboard`: a training in the background, watched in a browser's words until it has ended."""

import os
import re
import signal
import time

import pytest

from tests.dashboard.serving import Listener, Place
from weft.cli.main import main
from weft.dashboard.launch import all_standing


@pytest.mark.slow
def test_a_training_is_watched_from_its_start_to_its_end(run_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert main(["train", "--dashboard=0", "--detach", str(run_yaml)]) == 0
    said = capsys.readouterr().out
    assert said.index("dashboard: http://127.0.0.1:") < said.index("trains in the background")
    found = re.search(r":(\d+)/\?token=([\w-]+)", said)
    assert found
    place = Place(int(found[1]), found[2])
    stream = Listener(place, f"/api/live?run=run&after={place.position('run')}")
    states, steps = [], []
    for heard in stream:
        if heard.name == "points":
            steps += [point["step"] for point in heard.data["points"]]
        elif heard.name == "run" and heard.data["state"] not in states:
            states.append(heard.data["state"])
        if states[-1:] == ["finished"] and steps[-1:] == [4]:
            break
    assert steps == [1, 2, 3, 4] and "crashed" not in states and "stalled" not in states
    (standing,) = all_standing(tmp_path / "state" / "weft")
    stream.close()
    os.kill(standing.pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while all_standing(tmp_path / "state" / "weft") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline
