"""The runs below a folder, read from their files alone: what the server, the report and the comparison know of them."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from weft.dashboard import configs, gpus, health, logs, samples
from weft.dashboard.discover import find_runs
from weft.dashboard.gpu_history import gpu_json_of
from weft.dashboard.liveness import Watch
from weft.dashboard.run_folder import Readers, RunFolder, Seen
from weft.dashboard.run_log import RunLog
from weft.dashboard.small_files import Remembered, json_of, yaml_of
from weft.dashboard.tail import number
from weft.errors import did_you_mean
from weft.run.inbox import COMMANDS

FRESH = 1.0  # seconds for which a search for runs is believed
OPEN_LOGS = 16  # whose curves are kept; the rest is read again when it is asked for
WARM_LOGS = 12  # of these, which are read ahead
LAST_LINES = 30  # of the log, shown with a run that ended badly
STATUS_FORMAT = 1


class UnknownRun(KeyError):
    """There is no run of that id below the root."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Since:
    """What came after a position. reset: what was had before is void, or too much was missed: read anew."""

    position: int
    records: list[dict[str, Any]]
    entries: list[dict[str, Any]]
    reset: bool


class Store:
    """Knows runs by their ids: their paths below the root with '/'. Safe for several threads."""

    def __init__(self, root: Path, now: Callable[[], float] = time.time) -> None:
        self.root = root
        self._now = now
        self._lock = RLock()  # of the four below
        self._found: dict[str, Path] = {}
        self._searched: float | None = None
        self._folders: dict[str, tuple[RLock, RunFolder]] = {}
        self._logs: OrderedDict[tuple[str, int], tuple[RLock, RunLog]] = OrderedDict()
        self._readers = Readers(Remembered(json_of), Remembered(gpu_json_of), Remembered(yaml_of))
        self._watch = Watch()

    # ---- Which runs there are ----------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """All runs, newest first."""
        return list(self._search(older=FRESH))

    def folder(self, run: str) -> Path:
        """Where a run lies. Raises UnknownRun for whatever is no id of a run, such as a path that leads elsewhere."""
        found = self._search(older=float("inf"))
        if run not in found:
            found = self._search(older=FRESH / 10)
        elif not found[run].is_dir():
            found = self._search(older=0.0)
        if run not in found:
            raise UnknownRun(f"There is no run '{run}' in {self.root}. {did_you_mean(run, list(found))}")
        return found[run]

    def _search(self, older: float) -> dict[str, Path]:
        """Id -> folder; searched for anew when the last search is older than so many seconds."""
        with self._lock:
            if self._searched is None or time.monotonic() - self._searched > older:
                self._found, self._searched = find_runs(self.root), time.monotonic()
                for gone in self._folders.keys() - self._found.keys():
                    del self._folders[gone]
            return self._found

    # ---- The list ----------------------------------------------------------------------------------------------------

    def summaries(self) -> list[dict[str, Any]]:
        return [self.summary(run) for run in self.ids()]

    def summary(self, run: str) -> dict[str, Any]:
        with self._opened(run) as folder:
            return folder.summary(folder.look())

    @contextmanager
    def _opened(self, run: str) -> Iterator[RunFolder]:
        path = self.folder(run)
        with self._lock:
            known = self._folders.get(run)
            if known is None or known[1].path != path:
                known = (RLock(), RunFolder(run, path, self._readers, self._watch, self._now))
                self._folders[run] = known
        with known[0]:
            yield known[1]

    @contextmanager
    def _log(self, run: str, rank: int = 0) -> Iterator[RunLog]:
        """A rank's log, read to its present end; between turns others may have it."""
        lock, log = self._open_log(run, rank)
        more = True
        while more:
            with lock:
                more = log.update()
        with lock:
            yield log

    def _open_log(self, run: str, rank: int) -> tuple[RLock, RunLog]:
        path = self.folder(run) / f"events.rank{rank}.jsonl"
        with self._lock:
            known = self._logs.get((run, rank))
            if known is None or known[1].tail.path != path:
                known = self._logs[run, rank] = (RLock(), RunLog(path))
            self._logs.move_to_end((run, rank))
            while len(self._logs) > OPEN_LOGS:
                self._logs.popitem(last=False)
        return known

    def warm(self, seconds: float) -> None:
        """Read on in the logs of the newest runs for about so long: whoever comes from the list waits for none."""
        end = time.monotonic() + seconds
        for run in self.ids()[:WARM_LOGS]:
            lock, log = self._open_log(run, 0)
            more = True
            while more:
                if time.monotonic() > end:
                    return
                with lock:
                    more = log.update()

    # ---- One run -----------------------------------------------------------------------------------------------------

    def run(self, run: str) -> dict[str, Any]:
        """A run with all that its page shows at once. Curves, samples, config and log are asked for by themselves."""
        with self._opened(run) as folder:
            seen = folder.look()
            summary = folder.summary(seen)
        path, troubled = self.folder(run), seen.verdict.state in ("crashed", "stalled")
        with self._log(run) as log:
            names = log.curves.names
            return {
                **summary,
                "gpus": seen.gpus(),
                "phases": _before(names, "/loss"),
                "optimizers": _before(names, "/lr"),
                "series": names,
                "evaluations": [log.evaluations[step] for step in sorted(log.evaluations)],
                "resumes": list(log.resumes),
                "entries": list(log.entries),
                "position": log.position,
                "commands": _commands(seen),
                "trainable": (log.begun or {}).get("trainable"),
                "has": {
                    "health": (path / "health.jsonl").is_file(),
                    "scores": bool(log.scores),
                    "samples": bool(log.samples),
                },
                "damaged": log.damaged,
                "rates": _rates(seen.config, _before(names, "/lr"), log.rates),
                "log": logs.log_of(path, LAST_LINES, others=True) if troubled else [],
            }

    def series(
        self, run: str, names: Sequence[str], start: float | None = None, end: float | None = None, points: int = 1500,
        smooth: float = 0.0, rank: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Curves by their names, in at most so many points each. start, end: steps, or seconds since 1970."""
        with self._log(run, rank) as log:
            drawn = {name: log.curves.drawn(name, start, end, points, smooth) for name in dict.fromkeys(names)}
            return {"position": log.position, "series": drawn}

    def samples(self, run: str) -> list[dict[str, Any]]:
        """By step, those of the base first, then in the order of the prompts."""
        path = self.folder(run)
        with self._log(run) as log:
            records = sorted(log.samples.items(), key=lambda item: (item[0][0], item[0][1]))
        found = [samples.told(run, path, record) for _, record in records]
        return [sample for sample in found if sample is not None]

    def config(self, run: str) -> dict[str, Any]:
        return configs.config_of(self.folder(run))

    def health(self, run: str) -> dict[str, Any]:
        path = self.folder(run) / "health.jsonl"
        with self._log(run) as log:
            cuts = [(resume["time"], resume["step"]) for resume in log.resumes]
        return health.health_of(path, cuts)

    def scores(self, run: str) -> dict[str, Any]:
        with self._log(run) as log:
            return health.matrix(list(log.scores.values()))

    def log(self, run: str, lines: int = 200) -> list[dict[str, Any]]:
        return logs.log_of(self.folder(run), lines)

    def since(self, run: str, position: int) -> Since:
        """What came after a position that `run`, `series` or this gave out, by this process or an earlier one."""
        with self._log(run) as log:
            found = log.after(position)
            if found is None:
                return Since(log.position, [], [], reset=True)
        return Since(*found, reset=False)

    # ---- Several -----------------------------------------------------------------------------------------------------

    def compare(self, runs: Sequence[str]) -> dict[str, Any]:
        """The keys of their configs in which runs differ."""
        rows, same = configs.differing([self.config(run)["resolved"] for run in runs])
        return {"runs": list(runs), "differing": rows, "same": same}

    def status(self, run: str | None = None) -> dict[str, Any]:
        """Every GPU of one run, or of all, with the thinned history of its numbers."""
        found = []
        for one in [run] if run is not None else self.ids():
            with self._opened(one) as folder:
                seen = folder.look()
            media = samples.newest_media(one, self.folder(one))
            for gpu, file in zip(seen.gpus(), seen.files, strict=True):
                history = gpus.history_of(file.facts).points()
                name = self.folder(one).absolute().name
                found.append({**gpu, "run": name, "id": one, "history": history, "samples": media})
        return {"format": STATUS_FORMAT, "time": self._now(), "gpus": found}


def _before(names: Sequence[str], ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in names if name.endswith(ending)]


def _commands(seen: Seen) -> list[str]:
    """What a trainer can be told now, in the order of its own list."""
    if not seen.verdict.alive or seen.verdict.phase in ("starting", "caching"):  # no step yet after which it listens
        return []
    idle = {"pause" if seen.verdict.phase == "paused" else "resume"}
    if not configs.prompts(seen.config):
        idle.add("sample")
    if not configs.validates(seen.config):
        idle.add("validate")
    return [name for name in COMMANDS if name not in idle]


def _rates(
    config: Mapping[str, Any], optimizers: Sequence[str], orders: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Optimizer -> learning rate at the top of its schedule: the config's, as later orders changed it."""
    rates = {name: number(rate) for name, rate in configs.base_rates(config, optimizers).items()}
    for order in orders:
        given = order["arguments"]
        for name in rates if given.get("optimizer") is None else {given["optimizer"]} & rates.keys():
            lr, factor, before = number(given.get("lr")), number(given.get("factor")), rates[name]
            rates[name] = lr if lr is not None else before * factor if before and factor else before
    return rates
