"""HunyuanVideo's encoders: a video autoencoder, Llama under a prompt template, and CLIP's pooled text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
TEMPLATE_TOKENS: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # of the template before the caption; cut from the states
SKIPPED_LAYERS = 2  # of Llama's last: the transformer was trained on the states before them
CLIP_TOKENS = 77


@dataclass
class HunyuanEncoders:
    """The frozen encoders. Latents are the posterior's mean times one constant of the autoencoder.

    text_length: tokens of a caption at most, the template not counted.
    """

    vae: AutoencoderKLHunyuanVideo
    llama: LlamaModel
    clip: CLIPTextModel
    tokenizer: Callable[..., Any]
    clip_tokenizer: Callable[..., Any]
    text_length: int
    device: torch.device

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode(pixels.to(self.device, torch.float32), return_dict=False)[0]
        return posterior.mode() * self._scale()

    def given(self, pixels: Tensor) -> Mapping[str, Tensor]:
        return {}

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        unscaled = latents.to(self.device, torch.float32) / self._scale()
        return self.vae.decode(unscaled, return_dict=False)[0].clamp(-1, 1)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> list[Mapping[str, Tensor]]:
        """text (L_i, 4096): Llama's states of the caption. pooled (768,): CLIP's of the same caption."""
        inputs = self.tokenizer(
            [TEMPLATE.format(caption) for caption in captions],
            padding="max_length",
            max_length=self.text_length + TEMPLATE_TOKENS,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = inputs.attention_mask.to(self.device)
        answer = self.llama(inputs.input_ids.to(self.device), attention_mask=mask, output_hidden_states=True)
        states = answer.hidden_states[-1 - SKIPPED_LAYERS][:, TEMPLATE_TOKENS:]  # (B, L, D)
        lengths = mask[:, TEMPLATE_TOKENS:].sum(1)
        pooled = self._pooled(captions)
        return [
            {"text": state[: int(length)].cpu(), "pooled": whole.cpu()}
            for state, length, whole in zip(states, lengths, pooled, strict=True)
        ]

    def _pooled(self, captions: Sequence[str]) -> Tensor:
        """(B, 768)."""
        inputs = self.clip_tokenizer(
            list(captions), padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        return self.clip(inputs.input_ids.to(self.device)).pooler_output

    def _scale(self) -> float:
        config: Any = self.vae.config
        return float(config.scaling_factor)
