"""An interpreter that starts at once: `python -m MODULE` as a fork of a server that has imported all it needs.

A real one takes six to nine seconds of processor time before weft trains. Its path stands where a path of Python's
is asked for: as `sys.executable` of a `Program` and in torch's launchers by PYTHON_EXEC. At least one test of each
story starts a real one.
"""

import ctypes
import faulthandler
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tests.multi import PRELOADED
from weft.cli.launched import LAUNCHER

LARGEST = 2**17  # bytes of one message: arguments and environment
NAMESPACES = ("net", "uts")
# What is started in the place of Python. It passes signals on, and ends as the fork ends.
STARTED = """#!{python} -IS
import json, os, signal, socket, sys
unbuffered = sys.argv[1:2] == ["-u"]
arguments = sys.argv[1 + unbuffered :]
if arguments[:1] != ["-m"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({path!r})
asked = dict(arguments=arguments[1:], environment=dict(os.environ), folder=os.getcwd(), pid=os.getpid(),
             parent=os.getppid(), unbuffered=unbuffered, executable={executable!r})
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
pid = int(server.recv(32))
for number in passed_on:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
code = int(server.recv(32))
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """The path of a program that takes `-m MODULE ...` as Python does."""
    executable, path = folder / "python", folder / "socket"
    executable.write_text(STARTED.format(python=sys.executable, path=str(path), executable=str(executable)))
    executable.chmod(0o755)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen(32)
        server = context.Process(target=_serve, args=(listening,), daemon=True)
        server.start()
    try:
        yield executable
    finally:
        server.kill()
        server.join()


def _serve(listening: socket.socket) -> None:
    """The life of the server; also that of each program, which leaves it by SystemExit."""
    gc.freeze()  # or the first collection would touch, and so copy, every object that was preloaded
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _guard(connection)
        connection.close()


def _reap(number: int, frame: FrameType | None) -> None:
    """Leave no zombies; what is waited for also counts in the processor time of the tests."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _guard(connection: socket.socket) -> None:
    """Starts one program, and stays beside it: to tell how it ended, or to end it when nobody waits for it any more."""
    said, handles, _, _ = socket.recv_fds(connection, LARGEST, 3)
    if not said:
        os._exit(0)
    asked = json.loads(said)
    environment = asked["environment"]
    if environment.get(LAUNCHER) == str(asked["parent"]):
        environment[LAUNCHER] = str(os.getpid())  # whose child a rank is to be
    ready, waits = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(waits)
        os.read(ready, 1)
        connection.close()
        _become(asked, environment, handles)
    connection.send(str(pid).encode())
    os.close(waits)
    for handle in handles:
        os.close(handle)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.send(str(code).encode())
    except BrokenPipeError:  # nobody waits
        os._exit(1)
    os._exit(0)


def _become(asked: Mapping[str, Any], environment: Mapping[str, str], handles: Sequence[int]) -> None:
    """`python -m` with the arguments asked for. Raises SystemExit, which ends the process with its code."""
    os.setsid()
    _enter_namespaces(asked["pid"])
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(environment)
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    lines = 1 if asked["unbuffered"] or environment.get("PYTHONUNBUFFERED") else -1
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process, as the two below
    sys.stdout = open(1, "w", lines, "utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    faulthandler.enable()
    sys.executable = asked["executable"]
    sys.path.insert(0, asked["folder"])
    sys.argv = list(asked["arguments"])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def _enter_namespaces(pid: int) -> None:
    """Those of the process that was started in this one's place."""
    for kind in NAMESPACES:
        if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
            handle = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(handle, 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), kind)
            os.close(handle)
