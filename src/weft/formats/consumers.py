"""The programs that adapters are written for, each with its own rule for what a file means to it.

These rules are written from the programs' sources and share nothing with our writers but the names of modules, so that
a file is proved by something else than the code that made it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from weft.errors import ConfigError, ModelError, did_you_mean
from weft.formats.consumers_comfyui import comfyui
from weft.formats.consumers_diffusers import diffusers
from weft.formats.consumers_kohya import musubi, original, videox_fun
from weft.formats.consumers_peft import peft
from weft.formats.header import read_header
from weft.formats.use import Stored, Use

CONSUMERS: Mapping[str, Callable[[Stored, str], Use]] = {
    "peft": peft,
    "diffusers": diffusers,
    "comfyui": comfyui,
    "musubi": musubi,
    "videox-fun": videox_fun,
    "original": original,
}
VIDEO = ("wan", "hunyuan-video")  # families whose makers have other names than we


def use_of(program: str, path: Path, family: str) -> Use:
    """What a program makes of the file or PEFT folder at a path, for a network of that family.

    Raises ConfigError for another program, ModelError for what is no such file.
    """
    if program not in CONSUMERS:
        raise ConfigError(f"no program is called '{program}'. {did_you_mean(program, list(CONSUMERS))}")
    if family not in VIDEO and program not in ("peft", "diffusers"):
        raise ModelError(f"{path}: {program} knows {' and '.join(VIDEO)}, and this adapter is of a {family}.")
    return CONSUMERS[program](stored(path), family)


def stored(path: Path) -> Stored:
    """The file, or the weights and the config of a PEFT folder, read as other programs read them."""
    config: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file = path / "adapter_model.safetensors"
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    if not file.is_file():
        raise ModelError(f"there is no {file}.")
    return Stored(load_file(file), read_header(file).metadata, config)
