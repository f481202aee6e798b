"""Weft trains adapters on frozen models. Public names are imported when they are first used, so this costs no torch."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ConfigError": "weft.errors",
    "DataError": "weft.errors",
    "WeftError": "weft.errors",
    "RunConfig": "weft.run.config",
    "load_config": "weft.run.config",
    "train_run": "weft.run.start",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'weft' has no attribute {name!r}")
