"""A small config with every sort of field, so that these tests do not change when a real section does."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from weft.config.parse import parse
from weft.config.source import read_text
from weft.errors import ConfigError
from weft.section import Section


class Lora(Section):
    """A small adapter."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="inner width")
    alpha: float | None = None  # null: the rank
    targets: str | tuple[str, ...] = "attention"
    backend: Literal["peft", "native"] = "peft"
    dora: bool = False


class Full(Section):
    """All weights."""

    kind: Literal["full"] = "full"
    blocks: int = 1


class Clips(Section):
    """One place of clips."""

    path: Path
    repeats: int = Field(1, ge=1)


class Optimizer(Section):
    """How weights move."""

    lr: float = Field(1e-4, gt=0, description="learning rate")
    betas: tuple[float, float] = (0.9, 0.999)
    args: dict[str, Any] = Field(default_factory=dict)


class Small(Section):
    """A small run."""

    name: str
    adapter: Annotated[Lora | Full, Field(discriminator="kind")]
    optimizer: Optimizer = Field(default_factory=Optimizer)
    sources: tuple[Clips, ...] = ()
    cache: Literal["disk", "memory", "off"] = "disk"
    times: tuple[float, ...] = (0.5,)
    steps: int | Literal["auto"] = "auto"
    warmup: int = Field(0, ge=0)
    compile: bool | Literal["auto"] = "auto"
    token: str = ""

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Small":
        if self.warmup == 13:
            raise ValueError("warmup is 13, and that is no number for a warm-up. Choose another.")
        return self


BASE = "name: first\nadapter: {kind: lora}\n"


def parsed(text: str, *overrides: str) -> Small:
    return parse(Small, read_text(text, "run.yaml", overrides))


def problems(text: str, *overrides: str) -> list[str]:
    """What is said about a config that is refused."""
    try:
        parsed(text, *overrides)
    except ConfigError as error:
        return list(error.problems)
    return []
