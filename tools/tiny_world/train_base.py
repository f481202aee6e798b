"""Train the small Wan transformer and its text encoder together, on latents of the captions' world."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from captions import TEXT_DIM, encoded, made_up_noun, small_text_encoder, small_tokenizer
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from folder import FOLDER, WORK, install, write_model_index
from muon import MuonAndAdam
from ranks import Ranks
from schedule import Average, Budget, learning_rate, save_whole
from torch import Tensor, nn
from train_vae import pixels

from weft.demo.shapes import TRACKS, Scene, random_caption, random_scene, render

SEED = 23
SHIFT = 3.0  # of the noise levels, as the shipped scheduler's
EMPTY_SHARE = 0.1  # of captions, for guidance
MADE_UP_SHARE = 0.15  # of captions whose noun means nothing, so that the base draws something for a word it never saw
PEAK = 3e-3  # learning rate of Muon; AdamW's is half of it
BATCH = 48
PROBE_WEIGHT = 0.1


class Base(nn.Module):
    """The two networks that learn together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = small_text_encoder()
        self.transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=512,
            num_layers=4,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        )

    def hidden_and_other(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The matrices inside blocks, and every other weight."""
        inside = ("transformer.blocks.", "text_encoder.encoder.block.")
        hidden, other = [], []
        for name, weight in self.named_parameters():
            is_matrix = weight.ndim == 2 and name.startswith(inside) and "relative_attention_bias" not in name
            (hidden if is_matrix else other).append(weight)
        return hidden, other


@torch.no_grad()
def normalised_latents(vae: AutoencoderKLWan, clips: np.ndarray) -> Tensor:
    """Encode uint8 clips into (B, 16, 3, 8, 8) with about unit spread in each channel."""
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    return (vae.encode(pixels(clips)).latent_dist.mode() - mean) / std


def encode_scenes(vae: AutoencoderKLWan, scenes: Sequence[Scene]) -> Tensor:
    parts = [scenes[first : first + 16] for first in range(0, len(scenes), 16)]
    return torch.cat([normalised_latents(vae, np.stack([render(scene) for scene in part])) for part in parts])


def latent_pool(count: int, rank: int) -> tuple[list[Scene], Tensor]:
    """One rank's own training scenes and their latents, encoded once and kept beside the trainings' states."""
    rng = np.random.default_rng((SEED, rank))
    scenes = [random_scene(rng) for _ in range(count)]
    kept = WORK / f"latents-{rank}.pt"
    if kept.exists():
        return scenes, torch.load(kept)
    vae = AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).eval()
    latents = encode_scenes(vae, scenes)
    save_whole(latents, kept)
    return scenes, latents


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as training sees it: seldom empty, sometimes with a made-up noun."""
    draw = rng.random()
    if draw < EMPTY_SHARE:
        return ""
    return random_caption(scene, rng, made_up_noun(rng) if draw < EMPTY_SHARE + MADE_UP_SHARE else None)


def flow_loss(transformer: nn.Module, clean: Tensor, text: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error (B,) of the velocity noise - clean at noise levels sigma (B,). Arxiv:2209.03003, eq. 1."""
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * clean + level * noise
    velocity = transformer(noisy, 1000 * sigma, text, return_dict=False)[0]
    return (velocity - (noise - clean)).square().flatten(1).mean(1)


def track_loss(probe: nn.Linear, text: Tensor, tracks: Tensor, captions: Sequence[str]) -> Tensor:
    """Cross entropy of the track read from a caption's mean state.

    "left to right" and "right to left" are the same words: without this, their order is learnt long after all else.
    """
    length = text.abs().sum(-1).gt(0).sum(-1, keepdim=True)  # tokens; the rest are zeros
    told = torch.tensor([caption != "" for caption in captions])
    return nn.functional.cross_entropy(probe(text.sum(1) / length)[told], tracks[told])


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(count, generator=generator)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class Validation:
    """Held-out clips with fixed captions, noise and noise levels."""

    def __init__(self) -> None:
        rng, generator = np.random.default_rng(SEED + 1), torch.Generator().manual_seed(SEED + 1)
        scenes = [random_scene(rng, held_out=True) for _ in range(64)]
        vae = AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).eval()
        self.captions = [scene.caption() for scene in scenes]
        self.latents = encode_scenes(vae, scenes)
        self.noise = torch.randn(self.latents.shape, generator=generator)
        self.levels = noise_levels(len(scenes), generator)

    @torch.no_grad()
    def loss(self, base: Base, tokenizer: object) -> float:
        text = encoded(tokenizer, base.text_encoder, self.captions)
        return float(flow_loss(base.transformer, self.latents, text, self.noise, self.levels).mean())


def export(average: Average, tokenizer: object, validation: Validation) -> dict[str, float]:
    """Write the averaged weights and what stands beside them into the pipeline's folder; return the loss."""
    base = Base().eval()
    base.load_state_dict(average.weights)
    loss = validation.loss(base, tokenizer)
    install(base.transformer.half(), "transformer")
    install(base.text_encoder.half(), "text_encoder")
    install(tokenizer, "tokenizer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    install(scheduler, "scheduler")
    write_model_index()
    return {"base_validation_loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--export-minutes", type=float, default=4)
    told = parser.parse_args()
    ranks = Ranks()
    scenes, latents = latent_pool(told.clips // ranks.world, ranks.rank)
    torch.manual_seed(SEED)
    tokenizer, base, validation = small_tokenizer(), Base(), Validation()
    # Random and fixed, so that only the text encoder learns from it and nothing of it need be kept.
    probe = nn.Linear(TEXT_DIM, len(TRACKS)).requires_grad_(False)
    hidden, other = base.hidden_and_other()
    optimizer = MuonAndAdam(hidden, other, decay=0.0)
    tracks = torch.tensor([TRACKS.index(scene.track) for scene in scenes])
    average, budget = Average(base, decay=0.99), Budget(told.steps, told.minutes)
    kept = {"base": base, "optimizer": optimizer, "average": average, "budget": budget}
    saved = WORK / "base.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        for name, part in kept.items():
            part.load_state_dict(state[name])
    rng = np.random.default_rng((SEED, ranks.rank, budget.step))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    exported, running = budget.elapsed(), 1.0
    while (progress := ranks.agreed(budget.progress())) < 1:
        chosen = rng.integers(len(scenes), size=BATCH // ranks.world)
        captions = [caption(scenes[i], rng) for i in chosen]
        text = encoded(tokenizer, base.text_encoder, captions)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        loss = flow_loss(base.transformer, clean, text, noise, noise_levels(len(chosen), generator)).mean()
        read = track_loss(probe, text, tracks[chosen], captions)
        base.zero_grad()
        (loss + PROBE_WEIGHT * read).backward()
        ranks.mean_gradients(base)
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        lr = learning_rate(PEAK, budget.step, progress)
        optimizer.step(lr, lr / 2)
        average.update(base)
        budget.step += 1
        running += 0.02 * (float(loss.detach()) - running)
        if ranks.rank > 0:
            continue
        if budget.step % 25 == 0:
            told_so_far = f"loss {running:.4f}, track {float(read.detach()):.3f}"
            print(f"step {budget.step} of {told.steps}, {budget.elapsed():.0f} s: {told_so_far}", flush=True)
        if budget.elapsed() - exported > 60 * told.export_minutes:
            print(export(average, tokenizer, validation), flush=True)
            save_whole({name: part.state_dict() for name, part in kept.items()}, saved)
            exported = budget.elapsed()
    if ranks.rank > 0:
        return
    report = export(average, tokenizer, validation)
    save_whole({name: part.state_dict() for name, part in kept.items()}, saved)
    report |= {"base_seed": SEED, "base_steps": budget.step, "base_seconds": round(budget.elapsed())}
    Path(WORK / "base.json").write_text(json.dumps(report | {"base_clips": told.clips}, indent=2))
    print(report)


if __name__ == "__main__":
    main()
