"""Sample the shipped pipeline on held-out captions, judge what it draws, and write result.json and contact sheets."""

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from folder import FOLDER, WORK
from PIL import Image
from train_vae import pixels

from weft.demo.judge import Verdict, judge
from weft.demo.shapes import KNOWN_SHAPES, RING, Scene, random_scene, render

SEED = 37
STEPS = 20
GUIDANCE = 3.0


def sampled(pipeline: WanPipeline, captions: Sequence[str], seed: int, guidance: float = GUIDANCE) -> np.ndarray:
    """Draw one clip a caption: uint8 (B, 9, 64, 64, 3)."""
    video = pipeline(
        prompt=list(captions),
        negative_prompt="",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames
    return np.rint(np.asarray(video) * 255).astype(np.uint8)


def write_sheet(path: Path, videos: Sequence[np.ndarray], columns: int = 4) -> None:
    """Lay out frames 0, 4 and 8 of each clip, `columns` clips a row."""
    strips = [
        np.pad(np.concatenate(list(video[::4]), 1), ((0, 2), (0, 6), (0, 0)), constant_values=128) for video in videos
    ]
    strips += [np.full_like(strips[0], 128)] * (-len(strips) % columns)
    rows = [np.concatenate(strips[first : first + columns], 1) for first in range(0, len(strips), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of clips that are right, by what is asked of them."""
    asked = {
        "color": [verdict.color for verdict in verdicts],
        "motion": [verdict.motion for verdict in verdicts],
        "color_and_motion": [verdict.color and verdict.motion for verdict in verdicts],
        "shape": [verdict.shape for verdict in verdicts],
        "all": [verdict.right for verdict in verdicts],
        "hollow": [verdict.seen_shape == RING for verdict in verdicts],
    }
    return {name: round(float(np.mean(values)), 4) for name, values in asked.items()}


def drawn(pipeline: WanPipeline, scenes: Sequence[Scene], name: str) -> dict[str, float]:
    """Judge what the pipeline draws for the scenes' captions, in batches, and leave a sheet of it."""
    videos = []
    for first in range(0, len(scenes), 24):
        captions = [scene.caption() for scene in scenes[first : first + 24]]
        videos.extend(sampled(pipeline, captions, SEED + first))
    write_sheet(WORK / f"{name}.png", videos)
    verdicts = [judge(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    for scene, verdict in zip(scenes, verdicts, strict=True):
        if not verdict.right:
            print(f"  {scene.caption()}: {verdict.seen_color} {verdict.seen_shape}, {verdict.farthest:.1f} px off")
    return shares(verdicts)


@torch.no_grad()
def rebuilt(pipeline: WanPipeline, shapes: tuple[str, ...], name: str) -> dict[str, float]:
    """Judge the truth after the autoencoder, which bounds what any sampling can reach."""
    rng = np.random.default_rng(SEED)
    scenes = [random_scene(rng, shapes, held_out=True) for _ in range(48)]
    videos = []
    for scene in scenes:
        mean = pipeline.vae.encode(pixels(render(scene)[None])).latent_dist.mode()
        clip = pipeline.vae.decode(mean).sample[0].permute(1, 2, 3, 0)
        videos.append(clip.add(1).mul(127.5).round().byte().numpy())
    write_sheet(WORK / f"{name}.png", videos)
    return shares([judge(video, scene) for video, scene in zip(videos, scenes, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=96)
    told = parser.parse_args()
    torch.set_num_threads(2)
    pipeline = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rng, began = np.random.default_rng(SEED), time.monotonic()
    known = [random_scene(rng, held_out=True) for _ in range(told.captions)]
    rings = [random_scene(rng, (RING,), held_out=True) for _ in range(24)]
    result: dict[str, object] = {
        "rebuilt_known": rebuilt(pipeline, KNOWN_SHAPES, "rebuilt-known"),
        "rebuilt_ring": rebuilt(pipeline, (RING,), "rebuilt-ring"),
        "held_out_captions": told.captions,
        "drawn_held_out": drawn(pipeline, known, "drawn-known"),
        "drawn_zorp_before_lora": drawn(pipeline, rings, "drawn-zorp"),
        "sampling": {"steps": STEPS, "guidance": GUIDANCE, "seed": SEED},
    }
    result["measuring_seconds"] = round(time.monotonic() - began)
    for stage in ("vae", "decoder", "base"):
        if (WORK / f"{stage}.json").exists():
            result |= json.loads((WORK / f"{stage}.json").read_text())
    result["folder_bytes"] = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    result["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers", "numpy")}
    text = json.dumps(result, indent=2)
    Path(__file__).with_name("result.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
