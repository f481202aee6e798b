"""The models that `weft bench` knows by name: configs of released sizes in a folder, their weights drawn when read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from weft.errors import ConfigError, did_you_mean
from weft.families.drawn import write_list
from weft.families.known import RELEASED, VAES, scheduler_config

TEXT_TOKENS = 512  # that Wan is told, padding included


@dataclass(frozen=True)
class Sized:
    """One model. network: its config. unit: by key of the config, how many blocks of each kind a unit of depth has;
    units: how many units the whole model has."""

    family: str
    network: Mapping[str, Any]
    unit: Mapping[str, int]
    units: int
    released: str = ""  # a video model's name among the released ones
    changes: tuple[str, ...] = ()  # of the run's config


def _video(released: str, *changes: str) -> Sized:
    of = RELEASED[released]
    layers, singles = of.network["num_layers"], of.network.get("num_single_layers", 0)
    unit = {"num_layers": 1, "num_single_layers": singles // layers} if singles else {"num_layers": 1}
    return Sized(of.family, of.network, unit, layers, released, changes)


def _qwen3(width: int, ffn: int, layers: int, heads: int, tied: bool) -> Sized:
    """Qwen/Qwen3-0.6B and 8B, config.json."""
    network = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
    return Sized("causal-lm", network, {"num_hidden_layers": 1}, layers)


SHIPPED = "tiny-wan"
MODELS: Mapping[str, Sized] = {
    SHIPPED: Sized("wan", {}, {}, 1),
    "wan2.1-1.3b": _video("Wan 2.1 T2V 1.3B"),
    "wan2.1-14b": _video("Wan 2.1 T2V 14B"),
    "wan2.2-5b": _video("Wan 2.2 TI2V 5B"),
    "wan2.2-a14b": _video("Wan 2.2 T2V A14B", "family.expert=high"),
    "hunyuan-video": _video("HunyuanVideo"),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
}


def model_named(name: str) -> Sized:
    """Raises ConfigError with the nearest name."""
    if name not in MODELS:
        raise ConfigError(f"--model: weft bench knows no '{name}'. {did_you_mean(name, list(MODELS))}")
    return MODELS[name]


def write_model(folder: Path, name: str, units: int | None = None) -> Path:
    """A folder of a model as the family reads it, with so many units of depth; None: all. Raises ConfigError."""
    sized = model_named(name)
    if name == SHIPPED and units is None:
        return Path(SHIPPED)  # has weights of its own
    if units is not None and not 1 <= units <= sized.units:
        raise ConfigError(f"--blocks: {name} has {sized.units} units of depth, and {units} were asked for.")
    if name == SHIPPED:
        raise ConfigError(f"--blocks: {name} is small enough to be timed whole. Leave --blocks out.")
    depth = sized.units if units is None else units
    network = {**sized.network, **{key: depth * number for key, number in sized.unit.items()}}
    folder.mkdir(parents=True)
    if sized.family == "causal-lm":
        return _write_text(folder, network)
    return _write_video(folder, sized, network)


def _write_text(folder: Path, network: Mapping[str, Any]) -> Path:
    _write(folder / "config.json", network)
    with torch.device("meta"):
        write_list(folder / "model.drawn", AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
    return folder


def _write_video(folder: Path, sized: Sized, network: Mapping[str, Any]) -> Path:
    of = RELEASED[sized.released]
    parts = ("transformer", "transformer_2") if of.boundary is not None else ("transformer",)
    with torch.device("meta"):
        made = getattr(diffusers, network["_class_name"]).from_config(dict(network))
    for part in parts:
        _write(folder / part / "config.json", network)
        write_list(folder / part / "diffusion_pytorch_model.drawn", made)
    _write(folder / "vae" / "config.json", VAES[of.vae])
    _write(folder / "scheduler" / "scheduler_config.json", scheduler_config(of.family, of.shift))
    _write(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": TEXT_TOKENS})
    told = {"boundary_ratio": of.boundary, "expand_timesteps": of.expand_timesteps or None}
    _write(folder / "model_index.json", {name: value for name, value in told.items() if value is not None})
    return folder


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain))
