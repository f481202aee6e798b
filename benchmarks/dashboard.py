"""Is training slower while somebody looks on? The same run plain, with what a dashboard needs of it, and watched.

    python benchmarks/dashboard.py --rounds 12 --steps 40 --json benchmarks/results/dashboard-cpu.json

Four runs of the shipped model take turns within one process, each with its own learner and folder:
plain    the events and training_gpu0.json alone
alone    also the heartbeat with its thread, the log, and the look for commands: what every run has
stream   the same beside `weft dashboard`, and a program that listens to /api/live
page     the same beside `weft dashboard`, that program, and the run's page open in headless chromium

While it is another's turn, server, listener and browser are stopped by SIGSTOP, so that turns of some seconds can be
compared. Pinned: the trainer has the first core, all watchers the second. Each figure is the median over rounds of the
ratio to `plain` within the round; processor time is the trainer's own, and `watchers` says how many cores each of them
used meanwhile. Linux only; the page needs playwright.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from threading import Thread
from time import perf_counter, process_time
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlsplit

import torch
import yaml

from weft.cli.bench import SMOKE
from weft.config.source import read_text
from weft.data.buckets import Bucket
from weft.events import PhaseStarted, RunStarted, tell_all
from weft.run.assemble import assemble
from weft.run.bench import Nothing, RandomItems, random_items
from weft.run.bench_machine import processor
from weft.run.config import RunConfig, parse_config
from weft.run.control import Control
from weft.run.folder import claim
from weft.run.gpu_log import open_gpu_log
from weft.run.heartbeat import Heartbeat
from weft.run.inbox import Inbox
from weft.run.listeners import EventLog
from weft.run.run_log import RunLog
from weft.run.train import Course, train

MODES = ("plain", "alone", "stream", "page")
WARM_UP = 2  # steps
SETTLE = 1.0  # seconds that watchers have to wake up before a turn


# ---- The trainer ---------------------------------------------------------------------------------------------------


def config_of(folder: Path, batch: int) -> RunConfig:
    """A run of the shipped model. folder: of the run."""
    overrides = [f"name={folder.name}", f"output={folder.parent}", f"data.batch_size={batch}", "optimizer.lr=1e-4",
                 "engine.device=cpu", "schedule.steps=100000"]  # fmt: skip
    return parse_config(read_text(SMOKE, "dashboard", overrides))


class Trainer:
    """One run in this process. observed: with heartbeat, log and inbox, as every run has them."""

    def __init__(self, folder: Path, batch: int, observed: bool) -> None:
        self.config, self.folder, self.observed = config_of(folder, batch), folder, observed
        folder.mkdir(parents=True)
        engine = self.config.engine.open()
        self.learner = assemble(self.config, engine)
        shape = Bucket(9, 64, 64, self.config.family.geometry().tokens(9, 64, 64))
        self.stream = RandomItems(random_items(self.config, shape), last_step=0)
        claim(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config.resolved()))
        self.listeners: list[Any] = [EventLog(folder / "events.rank0.jsonl"), open_gpu_log(folder, engine)]
        self.inbox = Inbox(folder) if observed else None
        if observed:
            self.listeners.append(RunLog(folder))
        told = tell_all(*self.listeners)
        told(RunStarted(name=folder.name, step=0, total_steps=100000, resumed_from=None, trainable=0, device="cpu"))
        told(PhaseStarted(phase="training", total=100000))

    def run(self, steps: int) -> None:
        """So many steps of the loop of `weft train`."""
        self.stream.last_step = self.learner.step + steps
        course = Course(self.config.schedule, Nothing(), tell_all(*self.listeners))
        if not self.observed:
            train(self.learner, [self.stream], course)
            return
        with Heartbeat(self.folder) as beat:
            tell = tell_all(beat, *self.listeners)
            # Of its keeper a control asks nothing until a command has come.
            control = Control(cast(Any, None), tell, lambda: False, self.inbox)
            course = Course(self.config.schedule, Nothing(), tell, orders=control, sign=beat.micro_batch)
            hook = self.learner.model.network.register_forward_pre_hook(lambda module, inputs: beat.sign())
            train(self.learner, [self.stream], course)
            hook.remove()


# ---- Who looks on --------------------------------------------------------------------------------------------------


@dataclass
class Watchers:
    """Processes that are awake in some turns. core: the one that they share, or None for all."""

    core: int | None
    server: subprocess.Popen[str] | None = None
    listener: subprocess.Popen[str] | None = None
    browser: subprocess.Popen[str] | None = None
    spent: dict[str, list[float]] = field(default_factory=dict)  # cores that each used in each turn

    def start(self, runs: Path, states: Path, chromium: str) -> None:
        """A dashboard of the folder, a listener to its run `stream`, and a page of its run `page`."""
        environment = {**os.environ, "XDG_STATE_HOME": str(states)}
        self.server = self._spawn("-m", "weft.cli.main", "dashboard", str(runs), "--port", "0", env=environment)
        address = next(word for word in told_by(self.server, "page") if word.startswith("http"))
        self.listener = self._spawn(__file__, "--listen", address)
        self.browser = self._spawn(__file__, "--look", address, "--chromium", chromium)
        for process in (self.listener, self.browser):
            told_by(process, "ready")

    def _spawn(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, *arguments]
        if self.core is not None:
            command = ["taskset", "--cpu-list", str(self.core), *command]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    @contextmanager
    def awake(self, mode: str) -> Iterator[None]:
        """Inside, those run that the mode is about; what they use of the processor meanwhile is noted."""
        there = {"stream": ("server", "listener"), "page": ("server", "listener", "browser")}.get(mode, ())
        families = {name: descendants(getattr(self, name).pid) for name in there}
        signalled([pid for family in families.values() for pid in family], signal.SIGCONT)
        time.sleep(SETTLE if there else 0)
        before, began = {name: seconds_of(family) for name, family in families.items()}, perf_counter()
        try:
            yield
        finally:
            lasted = perf_counter() - began
            for name, family in families.items():
                cores = (seconds_of(family) - before[name]) / lasted
                self.spent.setdefault(f"{mode}: {name}", []).append(cores)
            self.rest()

    def rest(self) -> None:
        for process in (self.server, self.listener, self.browser):
            if process:
                signalled(descendants(process.pid), signal.SIGSTOP)

    def seen(self) -> dict[str, Any]:
        """What the listener received and the page shows, so that nobody measures a page that slept."""
        found = {}
        for process in (self.server, self.listener, self.browser):
            if process:
                signalled(descendants(process.pid), signal.SIGCONT)
        time.sleep(3 * SETTLE)
        for process in (self.listener, self.browser):
            assert process and process.stdin and process.stdout
            process.stdin.write("told?\n")
            process.stdin.flush()
            found |= json.loads(process.stdout.readline())
        return found

    def end(self) -> None:
        for process in (self.browser, self.listener, self.server):
            if process:
                family = descendants(process.pid)
                signalled(family, signal.SIGCONT)
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                signalled([pid for pid in family if Path(f"/proc/{pid}").exists()], signal.SIGKILL)


def told_by(process: subprocess.Popen[str], word: str) -> list[str]:
    """The words of the first line of a process that begins with one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == [word]:
            return line.split()
    raise RuntimeError(f"{process.args} ended before it said '{word}'")


