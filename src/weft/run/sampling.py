"""Generating videos with a model under training or a finished adapter: text, noise, denoising steps, pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from weft.contracts import Denoise, Encoders, Engine, Expert, Model, as_video
from weft.data.loader import padded
from weft.geometry import VideoGeometry
from weft.math.flow import TIMESTEPS, denoised, noised
from weft.run.shots import Shot, Told

TOKENS_PER_CALL = 40_000  # prompts are denoised together up to this many video tokens


@dataclass(frozen=True)
class Conditions:
    """What the network is told beside noise and time, for B shots; of twice B, the second half is unguided.

    first: (B, C, 1, h, w), the clean latent frame that a video begins with.
    """

    tensors: Mapping[str, Tensor]
    first: Tensor | None

    def given(self, frames: int) -> Tensor | None:
        """(B, F) bool: True for the first latent frame, where that is given."""
        if self.first is None:
            return None
        return (torch.arange(frames, device=self.first.device) == 0).expand(len(self.first), frames)


@dataclass(frozen=True)
class Questions:
    """What all questions about B shots share; guided where the first of them is. told: twice as large when any of its
    networks is guided."""

    model: Model
    engine: Engine
    shot: Shot
    told: Conditions

    def velocity(self, x: Tensor, time: float) -> Tensor:
        """dx/dt (B, C, f, h, w) fp32 at a time, under the adapters in use. The time is in double precision: as fp32,
        900 / 1000 is below the boundary 0.9."""
        family = as_video(self.model.family)
        expert = expert_at(time, family.all_experts)
        guidance = 1.0 if family.embeds_guidance else self.shot.guidance_of(expert)
        twice = 1 if guidance == 1 else 2
        items = twice * len(x)
        given = self.told.given(x.shape[2])
        question = Denoise(
            torch.cat([x] * twice), torch.full((items,), time, device=x.device),
            {name: tensor[:items] for name, tensor in self.told.tensors.items()},
            None if given is None else torch.cat([given] * twice), expert,
        )  # fmt: skip
        with self.engine.computing():
            velocity = self.model.velocity(question).float()
        if twice == 1:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def denoise(model: Model, engine: Engine, shots: Sequence[Shot], told: Told) -> Tensor:
    """Latents (B, C, f, h, w) of shots that share size, steps and guidance, under the adapters in use."""
    first, family = shots[0], as_video(model.family)
    guided = not family.embeds_guidance and any(first.guidance_of(e.name) != 1 for e in family.all_experts)
    # A student is told what it was told as it learned: the family's own number.
    embedded = family.embeds_guidance and not (first.step_list and first.guidance == 1)
    questions = Questions(model, engine, first, conditions(shots, told, guided, embedded, engine.device))
    if first.step_list is None:
        return _by_scheduler(questions, shots)
    return _in_few_steps(questions, shots, first.step_list.times)


def _by_scheduler(questions: Questions, shots: Sequence[Shot]) -> Tensor:
    """Along the model's own sampler."""
    family, device, known = as_video(questions.model.family), questions.engine.device, questions.told.first
    scheduler = family.sampler(questions.shot.steps, device)
    latents = noise_of(shots, family.geometry(), device)
    for timestep in scheduler.timesteps:
        velocity = questions.velocity(with_first(latents, known), float(timestep) / TIMESTEPS)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return with_first(latents, known)


def _in_few_steps(questions: Questions, shots: Sequence[Shot], times: Sequence[float]) -> Tensor:
    """As a few-step student answers: at each time its estimate of the data, mixed with fresh noise to the next; the
    last is the sample. Yin et al. 2024, arXiv:2405.14867, section 4.5."""
    geometry, device = as_video(questions.model.family).geometry(), questions.engine.device
    known = questions.told.first
    latents = noise_of(shots, geometry, device)
    for step, time in enumerate(times):
        if step:
            latents = noised(latents, noise_of(shots, geometry, device, step), latents.new_tensor([time]))
        x = with_first(latents, known)
        latents = denoised(x, x.new_tensor([time]), questions.velocity(x, time))
    return with_first(latents, known)


def noise_of(shots: Sequence[Shot], geometry: VideoGeometry, device: torch.device, step: int = 0) -> Tensor:
    """(B, C, f, h, w), of each shot its own."""
    return torch.cat([shot.noise(geometry, step) for shot in shots]).to(device)


def expert_at(t: float, experts: Sequence[Expert]) -> str:
    """Which network is asked at a time: the noisiest whose range has begun, as Wan asks `t >= boundary`."""
    return next(expert.name for expert in experts if t >= expert.times[0])


def with_first(latents: Tensor, first: Tensor | None) -> Tensor:
    """The latents (B, C, F, h, w) with their first frame in its place."""
    return latents if first is None else torch.cat([first, latents[:, :, 1:]], dim=2)


def conditions(shots: Sequence[Shot], told: Told, guided: bool, embedded: bool, device: torch.device) -> Conditions:
    """Text and first frames of shots as one batch; twice as large when it is guided."""
    halves = [told.texts[shot.prompt] for shot in shots] + [told.texts[shot.negative] for shot in shots if guided]
    text, mask = padded([half["text"] for half in halves])
    tensors = {"text": text, "text_mask": mask}
    tensors |= {name: torch.stack([half[name] for half in halves]) for name in halves[0] if name != "text"}
    if embedded:
        tensors["guidance"] = torch.tensor([shot.guidance for shot in shots])
    images = [told.image_of(shot) for shot in shots]
    stacked = {name: torch.cat([image[name] for image in images]) for name in images[0]}
    first = stacked.pop("first", None)
    tensors |= {name: torch.cat([tensor] * (2 if guided else 1)) for name, tensor in stacked.items()}
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Conditions(on_device, None if first is None else first.to(device))


def generate(model: Model, engine: Engine, shots: Sequence[Shot], told: Told) -> list[Tensor]:
    """Latents (1, C, f, h, w) of each shot, in order; shots of one shape are denoised together."""
    latents: dict[int, Tensor] = {}
    for numbers in _alike(shots, as_video(model.family).geometry()):
        together = denoise(model, engine, [shots[i] for i in numbers], told)
        latents |= {i: together[k : k + 1].cpu() for k, i in enumerate(numbers)}
    return [latents[i] for i in range(len(shots))]


def _alike(shots: Sequence[Shot], geometry: VideoGeometry) -> list[list[int]]:
    """Numbers of shots that can be denoised in one call."""
    groups: dict[tuple[Any, ...], list[list[int]]] = {}
    for i, shot in enumerate(shots):
        most = max(1, TOKENS_PER_CALL // (2 * geometry.tokens(shot.frames, shot.height, shot.width)))
        alike = (shot.frames, shot.height, shot.width, shot.steps, shot.guidance, shot.guidance_low, shot.step_list,
                 shot.image is None)  # fmt: skip
        like = groups.setdefault(alike, [[]])
        if len(like[-1]) == most:
            like.append([])
        like[-1].append(i)
    return [numbers for like in groups.values() for numbers in like if numbers]


def decoded(latents: Tensor, encoders: Encoders) -> numpy.ndarray:
    """Frames (F, H, W, 3) uint8 of one video's latents (1, C, f, h, w)."""
    pixels = encoders.pixels(latents)[0]  # (3, F, H, W) in [-1, 1]
    frames = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu().numpy()
