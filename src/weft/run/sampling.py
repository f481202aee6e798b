"""Generating videos with a model under training or a finished adapter: text, noise, denoising steps, pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from weft.contracts import Denoise, Encoders, Engine, Model, ModelFamily
from weft.errors import ConfigError
from weft.geometry import VideoGeometry
from weft.math.chance import generator
from weft.math.flow import TIMESTEPS

TOKENS_PER_CALL = 40_000  # prompts are denoised together up to this many video tokens


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One video to generate. guidance g: u + g(c - u), Wan's convention; at 1 the negative prompt costs nothing."""

    prompt: str
    negative: str = ""
    frames: int
    width: int
    height: int
    steps: int
    guidance: float
    seed: int

    def noise(self, geometry: VideoGeometry) -> Tensor:
        """(1, C, f, h, w) fp32 that depends on the seed and the size alone: the same before and after training."""
        shape = geometry.latent_shape(self.frames, self.height, self.width)
        return torch.randn((1, *shape), generator=generator("cpu", self.seed, "sample"))


def check_shape(geometry: VideoGeometry, frames: int, width: int, height: int, place: str) -> None:
    """Raises ConfigError for a size that the model cannot make. place: put before each name, such as 'samples.'."""
    problems = []
    for side, value in (("width", width), ("height", height)):
        step = geometry.side_multiple
        if value % step:
            near = max(step, round(value / step) * step)
            problems.append(f"{place}{side}: {value} does not divide by {step}. The nearest is {near}.")
    if frames != geometry.longest_clip(frames):
        problems.append(
            f"{place}frames: {frames} is not of the form {geometry.time_stride}k+1. "
            f"The nearest below is {geometry.longest_clip(frames)}."
        )
    if problems:
        raise ConfigError(*problems)


def encode_prompts(shots: Sequence[Shot], encoders: Encoders) -> dict[str, Tensor]:
    """Text states (L, D) of each prompt and negative prompt."""
    texts = sorted({text for shot in shots for text in (shot.prompt, shot.negative)})
    return dict(zip(texts, encoders.text(texts), strict=True))


@torch.no_grad()
def denoise(
    model: Model, engine: Engine, family: ModelFamily, shots: Sequence[Shot], text: Mapping[str, Tensor]
) -> Tensor:
    """Latents (B, C, f, h, w) of shots that share size, steps and guidance, under the adapter in use."""
    first, geometry = shots[0], family.geometry()
    scheduler = family.scheduler()
    scheduler.set_timesteps(first.steps, device=engine.device)
    latents = torch.cat([shot.noise(geometry) for shot in shots]).to(engine.device)
    wanted = [text[shot.prompt] for shot in shots]
    guided = first.guidance != 1
    states = padded(wanted + [text[shot.negative] for shot in shots] if guided else wanted).to(engine.device)
    for timestep in scheduler.timesteps:
        x = torch.cat([latents, latents]) if guided else latents
        t = (timestep.float() / TIMESTEPS).to(engine.device).expand(len(x))
        with engine.computing():
            velocity = model.velocity(Denoise(x, t, {"text": states})).float()
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + first.guidance * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def padded(states: Sequence[Tensor]) -> Tensor:
    """(B, L, D) fp32 of states (L_i, D), zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([state.float() for state in states], batch_first=True)


def generate(
    model: Model, engine: Engine, family: ModelFamily, shots: Sequence[Shot], text: Mapping[str, Tensor]
) -> list[Tensor]:
    """Latents (1, C, f, h, w) of each shot, in order; shots of one shape are denoised together."""
    latents: dict[int, Tensor] = {}
    for numbers in _alike(shots, family.geometry()):
        together = denoise(model, engine, family, [shots[i] for i in numbers], text)
        latents |= {i: together[k : k + 1].cpu() for k, i in enumerate(numbers)}
    return [latents[i] for i in range(len(shots))]


def _alike(shots: Sequence[Shot], geometry: VideoGeometry) -> list[list[int]]:
    """Numbers of shots that can be denoised in one call."""
    groups: dict[tuple[Any, ...], list[list[int]]] = {}
    for i, shot in enumerate(shots):
        most = max(1, TOKENS_PER_CALL // (2 * geometry.tokens(shot.frames, shot.height, shot.width)))
        like = groups.setdefault((shot.frames, shot.height, shot.width, shot.steps, shot.guidance), [[]])
        if len(like[-1]) == most:
            like.append([])
        like[-1].append(i)
    return [numbers for like in groups.values() for numbers in like if numbers]


def decoded(latents: Tensor, encoders: Encoders) -> numpy.ndarray:
    """Frames (F, H, W, 3) uint8 of one video's latents (1, C, f, h, w)."""
    pixels = encoders.pixels(latents)[0]  # (3, F, H, W) in [-1, 1]
    frames = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu().numpy()
