"""The base models that `weft init` knows: where to fetch them, and the sizes and times that they were made for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Sizes in pixels, frames at the model's own rate. reason_*: the comment in the written config."""

    repository: str | None  # on the Hugging Face hub; None: the model ships with Weft
    subfolder: str = "transformer"
    reason_subfolder: str = ""
    fps: float | None = None  # None: the rate that the family knows
    reason_fps: str = ""
    side: int = 512
    frames: tuple[int, ...] = (49, 33, 17, 1)
    sample: tuple[int, int, int] = (832, 480, 81)  # width, height, frames
    shift: float = 3.0
    times: tuple[float, float] = (0.0, 1.0)
    guidance: float = 5.0
    rank: int = 32
    targets: str = "attention"
    lr: float = 1e-4
    steps: int = 1000
    warmup: int = 50
    batch: int = 1
    accumulate: int = 4
    every: int = 250
    recompute: bool = True


_A14B = KnownModel(
    repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers", reason_subfolder="the expert for early, noisy times",
    shift=12.0, times=(0.875, 1.0), guidance=4.0, sample=(1280, 720, 81),
)  # fmt: skip

MODELS: Mapping[str, KnownModel] = {
    "wan2.1-t2v-1.3b": KnownModel(repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "wan2.1-t2v-14b": KnownModel(repository="Wan-AI/Wan2.1-T2V-14B-Diffusers", shift=5.0, sample=(1280, 720, 81)),
    "wan2.2-ti2v-5b": KnownModel(
        repository="Wan-AI/Wan2.2-TI2V-5B-Diffusers", shift=5.0, side=704, sample=(1280, 704, 121)
    ),
    "wan2.2-t2v-a14b-high": _A14B,
    "wan2.2-t2v-a14b-low": replace(
        _A14B, subfolder="transformer_2", reason_subfolder="the expert for late, clean times", times=(0.0, 0.875),
        guidance=3.0,
    ),
    "tiny-wan": KnownModel(
        repository=None, fps=8, reason_fps="frames per second of the clips that tiny-wan was trained on", side=64,
        frames=(9,), sample=(64, 64, 9), guidance=4.0, rank=16, targets="attention+ffn", lr=2e-3, steps=200, warmup=10,
        batch=8, accumulate=1, every=100, recompute=False,
    ),
}  # fmt: skip


def recognised(network: Mapping[str, Any], has_second: bool) -> str:
    """The known model that a transformer's config.json is nearest to."""
    if network["in_channels"] == 48:
        return "wan2.2-ti2v-5b"
    if has_second:
        return "wan2.2-t2v-a14b-high"
    width = network["num_attention_heads"] * network["attention_head_dim"]
    if width <= 512:
        return "tiny-wan"
    return "wan2.1-t2v-14b" if width >= 4096 else "wan2.1-t2v-1.3b"
