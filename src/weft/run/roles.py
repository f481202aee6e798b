"""What several trained parts of one run may each have of their own: adapter, optimizer, learning-rate curve."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from weft import plugins
from weft.section import Section

Curve = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Rate:
    """How the learning rate of an optimizer moves over its own steps, and where its gradients are cut."""

    curve: Curve
    warmup: int
    floor: float
    max_norm: float


class Role(Section):
    """What one of several trained parts has of its own; what is left out is as for the whole run."""

    adapter: plugins.union("adapter") | None = Field(  # type: ignore[valid-type]
        default=None, description="what is trained; null: as adapter"
    )
    optimizer: plugins.union("optimizer") | None = Field(  # type: ignore[valid-type]
        default=None, description="how it moves, with its own learning rate; null: as optimizer"
    )
    curve: Curve | None = Field(default=None, description="of its learning rate; null: as schedule.curve")
    warmup: int | None = Field(
        default=None, ge=0, description="of its own steps in which the rate rises; null: as schedule.warmup"
    )
    floor: float | None = Field(default=None, ge=0, le=1, description="null: as schedule.floor")
    max_norm: float | None = Field(default=None, ge=0, description="null: as schedule.max_norm")


PLAIN = Role()


def role_of(roles: Mapping[str, Role], name: str) -> Role:
    """What a role has of its own, under its name or under that of its part: critic of critic_high."""
    return roles.get(name) or roles.get(name.partition("_")[0]) or PLAIN
