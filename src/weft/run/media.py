"""Where video and text part in a run: what is opened to train on, and what samples are."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from weft.contracts import Batch, Engine, Experience
from weft.events import Listener
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.shortage import naming
from weft.run.showing import Gallery, LazyEncoders
from weft.run.writing import Replies


class Dataset(Protocol):
    """What a run trains on and is measured on."""

    @property
    def train(self) -> Experience: ...
    def validation(self) -> tuple[list[Batch], Sequence[Any]]:
        """Batches to measure on, and the items that cannot be measured, each with a key and a reason."""
        ...


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
    encoders = LazyEncoders(lambda: config.family.encoders(engine.device, engine.carry))
    with naming("caching", engine.device):
        dataset = config.data.open(
            survey, inputs, encoders.open, tell, seed=config.seed, last_step=config.schedule.steps,
            beside=config.objective.texts,
        )  # fmt: skip
    if config.data.cache != "off":
        encoders.close()
    return dataset, Gallery(config, tell, encoders, survey.fps)
