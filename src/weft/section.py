"""A config section is the object that it describes: typed, frozen, and strict about unknown keys."""

from typing import Self

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every config section. Subclasses import torch inside the methods that work, never to be parsed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, arbitrary_types_allowed=False
    )

    def __copy__(self) -> Self:
        """A copy that finds out anew what it has found out, such as its files: model_copy may change their source."""
        copied = super().__copy__()
        for name in set(copied.__dict__) - set(type(self).model_fields):
            copied.__dict__.pop(name)  # type: ignore[attr-defined]  # pydantic calls it read-only; an instance's is a dict
        return copied
