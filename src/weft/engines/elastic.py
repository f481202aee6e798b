"""Torch's elastic agent on one host: it starts the ranks, passes a stop on, and begins again with those left."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from weft.engines.pulse import Pulse
from weft.engines.rank_logs import RankLogs, keep_agents_words
from weft.errors import RunError

GATHERING = 900  # seconds that hosts are waited for at the beginning
SAVING = 1800  # seconds that ranks may take to finish a step and save, when hosts come or go
ENDING = 10  # seconds, when there is nothing to save: a peer is lost, or the user has asked twice
REPEATED = 5  # seconds in which a second SIGTERM is the first one again: schedulers tell every process of a job
HANGUP = getattr(signal, "SIGHUP", None)  # a closed terminal; Windows has no such signal


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run and where they meet. least, most: how many; the run goes on with any number between.

    endpoint: HOST:PORT of the store through which they find each other; is_host: whether this host keeps it, None when
    that is to be seen from its address; address: under which the others reach this host. patience: seconds without a
    sign of life after which a host counts as lost.
    """

    run: str
    least: int = 1
    most: int = 1
    endpoint: str = "127.0.0.1:0"
    is_host: bool | None = True
    address: str | None = "127.0.0.1"
    patience: int = 30

    @property
    def elastic(self) -> bool:
        return self.least < self.most


@dataclass(frozen=True)
class Workers:
    """The processes of this host: their command, how many, how often they may begin again, and where logs stand."""

    command: Sequence[str]
    number: int
    restarts: int
    logs: Path


