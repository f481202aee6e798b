"""What --network_args of musubi-tuner say, as typed values."""

import ast
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weft.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkArgs:
    """Arguments of a network: musubi's own of networks/lora.py, and the last three, which are Weft's."""

    conv_dim: int | None = None  # rank on convolutions of more than 1x1; None: none are adapted
    conv_alpha: float = 1.0
    rank_dropout: float | None = None
    module_dropout: float | None = None
    loraplus_lr_ratio: float | None = None  # learning rate of lora_up over that of lora_down
    verbose: bool = False
    exclude_patterns: tuple[str, ...] | None = None
    include_patterns: tuple[str, ...] | None = None
    backend: Literal["peft", "native"] = "peft"
    rslora: bool = False  # scale by alpha / sqrt(rank); arXiv:2312.03732
    dora: bool = False  # arXiv:2402.09353


def network_args(given: Mapping[str, Any]) -> NetworkArgs:
    """Read key=value pairs. Raises ConfigError for a value that is none of its kind; of unknown keys it warns, for
    musubi's own networks let them pass."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in READERS:
            log.warning("network_args: '%s' is unknown and has no effect. %s", key, did_you_mean(key, list(READERS)))
        elif value is not None:
            values[key] = _read(key, value)
    return NetworkArgs(**values)


def _read(key: str, value: Any) -> Any:
    read, expected = READERS[key]
    try:
        return read(value)
    except (ValueError, SyntaxError, TypeError):
        raise ConfigError(
            f"network_args: {key}={value} is not {expected}. Write for instance {EXAMPLES[key]}."
        ) from None


def _flag(value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    word = str(value).lower()
    if word not in words:
        raise ValueError(word)
    return words[word]


def _patterns(value: Any) -> tuple[str, ...]:
    found = ast.literal_eval(value) if isinstance(value, str) else value
    if isinstance(found, str) or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(found)
    return tuple(found)


def _share(value: Any) -> float:
    share = float(value)
    if not 0 <= share < 1:
        raise ValueError(share)
    return share


def _rank(value: Any) -> int | None:
    """0 stands for none, as in musubi."""
    rank = int(value)
    if rank < 0:
        raise ValueError(rank)
    return rank or None


def _ratio(value: Any) -> float:
    ratio = float(value)
    if not ratio > 0:
        raise ValueError(ratio)
    return ratio


def _backend(value: Any) -> str:
    if value not in ("peft", "native"):
        raise ValueError(value)
    return value


READERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "conv_dim": (_rank, "a whole number from 0"),
    "conv_alpha": (float, "a number"),
    "rank_dropout": (_share, "a share from 0 to below 1"),
    "module_dropout": (_share, "a share from 0 to below 1"),
    "loraplus_lr_ratio": (_ratio, "a number above 0"),
    "verbose": (_flag, "True or False"),
    "exclude_patterns": (_patterns, "a list of regular expressions in quotes"),
    "include_patterns": (_patterns, "a list of regular expressions in quotes"),
    "backend": (_backend, "peft or native"),
    "rslora": (_flag, "True or False"),
    "dora": (_flag, "True or False"),
}
EXAMPLES: Mapping[str, str] = {
    "conv_dim": "conv_dim=4",
    "conv_alpha": "conv_alpha=1",
    "rank_dropout": "rank_dropout=0.1",
    "module_dropout": "module_dropout=0.1",
    "loraplus_lr_ratio": "loraplus_lr_ratio=4",
    "verbose": "verbose=True",
    "exclude_patterns": "\"exclude_patterns=[r'.*ffn.*']\"",
    "include_patterns": "\"include_patterns=[r'.*norm.*']\"",
    "backend": "backend=native",
    "rslora": "rslora=True",
    "dora": "dora=True",
}
