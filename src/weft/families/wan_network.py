"""Wan's networks from diffusers and transformers: loading, precision, and the two encoders."""

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import ftfy
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from weft.errors import ModelError
from weft.families.loading import read_config, stored_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_transformer(folder: Path, dtype: str) -> WanTransformer3DModel:
    """The frozen transformer on the cpu. Its conditioning embedder stays in fp32, outside of any mixed precision."""
    network = WanTransformer3DModel.from_pretrained(folder, torch_dtype=DTYPES[dtype], local_files_only=True)
    network.requires_grad_(False).eval()
    keep_fp32(network.condition_embedder)
    return network


def keep_fp32(module: nn.Module) -> None:
    """Compute a module in fp32 under autocast too: Wan's time embedding loses its small steps in bf16 (the official
    model asserts fp32 there)."""
    module.float()
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            return inner(*(a.float() if _is_floating(a) else a for a in args), **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The diffusers scheduler that the source's scheduler_config.json names. Raises ModelError."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ModelError(f"family.source: {folder} has no scheduler/scheduler_config.json. Fetch it; samples need it.")
    name = json.loads(path.read_text()).get("_class_name", "")
    try:
        scheduler = getattr(diffusers, name)
    except AttributeError as unknown:
        raise ModelError(f"{path}: the installed diffusers has no scheduler '{name}'.") from unknown
    return scheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)


def clean_prompt(text: str) -> str:
    """Mended encoding, no HTML entities, single spaces: what UMT5 saw in Wan's training (Wan's tokenizers.py)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass
class WanEncoders:
    """AutoencoderKLWan and UMT5, frozen. Latents are the posterior's mean, normalised by the VAE's own constants."""

    vae: AutoencoderKLWan
    text_model: UMT5EncoderModel
    tokenizer: Callable[..., Any]
    text_length: int
    device: torch.device

    @classmethod
    def load(
        cls, folder: Path, text_length: int, device: torch.device, carry: Callable[[nn.Module], nn.Module]
    ) -> "WanEncoders":
        """On the device: the VAE in fp32, for its small errors are learned; the text encoder as in its file."""
        read_config(folder, "text_encoder", "UMT5EncoderModel")
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
        dtype = DTYPES[stored_dtype(folder, "text_encoder")]
        text_model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        carry(vae.requires_grad_(False).eval())
        carry(text_model.requires_grad_(False).eval())
        return cls(vae, text_model, tokenizer, text_length, device)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        mean, std = self._constants()
        posterior = self.vae.encode(pixels.to(self.device, torch.float32), return_dict=False)[0]
        return (posterior.mode() - mean) / std

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        mean, std = self._constants()
        return self.vae.decode(latents.to(self.device, torch.float32) * std + mean, return_dict=False)[0].clamp(-1, 1)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> list[Tensor]:
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
        return [state[: int(length)].cpu() for state, length in zip(states, mask.sum(1), strict=True)]

    def _constants(self) -> tuple[Tensor, Tensor]:
        """latents_mean and latents_std as (1, C, 1, 1, 1)."""
        config: Any = self.vae.config
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, device=self.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