@dataclass(frozen=True)
class Failure:
    """A rank that failed. code: as a shell counts it, 128 + signal when killed. said: its last error in one line.
    lost_peer: it failed because another one had ended before. log: where its output stands; None: on the terminal.
    problems: what the user can mend, which the rank itself has not told."""

    rank: int
    pid: int
    code: int
    said: str
    lost_peer: bool
    log: Path | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How it ended. failures: causes before consequences. stopped: ended early by a signal, with everything saved.
    heard: the signal that this host was sent, 0 for none. lost: a host was lost and could not be done without."""

    failures: tuple[Failure, ...] = ()
    stopped: bool = False
    heard: int = 0
    lost: bool = False


def run_workers(workers: Workers, hosts: Hosts, tell: Callable[[str], None]) -> Ending:
    """Train on this host's ranks until all have ended. tell: hears in sentences why they begin again.

    Raises RunError when the hosts do not find each other.
    """
    # A store for each round of ranks: the one that agents may share keeps the keys of ranks that are gone, and the
    # address of a first host that is gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Only what none of our handlers hears: the agent's own answer to a signal ends ranks that still save.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    agent_log = keep_agents_words(workers.logs)
    logs = RankLogs(workers.logs)
    until = time.monotonic() + GATHERING
    handler: RendezvousHandler | None = None
    try:
        handler = met(hosts, until)
        command = [word.replace("$", "$$") for word in workers.command]  # the agent fills in ${local_rank}
        spec = WorkerSpec(
            role="rank", local_world_size=workers.number, entrypoint=command[0], args=tuple(command[1:]),
            rdzv_handler=handler, max_restarts=workers.restarts, monitor_interval=0.1, local_addr=hosts.address,
        )  # fmt: skip
        return Agent(spec, logs, hosts, tell).end()
    except (RendezvousClosedError, RendezvousTimeoutError, RendezvousConnectionError, DistError) as error:
        raise RunError(trouble(error, hosts)) from error
    finally:
        if handler is not None and not logs.leaves:
            handler.shutdown()
        agent_log.close()
        logs.tidy()


def met(hosts: Hosts, until: float) -> RendezvousHandler:
    """The rendezvous, once its store answers: another host may keep it and start later."""
    beat = max(1, hosts.patience // 6)
    while True:
        parameters = RendezvousParameters(
            backend="c10d", endpoint=hosts.endpoint, run_id=hosts.run, min_nodes=hosts.least, max_nodes=hosts.most,
            local_addr=hosts.address, join_timeout=GATHERING, last_call_timeout=hosts.patience, read_timeout=30,
            keep_alive_interval=beat, keep_alive_max_attempt=3,
            **({} if hosts.is_host is None else {"is_host": hosts.is_host}),
        )  # fmt: skip
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError:
            if hosts.is_host or time.monotonic() > until:
                raise
            time.sleep(1)


def trouble(error: Exception, hosts: Hosts) -> str:
    """A sentence on hosts that did not find each other."""
    if isinstance(error, RendezvousClosedError):
        return f"the run was ended on another host ({hosts.endpoint} is closed). Its output there says why."
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"fewer than {hosts.least} hosts came to {hosts.endpoint} in {GATHERING // 60} minutes. Start the same "
            "command on each, or lower --nodes."
        )
    return (
        f"the rendezvous at {hosts.endpoint} cannot be reached: {str(error).splitlines()[0]} Is the first host up, and "
        "is the port open? Start the same command again to join."
    )


class Agent(LocalElasticAgent):
    """Torch's agent with three answers of ours: to a stop, which is passed on and waited for, however long the saving
    takes; to a host that is lost; and to a failure that would only come again."""

    def __init__(self, spec: WorkerSpec, logs: RankLogs, hosts: Hosts, tell: Callable[[str], None]) -> None:
        super().__init__(spec, logs, log_line_prefix_template="[rank ${rank}] ")
        self._logs, self._hosts, self._tell = logs, hosts, tell
        self._heard = 0
        self._since = 0.0  # when, as time.monotonic() counts
        self._asked = 0  # signals that came
        self._closing = False
        self._grace = SAVING
        self._failures: tuple[Failure, ...] = ()
        self._lost = False
        self._pulse: Pulse | None = None

    def end(self) -> Ending:
        """Run to the end. Ctrl-C, SIGTERM and a closed terminal let the ranks save; a second one ends them."""
        before = {number: signal.signal(number, self._hear) for number in own_signals()}
        # Lines of other ranks come out as they are written, in order with those of rank 0.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        stopped = False
        try:
            self.run()
            stopped = not self._failures and self._all_stopped()
        except SignalException:
            stopped = True  # asked twice, or while no rank was running
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._logs.leaves = self._hosts.elastic and bool(self._heard)
        return Ending(self._failures, stopped, self._heard, self._lost)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == self._heard == signal.SIGTERM and time.monotonic() - self._since < REPEATED:
            return
        if not self._heard:
            self._heard, self._since = number, time.monotonic()
        self._asked += 1
        if self._asked > 1 or not (self._closing or self._running()):
            self._grace = ENDING
            raise SignalException("asked to end", signal.Signals(number))
        self._tell("stopping: this step is finished and saved first. Once more ends at once.")
        if not self._closing:  # those were asked already, and a second time would end them
            for process in self._running():
                process.send_signal(signal.SIGTERM if number == HANGUP else number)

    def _running(self) -> list[Any]:
        handlers = self._pcontext.subprocess_handlers.values() if self._pcontext else ()  # type: ignore[attr-defined]
        return [handler.proc for handler in handlers if handler.proc.poll() is None]

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._closing = True
        try:
            super()._shutdown(death_sig, self._grace)
        finally:
            self._closing = False

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        if self._heard:
            raise SignalException("asked to end", signal.Signals(self._heard))
        self._grace, self._failures = SAVING, ()
        super()._initialize_workers(worker_group)  # type: ignore[call-arg]
        assert worker_group.store is not None
        assert worker_group.group_rank is not None and worker_group.group_world_size is not None
        hosts = worker_group.group_world_size
        self._pulse = Pulse(worker_group.store, worker_group.group_rank, hosts, self._hosts.patience)
        if self._hosts.most > 1:
            self._tell(f"{hosts} of {self._hosts.most} hosts, {worker_group.workers[0].world_size} processes.")

    def _watched(self, worker_group: WorkerGroup) -> tuple[RunResult, list[int]]:
        """How the ranks are, and the hosts that are lost. Once a stop was heard the ranks are waited for here: to
        `healthy` torch answers by asking the store for more hosts, and the host that keeps it may have ended first."""
        while True:
            result = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
            lost = self._silent() if result.state is WorkerState.HEALTHY else []
            if result.state is not WorkerState.HEALTHY or lost or not (self._heard and self._hosts.elastic):
                return result, lost
            time.sleep(worker_group.spec.monitor_interval)

    def _silent(self) -> list[int]:
        """Hosts that gave no sign of life for too long. After a stop was heard, none when the store is gone."""
        try:
            return self._pulse.lost() if self._pulse is not None else []
        except DistError:
            if not self._heard:
                raise
            self._pulse = None
            return []

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result, lost = self._watched(worker_group)
        if result.is_failed():
            self._failures = self._read(result)
            self._grace = ENDING
            if self._heard or any(failure.code == 2 for failure in self._failures):
                self._remaining_restarts = 0  # a mistake of the user's would only come again
            elif self._remaining_restarts:
                first = self._failures[0]
                self._tell(f"rank {first.rank} failed ({first.said}); all begin again from the newest checkpoint.")
            return result
        left = self._all_stopped() and not self._all_stopped("everywhere")
        if result.state is WorkerState.SUCCEEDED and self._hosts.elastic and not self._heard and left:
            self._tell("another host was told to stop; this one goes on with those that are left.")
            self._remaining_restarts += 1  # of these none is used up
            return RunResult(state=WorkerState.FAILED)
        if lost:
            self._grace = ENDING
            self._lost = not self._remaining_restarts
            self._tell(f"{len(lost)} of the hosts gave no sign of life for {self._hosts.patience} s.")
            return RunResult(state=WorkerState.FAILED)
        return result

    def _read(self, result: RunResult) -> tuple[Failure, ...]:
        """The failures, causes before consequences: a rank that lost its peer fails in the same moment as the peer."""
        found = []
        for rank, failure in result.failures.items():
            told = self._logs.outcome(rank)
            code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
            said = told.get("said") or self._logs.last_line(rank) or ended(code)
            log = self._logs.log(rank)
            lost_peer = told.get("lost_peer", code == 128 + signal.SIGTERM)
            problems = tuple(told.get("problems", ()))
            order = (lost_peer, failure.timestamp, rank)
            found.append((order, Failure(rank, failure.pid, code, said, lost_peer, log, problems)))
        return tuple(failure for _, failure in sorted(found, key=lambda pair: pair[0]))

    def _all_stopped(self, how: str = "stopped") -> bool:
        """Whether this host's ranks have ended before the run's end, with everything saved. everywhere: because a
        command said so, which every host follows."""
        return all(self._logs.outcome(rank).get(how, False) for rank in self._logs.outcomes)

    def _exit_barrier(self) -> None:
        """Wait for the other hosts: the store must outlive their last steps. Ours can be interrupted."""
        self._in_exit_barrier = True
        if self._pulse is None or (self._heard and self._hosts.elastic):
            return
        try:
            while not self._pulse.lost(done=True) and not self._pulse.others_done():
                time.sleep(self._worker_group.spec.monitor_interval)
        except DistError:
            return  # the host that keeps the store saw all others done, and has ended


def ended(code: int) -> str:
    """How a process ended that said nothing."""
    if code == 128 + signal.SIGKILL:
        return "killed by SIGKILL, as the system does when memory runs out"
    if code - 128 in signal.valid_signals():
        return f"killed by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code} without a word"


def own_signals() -> Iterable[signal.Signals]:
    """Signals that ask a run to stop."""
    return filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP))
