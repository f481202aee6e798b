"""The quick interpreter of the tests: what it starts behaves as what Python starts."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interpreter import interpreter

TOLD = """import os, signal, sys
print(sys.argv[1:], os.getcwd(), os.environ["ASKED"])
print("to the other", file=sys.stderr)
word = sys.stdin.readline().strip()
if word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    print("waits")
    signal.pause()
if word == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "raise":
    raise ValueError("so")
sys.exit(3)
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with interpreter(tmp_path_factory.mktemp("quick")) as path:
        yield str(path)


def started(python: str, folder: Path) -> "subprocess.Popen[str]":
    (folder / "told.py").write_text(TOLD)
    environment = {**os.environ, "ASKED": "yes"}
    command = [python, "-u", "-m", "told", "a $5 word"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=-1, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("word", ["", "die", "raise"])
def test_it_tells_and_ends_as_python_does(quick, tmp_path, word):
    ends = []
    for python in (quick, sys.executable):
        process = started(python, tmp_path)
        out, err = process.communicate(f"{word}\n", timeout=60)
        ends.append((process.returncode, out, err.splitlines()[0], err.splitlines()[-1]))
    assert ends[0] == ends[1]
    assert ends[0][0] == {"": 3, "die": -signal.SIGKILL, "raise": 1}[word]


def test_a_signal_reaches_what_it_runs_and_an_end_by_force_ends_it_too(quick, tmp_path):
    for number, code in ((signal.SIGTERM, 9), (signal.SIGKILL, -signal.SIGKILL)):
        process = started(quick, tmp_path)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("wait\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)][1] == "waits\n"
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stdout.read() == ""  # its end is closed: nobody holds it any more


def test_what_is_no_module_is_started_by_python_itself(quick):
    assert subprocess.check_output([quick, "-c", "import sys; print(sys.argv)", "x"], text=True) == "['-c', 'x']\n"
