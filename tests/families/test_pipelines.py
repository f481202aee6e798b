"""A whole sample of every kind of model, text to latents, is what diffusers' own pipeline makes of the same noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.contracts import Model
from weft.engines.torch_engine import Torch
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.wan import Wan
from weft.families.weights import HERE
from weft.run.sampling import denoise
from weft.run.shots import Shot, encoded

CPU = torch.device("cpu")
NEGATIVE = "blue"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "first.png"
    levels = torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(path)
    return path


def shot(image: Path | None, guidance: float) -> Shot:
    return Shot(
        prompt="a red circle moves right", negative=NEGATIVE, frames=5, width=64, height=32, steps=4,
        guidance=guidance, guidance_low=guidance - 1, seed=3, image=image,
    )  # fmt: skip


@torch.no_grad()
def sampled(family: Wan | HunyuanVideo, encoders: Any, asked: Shot) -> Tensor:
    """Latents of Weft's own sampler, its networks without adapters in use."""
    networks = {expert.name: family.load("fp32", expert.name, HERE) for expert in family.all_experts}
    network = nn.ModuleDict(networks) if len(networks) > 1 else next(iter(networks.values()))
    recipe = Lora(rank=2, backend="native", targets="to_q")
    first = next(iter(networks.values()))
    adapters = recipe.attach(first, recipe.match(linears_of(first), {}, {}).paths, ("unused",), 0)
    engine = Torch(device="cpu", precision="fp32").open()
    told = encoded([asked], family, encoders)
    return denoise(Model(network, family, adapters), engine, [asked], told)


def wan_pipeline(pipeline: type, family: Wan, encoders: Any, **options: Any) -> Any:
    two = len(family.all_experts) == 2
    made = pipeline(
        tokenizer=encoders.tokenizer, text_encoder=encoders.text_model, vae=encoders.vae,
        scheduler=UniPCMultistepScheduler.from_pretrained(f"{family.source}/scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(f"{family.source}/transformer"),
        transformer_2=WanTransformer3DModel.from_pretrained(f"{family.source}/transformer_2") if two else None,
        boundary_ratio=family.all_experts[1].times[1] if two else None, **options,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def asked_of_pipeline(asked: Shot, family: Wan | HunyuanVideo, **options: Any) -> dict[str, Any]:
    return {
        "prompt": asked.prompt, "height": asked.height, "width": asked.width, "num_frames": asked.frames,
        "num_inference_steps": asked.steps, "guidance_scale": asked.guidance, "output_type": "latent",
        "latents": asked.noise(family.geometry()), "return_dict": False, "negative_prompt": NEGATIVE, **options,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["t2v", "ti2v", "experts"])
def test_text_to_video_of_wan(wan_folder: Callable[[str], Path], kind):
    family = Wan(source=str(wan_folder(kind)), expert="both" if kind == "experts" else None)
    encoders = family.encoders(CPU, lambda module: module)
    # float32 encoders: sums in fp16 depend on how a kernel splits them.
    encoders.text_model.float()
    asked = shot(None, guidance=3.0)
    pipeline = wan_pipeline(WanPipeline, family, encoders, expand_timesteps=kind == "ti2v")
    options = {"guidance_scale_2": asked.guidance_low} if kind == "experts" else {}
    (theirs,) = pipeline(
        **asked_of_pipeline(
            asked, family, max_sequence_length=family.tokens_of_text, negative_prompt=NEGATIVE, **options
        )
    )
    assert_close(sampled(family, encoders, asked), theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", ["i2v21", "ti2v", "i2v-experts"])
def test_image_to_video_of_wan(wan_folder: Callable[[str], Path], picture, kind):
    family = Wan(source=str(wan_folder(kind)), expert="both" if kind == "i2v-experts" else None)
    encoders = family.encoders(CPU, lambda module: module)
    encoders.text_model.float()
    asked = shot(picture, guidance=3.0)
    eyes = encoders.eyes
    seeing = {"image_processor": eyes.processor, "image_encoder": eyes.model} if eyes else {}
    pipeline = wan_pipeline(WanImageToVideoPipeline, family, encoders, expand_timesteps=kind == "ti2v", **seeing)
    options = {"guidance_scale_2": asked.guidance_low} if kind == "i2v-experts" else {}
    (theirs,) = pipeline(
        image=Image.open(picture),
        **asked_of_pipeline(
            asked, family, max_sequence_length=family.tokens_of_text, negative_prompt=NEGATIVE, **options
        ),
    )
    assert_close(sampled(family, encoders, asked), theirs, rtol=1e-3, atol=2e-4)


def test_text_to_video_of_hunyuan_video(hunyuan_folder):
    family = HunyuanVideo(source=str(hunyuan_folder))
    encoders = family.encoders(CPU, lambda module: module)
    asked = shot(None, guidance=6.0)
    pipeline = HunyuanVideoPipeline(
        text_encoder=encoders.llama, tokenizer=encoders.tokenizer, vae=encoders.vae,
        transformer=HunyuanVideoTransformer3DModel.from_pretrained(hunyuan_folder / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(hunyuan_folder / "scheduler"),
        text_encoder_2=encoders.clip, tokenizer_2=encoders.clip_tokenizer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(**asked_of_pipeline(asked, family, negative_prompt=None))
    assert_close(sampled(family, encoders, asked), theirs, rtol=1e-3, atol=2e-4)
