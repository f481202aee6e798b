"""What one rank does for all: rank 0 chooses, writes and refuses, and the others hear of it."""

from collections.abc import Callable
from typing import Any, TypeVar

from weft import errors
from weft.contracts import Engine
from weft.errors import WeftError

T = TypeVar("T")


def decided(engine: Engine, work: Callable[[], T]) -> T:
    """What rank 0 makes of work, plain data, on every rank. What it refuses, every rank refuses with the same words:
    a rank that went on alone would wait for the others until its time is up."""
    said: dict[str, Any] = {}
    if engine.rank == 0:
        try:
            said = {"value": work()}
        except WeftError as refused:
            said = {"refused": type(refused).__name__, "sentences": [str(part) for part in refused.args]}
    said = engine.agreed(said)
    if "refused" in said:
        raise getattr(errors, said["refused"], WeftError)(*said["sentences"])
    return said["value"]