def descendants(root: int) -> list[int]:
    """A process and all that came of it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def seconds_of(pids: Sequence[int]) -> float:
    """Processor time of processes that live."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def signalled(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def listen(address: str) -> None:
    """Read the live events of the run `stream` for ever; say how many points have come when asked."""
    page = urlsplit(address)
    token = parse_qs(page.query)["token"][0]
    asked = urllib.request.Request(f"http://{page.netloc}/api/live?run={quote('stream', safe='')}",
                                   headers={"Authorization": f"Bearer {token}"})  # fmt: skip
    points = 0

    def hear() -> None:
        nonlocal points
        with urllib.request.urlopen(asked) as live:
            print("ready", flush=True)
            for line in live:
                if line.startswith(b"data:"):
                    points += len(json.loads(line[5:]).get("points", ()))

    Thread(target=hear, daemon=True).start()
    while sys.stdin.readline():
        print(json.dumps({"points_streamed": points}), flush=True)


def look(address: str, chromium: str) -> None:
    """Keep the page of the run `page` open; say what it shows when asked."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.goto(f"{address.partition('?')[0]}#/run/page")
        page.wait_for_selector("canvas")
        print("ready", flush=True)
        while sys.stdin.readline():
            print(json.dumps({"page_text": page.inner_text("body")}), flush=True)


# ---- The measurement -----------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds a step of each round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def measure(
    trainers: dict[str, Callable[[int], None]], watchers: Watchers, rounds: int, steps: int
) -> dict[str, Times]:
    """All modes in each round; who begins turns from round to round."""
    found = {mode: Times() for mode in trainers}
    for run in trainers.values():
        run(WARM_UP)
    watchers.rest()
    names = list(trainers)
    for number in range(rounds):
        turn = number % len(names)
        for mode in names[turn:] + names[:turn]:
            with watchers.awake(mode):
                began, spent = perf_counter(), process_time()
                trainers[mode](steps)
                found[mode].wall.append((perf_counter() - began) / steps)
                found[mode].processor.append((process_time() - spent) / steps)
    return found


def figures(times: dict[str, Times]) -> dict[str, Any]:
    """Of each mode the median step, and the median and quartiles of its ratio to plain."""
    out: dict[str, Any] = {}
    for mode, own in times.items():
        out[mode] = {"step_seconds": median(own.wall), "processor_seconds": median(own.processor)}
        for name in ("wall", "processor"):
            pairs = zip(getattr(own, name), getattr(times["plain"], name), strict=True)
            low, middle, high = quantiles([value / plain for value, plain in pairs], n=4, method="inclusive")
            out[mode][f"{name}_ratio"] = {"median": middle, "p25": low, "p75": high}
    return out


def case(pinned: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """All modes with trainer and watchers on cores of their own, or wherever the system puts them."""
    cores = sorted(os.sched_getaffinity(0))
    if pinned and len(cores) < 2:
        raise SystemExit("--pinned needs two cores")
    watchers = Watchers(cores[1] if pinned else None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(watchers.end)
        stack.callback(os.sched_setaffinity, 0, cores)
        watched = Path(folder) / "watched"
        trainers = {
            mode: Trainer((watched if mode in ("stream", "page") else Path(folder) / "others") / mode, arguments.batch,
                          observed=mode != "plain")
            for mode in MODES
        }  # fmt: skip
        for mode in ("stream", "page"):
            trainers[mode].run(1)
        watchers.start(watched, Path(folder) / "state", arguments.chromium)
        if pinned:
            os.sched_setaffinity(0, cores[:1])
        load = os.getloadavg()
        loops = {mode: trainer.run for mode, trainer in trainers.items()}
        times = measure(loops, watchers, arguments.rounds, arguments.steps)
        seen = watchers.seen()
        last = trainers["page"].learner.step
        return {
            "pinned": pinned,
            "load_before": load,
            "load_after": os.getloadavg(),
            "points_streamed": seen["points_streamed"],
            "page_showed_the_last_step": str(last) in seen["page_text"].replace(",", "").replace("\u202f", ""),
            "watchers": {name: median(cores) for name, cores in watchers.spent.items()},
            "modes": figures(times),
        }


def report(result: dict[str, Any]) -> None:
    print(f"{result['case']}, {result['processor']}")
    for case in result["cases"]:
        where = "trainer and watchers on cores of their own" if case["pinned"] else "not pinned"
        shown = "showed" if case["page_showed_the_last_step"] else "did NOT show"
        print(f"{where}; {case['points_streamed']} points were streamed, the page {shown} the last step")
        for mode, row in case["modes"].items():
            wall, own = (
                f"x{ratio['median']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f})"
                for ratio in (row["wall_ratio"], row["processor_ratio"])
            )
            print(f"  {mode:<8}{1000 * row['step_seconds']:8.1f} ms/step   {wall}   processor {own}")
        print("  cores used:", ", ".join(f"{name} {cores:.3f}" for name, cores in case["watchers"].items()))


def measured(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    packages = ("weft", "torch", "diffusers", "peft", "starlette", "uvicorn", "playwright")
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "versions": {name: version(name) for name in packages},
        "case": f"tiny-wan, 9x64x64, batch {arguments.batch}, rank 16 on attention+ffn, fp32",
        "rounds": arguments.rounds,
        "steps_per_turn": arguments.steps,
        "cases": [case(pinned, arguments) for pinned in (True, False)],
    }
    report(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40, help="per turn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--look", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.listen:
        listen(arguments.listen)
    elif arguments.look:
        look(arguments.look, arguments.chromium)
    else:
        measured(arguments)


if __name__ == "__main__":
    main()
