"""The base models that `weft init` knows: where to fetch them, and the sizes and times that they were made for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

WAN_I2V = "goes on from an image: samples need {text: ..., image: FILE}"


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Sizes in pixels, frames at the model's own rate. reason_*: the comment in the written config."""

    repository: str | None  # on the Hugging Face hub; None: the model ships with Weft
    kind: str = "wan"
    does: str = "text-to-video"
    experts: bool = False
    fps: float | None = None  # None: the rate that the family knows
    reason_fps: str = ""
    side: int = 512
    frames: tuple[int, ...] = (49, 33, 17, 1)
    sample: tuple[int, int, int] = (832, 480, 81)  # width, height, frames
    shift: float = 3.0
    guidance: float = 5.0
    guidance_low: float | None = None
    reason_guidance: str = "1: off"
    rank: int = 32
    targets: str = "attention"
    lr: float = 1e-4
    steps: int = 1000
    warmup: int = 50
    batch: int = 1
    accumulate: int = 4
    every: int = 250
    recompute: bool = True


_I2V = KnownModel(repository="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", does=WAN_I2V, frames=(49, 33, 17), shift=3.0)
_A14B = KnownModel(
    repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers", experts=True, shift=12.0, guidance=4.0, guidance_low=3.0,
    sample=(1280, 720, 81), steps=2000,
)  # fmt: skip

MODELS: Mapping[str, KnownModel] = {
    "wan2.1-t2v-1.3b": KnownModel(repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "wan2.1-t2v-14b": KnownModel(repository="Wan-AI/Wan2.1-T2V-14B-Diffusers", shift=5.0, sample=(1280, 720, 81)),
    "wan2.1-i2v-14b-480p": _I2V,
    "wan2.1-i2v-14b-720p": replace(
        _I2V, repository="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", shift=5.0, sample=(1280, 720, 81)
    ),
    "wan2.2-t2v-a14b": _A14B,
    "wan2.2-i2v-a14b": replace(
        _A14B, repository="Wan-AI/Wan2.2-I2V-A14B-Diffusers", does=WAN_I2V, frames=(49, 33, 17), shift=5.0,
        guidance=3.5, guidance_low=None,
    ),
    "wan2.2-ti2v-5b": KnownModel(
        repository="Wan-AI/Wan2.2-TI2V-5B-Diffusers", does="text-to-video, and from an image", shift=5.0, side=704,
        sample=(1280, 704, 121),
    ),
    "hunyuan-video": KnownModel(
        repository="hunyuanvideo-community/HunyuanVideo", kind="hunyuan-video", shift=7.0, guidance=6.0,
        reason_guidance="the network's own input, not a second question", sample=(960, 544, 61),
    ),
    "tiny-wan": KnownModel(
        repository=None, fps=8, reason_fps="frames per second of the clips that tiny-wan was trained on", side=64,
        frames=(9,), sample=(64, 64, 9), guidance=4.0, rank=16, targets="attention+ffn", lr=2e-3, steps=200, warmup=10,
        batch=8, accumulate=1, every=100, recompute=False,
    ),
}  # fmt: skip

# What a folder's transformer turns out to be -> the known model.
RELEASED: Mapping[str, str] = {
    "Wan 2.1 T2V 1.3B": "wan2.1-t2v-1.3b",
    "Wan 2.1 T2V 14B": "wan2.1-t2v-14b",
    "Wan 2.1 I2V 14B 480P": "wan2.1-i2v-14b-480p",
    "Wan 2.1 I2V 14B 720P": "wan2.1-i2v-14b-720p",
    "Wan 2.2 T2V A14B": "wan2.2-t2v-a14b",
    "Wan 2.2 I2V A14B": "wan2.2-i2v-a14b",
    "Wan 2.2 TI2V 5B": "wan2.2-ti2v-5b",
    "HunyuanVideo": "hunyuan-video",
}


def recognised(model: str | None, kind: str, task: str, experts: int, width: int) -> str:
    """The known model that a source is, or is nearest to. model: its name when it is a released one; width: of a
    token."""
    if model is not None:
        return RELEASED[model]
    if kind == "hunyuan-video":
        return "hunyuan-video"
    if experts == 2:
        return "wan2.2-i2v-a14b" if task == "i2v" else "wan2.2-t2v-a14b"
    if task != "t2v":
        return "wan2.1-i2v-14b-480p" if task == "i2v" else "wan2.2-ti2v-5b"
    if width <= 512:
        return "tiny-wan"
    return "wan2.1-t2v-14b" if width >= 4096 else "wan2.1-t2v-1.3b"
