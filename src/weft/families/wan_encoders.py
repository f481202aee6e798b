"""Wan's encoders: a video autoencoder, UMT5, and in Wan 2.1's image-to-video models the eyes of CLIP."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def clean_prompt(text: str) -> str:
    """Mended encoding, no HTML entities, single spaces: what UMT5 saw in Wan's training (Wan's tokenizers.py)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass
class Eyes:
    """CLIP's image encoder, and how a picture is made ready for it."""

    model: CLIPVisionModel
    processor: CLIPImageProcessorPil

    @classmethod
    def open(cls, model: CLIPVisionModel, folder: Path | None) -> "Eyes":
        """folder: of the source's own preprocessor_config.json; without it CLIP's own, 224 pixels a side."""
        if folder is None:
            return cls(model, CLIPImageProcessorPil())
        return cls(model, CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True))

    def seen(self, pictures: Tensor, device: torch.device) -> Tensor:
        """The layer before the last, (B, 257, D), of pictures (B, 3, H, W) in [-1, 1]."""
        levels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images = [Image.fromarray(picture.numpy()) for picture in levels.permute(0, 2, 3, 1).cpu()]
        values = self.processor(images=images, return_tensors="pt").pixel_values.to(device, self.model.dtype)
        return self.model(pixel_values=values, output_hidden_states=True).hidden_states[-2]


@dataclass
class WanEncoders:
    """The frozen encoders. Latents are the posterior's mean, normalised by the autoencoder's own constants.

    text_length: tokens of a caption at most. tells_image: whether the network is told of the first frame in channels.
    """

    vae: AutoencoderKLWan
    text_model: UMT5EncoderModel
    tokenizer: Callable[..., Any]
    text_length: int
    device: torch.device
    tells_image: bool = False
    eyes: Eyes | None = None

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        mean, std = self._constants()
        posterior = self.vae.encode(pixels.to(self.device, torch.float32), return_dict=False)[0]
        return (posterior.mode() - mean) / std

    @torch.no_grad()
    def given(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """image (B, C, f, h, w): latents of the first frame with gray, which is 0, behind it. clip (B, 257, D)."""
        if not self.tells_image:
            return {}
        video = torch.zeros_like(pixels)
        video[:, :, 0] = pixels[:, :, 0]
        told = {"image": self.latents(video)}
        if self.eyes is not None:
            told["clip"] = self.eyes.seen(pixels[:, :, 0], self.device)
        return told

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        mean, std = self._constants()
        return self.vae.decode(latents.to(self.device, torch.float32) * std + mean, return_dict=False)[0].clamp(-1, 1)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> list[Mapping[str, Tensor]]:
        inputs = self.tokenizer(
            [clean_prompt(caption) for caption in captions],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = inputs.attention_mask.to(self.device)
        states = self.text_model(inputs.input_ids.to(self.device), mask).last_hidden_state  # (B, L, D)
        return [{"text": state[: int(length)].cpu()} for state, length in zip(states, mask.sum(1), strict=True)]

    def _constants(self) -> tuple[Tensor, Tensor]:
        """latents_mean and latents_std as (1, C, 1, 1, 1)."""
        config: Any = self.vae.config
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, device=self.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
