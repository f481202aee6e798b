"""What objectives that look at random times check alike: ranges of times, and clean first frames."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.contracts import Expert

Range = tuple[float, float]


def in_common(times: Range, expert: "Expert") -> Range:
    """The times of an expert that lie in a range; its ends in the wrong order when there are none."""
    return max(times[0], expert.times[0]), min(times[1], expert.times[1])


def refuse_empty(times: Range, experts: "Sequence[Expert]") -> None:
    """Raises ConfigError for an expert without a time in the range."""
    for expert in experts:
        low, high = in_common(times, expert)
        if low >= high:
            raise ConfigError(
                f"objective.times: {list(times)} and the times of expert '{expert.name}', {list(expert.times)}, have "
                "nothing in common. Leave objective.times out to train all of them."
            )


def refuse_first_frame(share: float | None, image: str) -> None:
    """Raises ConfigError where a share of clips is to begin with a clean frame, and the model takes none. image: how it
    is given a first frame."""
    if share and image != "frames":
        raise ConfigError(
            f"objective.first_frame: {share:g} was asked for, but this model takes no clean latent frame; TI2V-5B "
            "does. Leave the key out."
        )
