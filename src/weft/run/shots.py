"""What to generate: prompts with their sizes, first frames and noise, and what the encoders make of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.contracts import Encoders, VideoFamily
from weft.data.media import read_image
from weft.errors import ConfigError, DataError
from weft.few_steps import StepList
from weft.geometry import VideoGeometry
from weft.math.chance import generator
from weft.run.config import Samples


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One video to generate. guidance g: u + g(c - u), Wan's convention; at 1 the negative prompt costs nothing.

    guidance_low: of the low expert, where it differs. image: the first frame of an image-to-video model. step_list:
    the times at which a few-step student is asked; None: as many steps as the model's own sampler is to take.
    """

    prompt: str
    negative: str = ""
    frames: int
    width: int
    height: int
    steps: int
    guidance: float
    guidance_low: float | None = None
    seed: int
    image: Path | None = None
    step_list: StepList | None = None

    def noise(self, geometry: VideoGeometry, step: int = 0) -> Tensor:
        """(1, C, f, h, w) fp32 that depends on the seed and the size alone: the same before and after training. step:
        before which fresh noise is mixed in; 0: the noise that the sample begins with."""
        shape = geometry.latent_shape(self.frames, self.height, self.width)
        place = ("sample", step) if step else ("sample",)
        return torch.randn((1, *shape), generator=generator("cpu", self.seed, *place))

    def guidance_of(self, expert: str) -> float:
        return self.guidance if expert != "low" or self.guidance_low is None else self.guidance_low

    def pixels(self) -> Tensor:
        """(1, 3, F, H, W) in [-1, 1]: the image, cut to the size, and gray frames behind it. Raises DataError."""
        assert self.image is not None
        frame = torch.from_numpy(read_image(self.image, self.width, self.height).copy())  # (1, H, W, 3)
        clip = torch.zeros(1, 3, self.frames, self.height, self.width)
        clip[:, :, 0] = frame.permute(0, 3, 1, 2).float() / 127.5 - 1
        return clip


def shots_of(samples: Samples) -> list[Shot]:
    """What a config asks to be generated; the seed counts up from prompt to prompt."""
    s = samples
    return [
        Shot(prompt=prompt.text, negative=s.negative, frames=s.frames, width=s.width, height=s.height, steps=s.steps,
             guidance=s.guidance, guidance_low=s.guidance_low, seed=s.seed + i, image=prompt.image)
        for i, prompt in enumerate(s.prompts)
    ]  # fmt: skip


def in_few_steps(shot: Shot, steps: StepList, guidance: Mapping[str, float]) -> Shot:
    """The shot as a few-step student makes it. guidance: of each network, by the experts' names in their order."""
    first, *low = guidance.values()
    return replace(shot, steps=len(steps.times), step_list=steps, guidance=first, guidance_low=low[0] if low else None)


def check_shots(family: VideoFamily, shots: Sequence[Shot], place: str) -> None:
    """Raises ConfigError for what the model cannot make. place: put before each name, such as 'samples.'."""
    problems: list[str] = []
    for shot in shots[:1]:  # all have one size and one guidance
        problems += shape_problems(family.geometry(), shot, place)
        if family.embeds_guidance and shot.negative:
            problems.append(
                f"{place}negative: this model takes guidance as a number and no negative prompt. Leave it out."
            )
        if shot.guidance_low is not None and "low" not in (expert.name for expert in family.all_experts):
            problems.append(
                f"{place}guidance_low: this model has one network. Leave it out; guidance is for all times."
            )
    for shot in shots:
        if family.image == "channels" and shot.image is None:
            problems.append(
                f"{place}prompts: '{shot.prompt[:40]}' has no first frame, and this model goes on from one. "
                "Write {text: ..., image: FILE}."
            )
        if shot.image is not None and family.image == "none":
            problems.append(f"{place}prompts: {shot.image} is a first frame, but this is a text-to-video model.")
        elif shot.image is not None and not shot.image.is_file():
            problems.append(f"{place}prompts: there is no image '{shot.image}'. Paths count from {Path.cwd()}.")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def shape_problems(geometry: VideoGeometry, shot: Shot, place: str) -> list[str]:
    """Why the model cannot make a video of this size."""
    problems = []
    for side, value in (("width", shot.width), ("height", shot.height)):
        step = geometry.side_multiple
        if value % step:
            near = max(step, round(value / step) * step)
            problems.append(f"{place}{side}: {value} does not divide by {step}. The nearest is {near}.")
    if shot.frames != geometry.longest_clip(shot.frames):
        problems.append(
            f"{place}frames: {shot.frames} is not of the form {geometry.time_stride}k+1. "
            f"The nearest below is {geometry.longest_clip(shot.frames)}."
        )
    return problems


@dataclass
class Told:
    """What the encoders made of shots: texts by prompt, first frames by (image, size). It outlives the encoders."""

    texts: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    images: dict[tuple[Any, ...], Mapping[str, Tensor]] = field(default_factory=dict)

    def image_of(self, shot: Shot) -> Mapping[str, Tensor]:
        """{"image": ...} for further channels, {"first": (1, C, 1, h, w)} for a clean latent frame, or nothing."""
        return self.images.get(place_of(shot), {})


def place_of(shot: Shot) -> tuple[Any, ...]:
    return (shot.image, shot.frames, shot.height, shot.width)


def encoded(shots: Iterable[Shot], family: VideoFamily, encoders: Encoders) -> Told:
    """Texts and first frames of shots. Raises DataError for an image that cannot be read."""
    told = Told()
    shots = list(shots)
    texts = sorted({text for shot in shots for text in (shot.prompt, shot.negative)})
    told.texts = dict(zip(texts, encoders.text(texts), strict=True))
    for shot in shots:
        if shot.image is None or place_of(shot) in told.images:
            continue
        pixels = shot.pixels()
        if family.image == "channels":
            made = encoders.given(pixels)
        else:
            made = {"first": encoders.latents(pixels[:, :, :1])}
        if not all(tensor.isfinite().all() for tensor in made.values()):
            raise DataError(f"{shot.image}: its latents are not finite.")
        told.images[place_of(shot)] = {name: tensor.cpu() for name, tensor in made.items()}
    return told
