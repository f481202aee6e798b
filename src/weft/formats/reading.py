"""Read an adapter of whatever format from a folder or file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from weft.errors import ModelError
from weft.few_steps import StepList
from weft.formats.adapter_file import STEP_LIST, AdapterFormat, SavedAdapter
from weft.formats.comfyui import ComfyUiFile
from weft.formats.diffusers import DiffusersFile
from weft.formats.foreign import read_foreign
from weft.formats.header import read_header
from weft.formats.keys import are_for_both
from weft.formats.kohya import MusubiFile, VideoXFunFile
from weft.formats.original import OriginalFile
from weft.formats.peft import PeftFolder
from weft.formats.peft_heads import refuse_heads
from weft.formats.sniff import Found, is_plain, sniff

FORMATS: dict[str, AdapterFormat] = {
    "peft": PeftFolder(),
    "diffusers": DiffusersFile(),
    "comfyui": ComfyUiFile(),
    "musubi": MusubiFile(),
    "videox-fun": VideoXFunFile(),
    "original": OriginalFile(),
}


def read_adapter(path: Path, expert: str | None = None, heads: bool = False) -> SavedAdapter:
    """Find the format and read it. expert: of a file that holds both experts' layers (ai-toolkit), high or low. heads:
    whether modules that were trained whole, biases and virtual tokens may come with it.

    Raises ModelError that names what is at the path in place of an adapter.
    """
    found = sniff(path)
    if expert is not None and _may_hold_both(found):
        adapter = read_foreign(found.weights, expert)
    else:
        adapter = FORMATS[found.format].read(path)
    _refuse_damaged_facts(adapter, path)
    if not heads:
        refuse_heads(adapter, path)
    return adapter


def experts_in(path: Path) -> tuple[str, ...]:
    """high and low, of a file that holds the layers of both; none of any other. Raises ModelError as read_adapter."""
    found = sniff(path)
    return ("high", "low") if _may_hold_both(found) and are_for_both(read_header(found.weights).tensors) else ()


def _may_hold_both(found: Found) -> bool:
    return found.format != "peft" and not is_plain(read_header(found.weights).tensors)


def _refuse_damaged_facts(adapter: SavedAdapter, path: Path) -> None:
    """A header is text that anybody can have written, and a part of it says how an adapter is used."""
    told = adapter.metadata
    checks: dict[str, Callable[[str], object]] = {
        "weft.expert": _word, "weft.config": _object, "weft.times": _two_times, STEP_LIST: StepList.from_json,
    }  # fmt: skip
    for key, check in checks.items():
        try:
            check(told[key]) if key in told else None
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelError(f"{path}: '{key}' in its header is damaged: '{told[key][:60]}'.") from error


def _word(text: str) -> str:
    """An expert's name becomes a part of file names."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", text):
        raise ValueError("no name of an expert")
    return text


def _object(text: str) -> dict[str, object]:
    return dict(json.loads(text))


def _two_times(text: str) -> tuple[float, float]:
    first, last = json.loads(text)
    return float(first), float(last)
