"""Small real models, clips and configs, made on the spot."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import WanTransformer3DModel

from weft.data.media import write_video
from weft.families.loading import model_folder
from weft.run.config import RunConfig, parse_config
from weft.run.config import load_config as load_config

WIDTH = 24  # of a token, in two heads


def make_wan(folder: Path, layers: int = 2) -> Path:
    """A folder in diffusers layout: a small random transformer beside the shipped model's other parts."""
    shipped = model_folder("tiny-wan")
    folder.mkdir(parents=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(shipped / part, folder / part)
    shutil.copy(shipped / "model_index.json", folder)
    text = json.loads((shipped / "text_encoder" / "config.json").read_text())["d_model"]
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=16, out_channels=16, text_dim=text,
        freq_dim=32, ffn_dim=48, num_layers=layers, cross_attn_norm=True,
    )  # fmt: skip
    network.save_pretrained(folder / "transformer")
    return folder


def make_clips(folder: Path, count: int = 5, frames: int = 9, side: int = 64) -> Path:
    """Clips of a brightening square with captions beside them."""
    folder.mkdir(parents=True)
    for number in range(count):
        video = numpy.full((frames, side, side, 3), 30 * number, numpy.uint8)
        for frame in range(frames):
            video[frame, 8 : 16 + 4 * number, 4 * frame : 4 * frame + 16] = (250, 20 * frame, 10 * number)
        write_video(folder / f"{number}.mp4", video, 8.0)
        (folder / f"{number}.txt").write_text(f"a square, number {number}")
    return folder


def plain_config(root: Path, model: Path | str, clips: Path) -> dict[str, Any]:
    """A run's config as plain data, quick on a cpu."""
    return {
        "name": "run",
        "output": str(root / "runs"),
        "seed": 5,
        "family": {"kind": "wan", "source": str(model)},
        "adapter": {"kind": "lora", "backend": "native", "rank": 4, "targets": "attention+ffn"},
        "objective": {"kind": "flow-matching", "timesteps": {"kind": "shift", "shift": 3}},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "data": {
            "kind": "video",
            "sources": [{"path": str(clips)}],
            "validation_items": 1,
            "fps": 8,
            "buckets": {"sizes": [[64, 64]], "frames": [9]},
            "batch_size": 2,
            "cache_folder": str(root / "cache"),
        },
        "engine": {"kind": "single", "device": "cpu"},
        "schedule": {"steps": 6, "curve": "cosine", "warmup": 1},
        "save": {"every": 2, "keep": 2},
        "validation": {"every": 3},
    }


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of base in which change's values stand."""
    out = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def config_of(plain: Mapping[str, Any], **change: Any) -> RunConfig:
    """The config of plain data, with sections changed by name."""
    from weft.config.source import read_text

    return parse_config(read_text(json.dumps(merged(plain, change))))
