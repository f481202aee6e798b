"""A config section is the object that it describes: typed, frozen, and strict about unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every config section. Subclasses import torch inside the methods that work, never to be parsed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, arbitrary_types_allowed=False
    )
