"""Experiment trackers: TensorBoard, Weights & Biases and Trackio hear a run's events. Nothing comes back from them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from uuid import uuid4

from weft import events
from weft.durable import write_whole
from weft.errors import ConfigError
from weft.events import Event, Listener, Notice, RunStarted
from weft.run.config import RunConfig, Tracking

Numbers = Mapping[str, float]
IDENTITY = (
    "trackers.json"  # in the run's folder: under which names it is known elsewhere, so that a resumed run goes on
)


class Tracker(Protocol):
    """One place that numbers are sent to."""

    def begin(self, step: int) -> None:
        """The run starts, or goes on from a step."""
        ...

    def log(self, step: int, numbers: Numbers) -> None: ...
    def sample(self, event: events.Sampled) -> None: ...
    def end(self, finished: bool) -> None: ...


class TensorBoard:
    """Event files in the run's folder, `tensorboard/`."""

    def __init__(self, config: RunConfig) -> None:
        self._make = needed("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder = config.folder / "tensorboard"
        self._writer: Any = None

    def begin(self, step: int) -> None:
        # What a killed process logged beyond the checkpoint is not the run's.
        self._writer = self._make(str(self._folder), purge_step=step + 1 if step else None)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def sample(self, event: events.Sampled) -> None:
        self._writer.add_text("samples", f"{event.prompt}: {event.file}", event.step)

    def end(self, finished: bool) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. Offline runs lie in the run's folder, `wandb/`, until `wandb sync`."""

    def __init__(self, config: RunConfig) -> None:
        self._wandb = needed("wandb", "wandb")
        self._config = config
        self._run: Any = None

    def begin(self, step: int) -> None:
        config, track = self._config, self._config.track
        self._run = self._wandb.init(
            project=track.project, name=config.name, id=known_as(config.folder, "wandb"), resume="allow",
            dir=str(config.folder), config=config.resolved(), mode="offline" if track.offline else "online",
            settings=self._wandb.Settings(silent=True),
        )  # fmt: skip
        # Steps of a resumed run come again, and wandb's own counter never goes back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log({"step": step, **numbers})

    def sample(self, event: events.Sampled) -> None:
        if event.file.endswith(".mp4"):
            made = self._wandb.Video(event.file, caption=event.prompt)
        else:
            made = self._wandb.Html(Path(event.file).read_text(encoding="utf-8"))
        self._run.log({"step": event.step, f"samples/{Path(event.file).stem}": made})

    def end(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """Trackio's database on this machine; `trackio show` draws it."""

    def __init__(self, config: RunConfig) -> None:
        self._trackio = needed("trackio", "trackio")
        self._config = config

    def begin(self, step: int) -> None:
        config = self._config
        self._trackio.init(project=config.track.project, name=config.name, config=config.resolved(), resume="allow",
                           embed=False)  # fmt: skip

    def log(self, step: int, numbers: Numbers) -> None:
        self._trackio.log(dict(numbers), step=step)

    def sample(self, event: events.Sampled) -> None:
        """Its tables are of numbers; the files lie in the run's folder."""

    def end(self, finished: bool) -> None:
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[RunConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def needed(module: str, package: str) -> ModuleType:
    """A tracker's module. Raises ConfigError when its package is not installed."""
    try:
        return import_module(module)
    except ImportError as missing:
        raise ConfigError(
            f"track.to: '{package}' is not installed. Run: pip install '{package}', or take it off the list."
        ) from missing


def known_as(run: Path, tracker: str) -> str:
    """The name that a run has at a tracker: made once and kept in the run's folder."""
    path = run / IDENTITY
    names = json.loads(path.read_text()) if path.is_file() else {}
    if tracker not in names:
        names[tracker] = uuid4().hex[:12]
        write_whole(path, json.dumps(names))
    return names[tracker]


class Told:
    """Turns events into a tracker's numbers. A tracker that fails is left out from then on, with a notice: a chart is
    not worth a run."""

    def __init__(self, name: str, tracker: Tracker, tell: Listener) -> None:
        self.name, self.tracker, self.tell = name, tracker, tell
        self.open = False
        self.failed = False

    def __call__(self, event: Event) -> None:
        if self.failed or not (self.open or isinstance(event, RunStarted)):
            return
        try:
            self._hear(event)
        except Exception as error:
            self.failed = True
            first = (str(error).splitlines() or [""])[0]
            self.tell(Notice(text=f"{self.name}: no more is sent to it, {type(error).__name__}: {first}"))

    def _hear(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.tracker.begin(event.step)
            self.open = True
        elif isinstance(event, events.StepEnded):
            seconds = {f"seconds/{name}": value for name, value in event.seconds.items()}
            self.tracker.log(event.step, {**event.metrics, **seconds})
        elif isinstance(event, events.Evaluated):
            self.tracker.log(event.step, measured(event))
        elif isinstance(event, events.Sampled):
            self.tracker.sample(event)
        elif isinstance(event, events.RunEnded):
            self.tracker.end(event.outcome == "finished")
            self.open = False


def measured(event: events.Evaluated) -> dict[str, float]:
    """Validation's numbers; none that were not measured."""
    named = {
        "validation/loss": event.loss,
        "validation/baseline": event.baseline,
        "validation/failed": float(event.failed),
        **{f"validation/at {time}": loss for time, loss in event.by_time.items()},
        **{f"validation/{expert}": loss for expert, loss in event.by_expert.items()},
    }
    return {name: value for name, value in named.items() if value is not None}


def check_trackers(track: Tracking) -> None:
    """Raises ConfigError for one that is not installed, before a model is read."""
    for name in track.to:
        needed("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def trackers(config: RunConfig, tell: Listener) -> Sequence[Listener]:
    """What hears the run besides its own files."""
    os.environ.setdefault("WANDB_SILENT", "true")
    return [Told(name, TRACKERS[name](config), tell) for name in config.track.to]
