"""weft train --gpus N: one run on several processes of this host, and of others; their end is told in one place."""

import os
import platform
import shlex
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.engines.elastic import Ending, Failure, Hosts
    from weft.run.config import RunConfig

PORT = 29500  # of the rendezvous, where MASTER_PORT does not say
PATIENCE = 30  # seconds
RESTARTS_OF_SEVERAL = 3
ELSEWHERE = "192.0.2.1"  # of TEST-NET-1, RFC 5737: no host has it, but there is a way to it
SIOCGIFADDR = 0x8915  # ioctl(2): the address of a network interface


@dataclass(frozen=True)
class Asked:
    """The options of weft train that join processes, as they were given; None where not."""

    gpus: str | None = None
    processes: int | None = None
    nodes: str | None = None
    node_rank: int | None = None
    rendezvous: str | None = None
    restarts: int | None = None
    patience: int | None = None

    def words(self) -> list[str]:
        """The same on a command line."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if value is not None}
        return [f"--{name}={value}" for name, value in given.items()]

    def joining(self) -> str:
        """The first option that means one run on several processes; none: ''."""
        return next((word.partition("=")[0] for word in self.words() if not word.startswith("--processes")), "")


def train_together(path: Path, overrides: Sequence[str], asked: Asked) -> int:
    """Train on this host's part of the processes. Exit codes are those of one process; see docs/guides."""
    from weft.run.config import load_config

    refuse_nested(os.environ)
    config = load_config(path, overrides)
    number = processes_here(config, asked)
    hosts = hosts_of(config, asked, os.environ)
    check_sizes(config, number, hosts)

    from weft.engines.elastic import Workers, run_workers

    restarts = asked.restarts if asked.restarts is not None else RESTARTS_OF_SEVERAL * (hosts.most > 1)
    set_defaults(number, hosts)
    logs = config.folder / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}.{platform.node()}"
    command = [sys.executable, "-m", "weft", "train", str(path), *overrides]
    ending = run_workers(Workers(command, number, restarts, logs), hosts, say)
    again = shlex.join(["weft", "train", *asked.words(), str(path), *overrides])
    return conclude(ending, again, logs)


# ---- What was asked for -------------------------------------------------------------------------------------------


def refuse_nested(environment: Mapping[str, str]) -> None:
    """Raises ConfigError when another launcher has started this process already."""
    if int(environment.get("WORLD_SIZE", "1")) > 1 and "RANK" in environment:
        raise ConfigError(
            f"--gpus and its like start processes, and this one is already rank {environment['RANK']} of "
            f"{environment['WORLD_SIZE']} of another launcher. Leave them out, or the launcher."
        )


def processes_here(config: "RunConfig", asked: Asked) -> int:
    """How many processes this host starts. Raises ConfigError when that cannot be."""
    from weft.engines.visible import gpus_here

    if asked.gpus is not None and asked.processes is not None:
        raise ConfigError("--gpus starts a process for each GPU, and --processes so many on the processor. Choose one.")
    seen = 0 if config.engine.device == "cpu" else len(gpus_here(identify=False).gpus)
    if asked.processes is not None:
        return processes_on_cpu(config, asked.processes, seen)
    if config.engine.device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"engine.device: '{config.engine.device}' is one device, and --gpus gives each process its own. Write "
            "engine.device=auto, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if not seen:
        why = "engine.device is cpu" if config.engine.device == "cpu" else "torch sees no GPU (weft doctor says why)"
        wanted = asked.gpus if (asked.gpus or "").isdecimal() else "2"
        raise ConfigError(
            f"--gpus: {why}. To train on the processor: weft train --processes {wanted} RUN.yaml engine.device=cpu"
        )
    if asked.gpus in (None, "all"):
        return seen
    if not asked.gpus.isdecimal() or int(asked.gpus) < 1:
        raise ConfigError(f"--gpus: expected a number from 1 to {seen} or 'all', got '{asked.gpus}'.")
    if int(asked.gpus) > seen:
        raise ConfigError(f"--gpus: {asked.gpus} were asked for, and {seen} are visible. Write --gpus all for these.")
    return int(asked.gpus)


def processes_on_cpu(config: "RunConfig", number: int, seen: int) -> int:
    if number < 1:
        raise ConfigError(f"--processes: {number} is none.")
    if seen or config.engine.device not in ("auto", "cpu"):
        raise ConfigError(
            f"--processes is for the processor, and engine.device is '{config.engine.device}' with {seen} visible "
            f"GPUs. Write --gpus {min(number, seen) or number}, or engine.device=cpu."
        )
    return number


