"""Several hosts: two network namespaces, each with an address and a host name of its own, joined by a cable."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.small import merged
from weft.run.listeners import read_events

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = tuple(f"weft{os.getpid()}{letter}" for letter in "ab")


def can_make_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    made = subprocess.run(["ip", "netns", "add", f"{NAMES[0]}t"], capture_output=True, check=False).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", f"{NAMES[0]}t"], check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root, `ip netns` and `unshare` of Linux"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two hosts that reach each other, and nothing else."""
    for name in NAMES:
        ip("netns", "add", name)
    try:
        ip("link", "add", "veth0", "netns", NAMES[0], "type", "veth", "peer", "name", "veth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "veth0", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name)


class Host:
    """weft train on one of the hosts, with all its processes in one group."""

    def __init__(self, number: int, config: Path, log: Path, python: str) -> None:
        options = ["--processes", "1", "--nodes", "1:2", "--node-rank", str(number), "--patience", "3",
                   "--rendezvous", f"{ADDRESSES[0]}:29400"]  # fmt: skip
        command = [python, "-m", "weft", "train", *options, str(config)]
        shell = 'hostname "$0" && exec "$@"'
        within = ["ip", "netns", "exec", NAMES[number], "unshare", "--uts", "sh", "-c", shell, f"host{number}"]
        self.number, self.log = number, log
        with log.open("a") as out:
            self.process = subprocess.Popen([*within, *command], stdout=out, stderr=out, start_new_session=True)

    def lose(self) -> None:
        """End every process of the host at once, as when its power is gone."""
        listed = subprocess.run(["ip", "netns", "pids", NAMES[self.number]], capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait()


def until(there: Callable[[], Any], hosts: list[Host], seconds: float = 150) -> Any:
    """Wait for something true. Fails with what the hosts said."""
    end = time.monotonic() + seconds
    while not (found := there()):
        if time.monotonic() > end or hosts[0].process.poll() is not None:
            pytest.fail("\n".join(f"---- {host.log.name}\n{host.log.read_text()}" for host in hosts))
        time.sleep(0.1)
    return found


def starts(run: Path) -> list[dict[str, Any]]:
    """The beginnings of the run so far: each with its world and its step."""
    log = run / "events.rank0.jsonl"
    return [event for event in read_events(log) if event["event"] == "run_started"] if log.is_file() else []


def steps(run: Path) -> int:
    return sum(event["event"] == "step" for event in read_events(run / "events.rank0.jsonl"))


@pytest.mark.timeout(600)
def test_a_host_is_cut_off_and_comes_back_and_the_run_goes_on_from_its_checkpoints(
    cable, run_yaml, tmp_path, quick_python
):
    plain = yaml.safe_load(run_yaml.read_text())
    schedule = {"steps": 100_000, "global_batch": 4}
    run_yaml.write_text(yaml.safe_dump(merged(plain, {"schedule": schedule, "save": {"every": 5}})))
    run = tmp_path / "runs" / "run"
    hosts = [Host(number, run_yaml, tmp_path / f"host{number}.log", sys.executable) for number in (0, 1)]
    try:
        until(lambda: starts(run), hosts)
        until(lambda: (run / "checkpoints" / "global_step_5").is_dir(), hosts)
        assert [start["world"] for start in starts(run)] == [2]

        ip("-n", NAMES[1], "link", "set", "veth0", "down")
        hosts[1].lose()
        until(lambda: len(starts(run)) == 2, hosts)
        alone = starts(run)[1]
        assert alone["world"] == 1 and alone["step"] >= 5 and alone["step"] % 5 == 0
        done = steps(run)
        until(lambda: steps(run) > done, hosts)
        assert "gave no sign of life" in hosts[0].log.read_text()

        ip("-n", NAMES[1], "link", "set", "veth0", "up")
        hosts[1] = Host(1, run_yaml, tmp_path / "host1.again.log", quick_python)
        until(lambda: len(starts(run)) == 3, hosts)
        again = starts(run)[2]
        assert again["world"] == 2 and again["step"] > alone["step"]
        done = steps(run)
        until(lambda: steps(run) > done, hosts)

        for host in hosts:
            host.process.send_signal(signal.SIGTERM)
        assert [host.process.wait(60) for host in hosts] == [143, 143], hosts[0].log.read_text()
        last = list(read_events(run / "events.rank0.jsonl"))[-1]
        assert last["outcome"] == "stopped" and (run / "checkpoints" / f"global_step_{last['step']}").is_dir()
    finally:
        for host in hosts:
            if host.process.poll() is None:
                host.lose()
