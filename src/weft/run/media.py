"""Where video, text and documents part in a run: what is opened to train on, and what samples are."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from weft.contracts import Batch, Engine, Experience
from weft.events import Listener
from weft.run.config import RunConfig
from weft.run.documents import last_steps
from weft.run.learner import Learner
from weft.run.shortage import naming
from weft.run.showing import Gallery, LazyEncoders
from weft.run.writing import Replies


class Dataset(Protocol):
    """What a run trains on and is measured on."""

    @property
    def stream(self) -> Sequence[Experience]: ...
    def validation(self) -> tuple[list[Batch], Sequence[Any]]:
        """Batches to measure on, and the items that cannot be measured, each with a key and a reason."""
        ...


class Nothing:
    """Samples of a model that generates nothing."""

    def sample(self, learner: Learner, adapter: bool = True) -> None: ...


class Showing(Protocol):
    """Samples of a run."""

    def sample(self, learner: Learner, adapter: bool = True) -> Any: ...


def opened(
    config: RunConfig, survey: Any, inputs: Mapping[str, str], engine: Engine, tell: Listener
) -> tuple[Dataset, Showing]:
    """The data, cached where it is to be, and what makes samples. Several ranks encode each a part of the cache."""
    if config.family.medium == "text":
        dataset = config.data.open(survey, tell, seed=config.seed, last_step=config.schedule.steps)
        return dataset, Replies(config, tell)
    if config.family.medium == "documents":
        per_step = config.schedule.accumulate * engine.data_world
        ends = last_steps(config, survey.stretches, per_step)
        return config.data.open(survey, tell, seed=config.seed, last_steps=ends, per_step=per_step), Nothing()
    encoders = LazyEncoders(lambda: config.family.encoders(engine.device, engine.carry))
    with naming("caching", engine.device):
        dataset = config.data.open(
            survey, inputs, encoders.open, tell, seed=config.seed, last_step=config.schedule.steps,
            beside=config.objective.texts, memory=engine.host_memory,
        )  # fmt: skip
    if config.data.cache != "off":
        encoders.close()
    return dataset, Gallery(config, tell, encoders, survey.fps)