def hosts_of(config: "RunConfig", asked: Asked, environment: Mapping[str, str]) -> "Hosts":
    """The hosts, and where they meet. Raises ConfigError when that is not said."""
    from weft.engines.elastic import Hosts

    least, most = sizes(asked.nodes or "1")
    patience = PATIENCE if asked.patience is None else asked.patience
    if patience < 3:
        raise ConfigError(f"--patience: {patience} s are too few to tell a lost host from a slow one. Write 3 or more.")
    if most == 1:
        if odd := [name for name in ("node_rank", "rendezvous") if getattr(asked, name) is not None]:
            raise ConfigError(f"--{odd[0].replace('_', '-')} is for several hosts. Say how many: --nodes 2.")
        return Hosts(config.name, patience=patience)
    endpoint = asked.rendezvous
    if endpoint is None and "MASTER_ADDR" in environment:
        endpoint = f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', PORT)}"
    if endpoint is None:
        raise ConfigError(
            f"--nodes: {most} hosts must know where to meet. Write --rendezvous FIRST:{PORT} with the first host's "
            "address, the same on each, or set MASTER_ADDR."
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--rendezvous: expected HOST:PORT, such as 10.0.0.1:{PORT}, got '{endpoint}'.")
    number = asked.node_rank if asked.node_rank is not None else environment.get("NODE_RANK")
    if number is not None and not 0 <= int(number) < most:
        raise ConfigError(f"--node-rank: {number} is none of 0 to {most - 1}.")
    is_host = None if number is None else int(number) == 0
    return Hosts(config.name, least, most, endpoint, is_host, own_address(host, int(port)), patience)


def sizes(nodes: str) -> tuple[int, int]:
    """Least and most hosts of '2' or '1:2'."""
    least, colon, most = nodes.partition(":")
    if not least.isdecimal() or (colon and not most.isdecimal()) or not 1 <= int(least) <= int(most or least):
        raise ConfigError(f"--nodes: expected a number, or MIN:MAX such as 1:4, got '{nodes}'.")
    return int(least), int(most or least)


def check_sizes(config: "RunConfig", number: int, hosts: "Hosts") -> None:
    """Raises ConfigError for numbers of processes that the config cannot share its work among."""
    for count in range(hosts.least, hosts.most + 1):
        config.parallel.resolved(count * number)
    if hosts.elastic and config.schedule.global_batch is None:
        raise ConfigError(
            f"--nodes {hosts.least}:{hosts.most} changes the number of processes within the run, and a step must keep "
            "its items. Write schedule.global_batch=N, the items of a step on all processes together."
        )


# ---- This host ----------------------------------------------------------------------------------------------------


def own_address(host: str, port: int) -> str | None:
    """This host's address on the way to the rendezvous; None when there is no way that can be seen."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # a datagram socket sends nothing here
            if (own := probe.getsockname()[0]).startswith("127."):  # as the first host, which no other reaches so
                probe.connect((ELSEWHERE, port))
                own = probe.getsockname()[0]
            return own
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The network interface that has an address. None off Linux."""
    if sys.platform != "linux":
        return None
    import fcntl  # Windows has none

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def set_defaults(number: int, hosts: "Hosts") -> None:
    """What the ranks are to find in their environment, unless the user has said otherwise."""
    # Every process would start a thread for each core, and they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    # gloo takes the interface of the host's name, which on many machines is the loopback.
    if hosts.most > 1 and hosts.address and (name := interface_of(hosts.address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


# ---- The end ------------------------------------------------------------------------------------------------------


def conclude(ending: "Ending", again: str, logs: Path) -> int:
    """Say how it ended, and give its exit code."""
    problems = dict.fromkeys(problem for failure in ending.failures for problem in failure.problems)
    for problem in problems:
        ranks = [failure.rank for failure in ending.failures if problem in failure.problems]
        say(f"error: {problem}" if 0 in ranks else f"[rank {ranks[0]}] error: {problem}")
    if problems:
        return 2
    if ending.failures and not ending.stopped:
        for line in account(ending.failures, logs):
            say(line)
        return ending.failures[0].code
    if ending.lost:
        say(f"error: a host was lost, and too few are left or --restarts is used up. To go on:\n  {again}")
        return 1
    if ending.stopped:
        say(f"To go on, run the same command again:\n  {again}")
        return 128 + (ending.heard or signal.SIGTERM)
    return 0


def account(failures: "Sequence[Failure]", logs: Path) -> list[str]:
    """The failed ranks in one block, causes before consequences."""
    host = platform.node()
    causes = [failure for failure in failures if not failure.lost_peer] or failures[:1]
    lines = []
    first = causes[0]
    if first.log and first.log.suffix == ".trace" and all(failure.rank for failure in causes):
        lines = [f"[rank {first.rank}] {line}" for line in first.log.read_text("utf-8").splitlines()]
    lines += [f"error: {len(causes)} of this host's processes failed, and all were ended."]
    for failure in causes:
        place = f"; its output: {failure.log}" if failure.log else ""
        lines.append(f"  rank {failure.rank} on {host} (process {failure.pid}, exit code {failure.code}){place}")
        lines.append(f"    {failure.said}")
    if all(failure.lost_peer for failure in failures):
        lines.append("  The cause is on another host: see the output there.")
    lines.append(f"  Logs: {logs}. To begin again from the newest checkpoint by itself: --restarts 3.")
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
