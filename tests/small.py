"""Small real models, clips and configs, made on the spot."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.small_text import make_qwen3 as make_qwen3
from weft.data.media import write_video
from weft.families.loading import model_folder
from weft.run.config import RunConfig, parse_config
from weft.run.config import load_config as load_config

WIDTH = 24  # of a token, in two heads
CLIP_WIDTH = 16
WORDS = "a an the red blue green square circle ring moves right left number 0 1 2 3 4 5 6 7 8 9"
# So cut, the template of HunyuanVideo is one token longer than the 95 tokens that Llama's own tokenizer makes of it.
PIECES = r"\n\n|\w{1,12}|[^\w\s]"
WanKind = Literal["t2v", "i2v21", "i2v22", "ti2v", "experts", "i2v-experts"]
CHANNELS: dict[str, dict[str, Any]] = {
    "t2v": {"in_channels": 16, "out_channels": 16},
    "i2v21": {"in_channels": 36, "out_channels": 16, "image_dim": CLIP_WIDTH, "added_kv_proj_dim": WIDTH},
    "i2v22": {"in_channels": 36, "out_channels": 16},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}
KINDS_OF_PARTS = {"experts": "t2v", "i2v-experts": "i2v22"}
BOUNDARIES = {"experts": 0.875, "i2v-experts": 0.9}


def make_wan(folder: Path, layers: int = 2, kind: WanKind = "t2v") -> Path:
    """A folder in diffusers layout: small random transformers beside the shipped model's other parts, an autoencoder
    with 48 channels for ti2v, and an image encoder for i2v21."""
    shipped = model_folder("tiny-wan")
    folder.mkdir(parents=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(shipped / part, folder / part)
    torch.manual_seed(0)
    index = json.loads((shipped / "model_index.json").read_text())
    channels = CHANNELS[KINDS_OF_PARTS.get(kind, kind)]
    small_wan(layers, **channels).save_pretrained(folder / "transformer")
    if kind in KINDS_OF_PARTS:
        small_wan(layers, **channels).save_pretrained(folder / "transformer_2")
        index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": BOUNDARIES[kind]}
    if channels["in_channels"] == 36:
        index |= {"_class_name": "WanImageToVideoPipeline"}
    if kind == "i2v21":
        small_clip_vision().save_pretrained(folder / "image_encoder")
        CLIPImageProcessorPil().save_pretrained(folder / "image_processor")
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    if kind == "ti2v":
        shutil.rmtree(folder / "vae")
        small_vae_22().save_pretrained(folder / "vae")
        index |= {"expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def small_wan(layers: int = 2, **options: Any) -> WanTransformer3DModel:
    """A random transformer that takes the shipped text encoder's 128 numbers a token."""
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, text_dim=128, freq_dim=32, ffn_dim=48, num_layers=layers,
        cross_attn_norm=True, **options,
    )  # fmt: skip


def small_vae_22() -> AutoencoderKLWan:
    """In the form of Wan 2.2's: 48 channels at 16 pixels a cell."""
    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16, scale_factor_temporal=4,
        latents_mean=[0.02 * c - 0.5 for c in range(48)], latents_std=[0.4 + 0.02 * c for c in range(48)],
    )  # fmt: skip


def small_clip_vision() -> CLIPVisionModel:
    """257 tokens of 16 numbers for a picture of 224 pixels a side."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=224,
            patch_size=14,
        )
    )  # fmt: skip


def make_hunyuan(folder: Path, layers: int = 2, single_layers: int = 2) -> Path:
    """A HunyuanVideo in diffusers layout, all of its parts small and random."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=WIDTH // 2, num_layers=layers,
        num_single_layers=single_layers, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32,
        pooled_projection_dim=20, rope_axes_dim=(4, 4, 4), guidance_embeds=True,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKLHunyuanVideo(
        latent_channels=16, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).save_pretrained(folder / "vae")
    llama = template_tokenizer()
    llama.save_pretrained(folder / "tokenizer")
    LlamaModel(
        LlamaConfig(
            vocab_size=len(llama), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=llama.pad_token_id,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    clip = clip_tokenizer()
    clip.save_pretrained(folder / "tokenizer_2")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip), hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
        )
    ).save_pretrained(folder / "text_encoder_2")  # fmt: skip
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "HunyuanVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "LlamaModel"],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "LlamaTokenizerFast"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def template_tokenizer() -> PreTrainedTokenizerFast:
    """Words of HunyuanVideo's prompt template, with one token more before the prompt than Llama has."""
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return word_tokenizer(
        DEFAULT_PROMPT_TEMPLATE["template"] + WORDS,
        {"pad_token": "<|pad|>", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        marks, "<|begin_of_text|> $A", padding_side="right",
    )  # fmt: skip


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """At most 77 tokens, of which the first and the last say that they are."""
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>"}
    return word_tokenizer(WORDS, special, [], "<start> $A <end>", model_max_length=77)


def word_tokenizer(
    text: str, special: dict[str, str], marks: list[str], template: str, **options: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer of the words in a text."""
    split = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    words = dict.fromkeys(word for word, _ in split.pre_tokenize_str(text))
    names = dict.fromkeys(["<unknown>", *special.values(), *marks, *words])
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in special.values() if name in template],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unknown>", additional_special_tokens=marks, **special, **options
    )


def make_clips(folder: Path, count: int = 5, frames: int = 9, side: int = 64) -> Path:
    """Clips of a brightening square with captions beside them."""
    folder.mkdir(parents=True)
    for number in range(count):
        video = numpy.full((frames, side, side, 3), 30 * number % 256, numpy.uint8)
        for frame in range(frames):
            video[frame, 8 : 16 + 4 * number, 4 * frame : 4 * frame + 16] = (250, 20 * frame % 256, 10 * number % 256)
        write_video(folder / f"{number}.mp4", video, 8.0)
        (folder / f"{number}.txt").write_text(f"a square, number {number}")
    return folder


def plain_config(root: Path, model: Path | str, clips: Path, family: str = "wan", **options: Any) -> dict[str, Any]:
    """A run's config as plain data, quick on a cpu. options: further keys of the family, such as expert."""
    return {
        "name": "run",
        "output": str(root / "runs"),
        "seed": 5,
        "family": {"kind": family, "source": str(model), **options},
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
        "engine": {"kind": "torch", "device": "cpu"},
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
