"""What the data of a run holds, of video and of text, before anything is encoded."""

from typing import Any

from weft.events import Event, Listener
from weft.run.config import RunConfig


def unheard(event: Event) -> None:
    """A listener to nothing."""


def surveyed(config: RunConfig, tell: Listener = unheard) -> Any:
    """What the run's data holds, as it would be trained on; texts are tokenised for that. Raises WeftError."""
    family = config.family
    if family.medium == "text":
        return config.data.survey(family, tell)
    if family.medium == "documents":
        if not family.labels and (trained := family.trained_labels):  # whose order the data's labels then follow
            family = type(family).model_validate({**family.model_dump(), "labels": trained})
        return config.data.survey(family, tell, reserved=config.adapter.virtual_tokens)
    return config.data.survey(family.geometry())
