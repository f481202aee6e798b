"""Train the small Wan autoencoder on the broad clips and write it into the pipeline's folder."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from broad import autoencoder_clip
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from folder import WORK, install
from muon import MuonAndAdam
from ranks import Ranks
from schedule import Average, Budget, learning_rate, save_whole
from torch import Tensor, nn
from torch.nn import functional

from weft.demo.shapes import KNOWN_SHAPES, RING, random_scene, render

SEED = 11
POOL = 2000  # clips
POSTERIOR_STD = 0.1  # of the noise that training adds to latents: a base model errs, and the decoder must bear it
IMAGES_UNTIL = 0.35  # of the progress
SHAPE = {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}


def small_autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        **SHAPE, temperal_downsample=[False, True, True], latents_mean=[0.0] * 16, latents_std=[1.0] * 16
    )


def causal_convolutions(vae: AutoencoderKLWan) -> list[tuple[str, WanCausalConv3d]]:
    """The convolutions that look back in time, by name."""
    return [
        (name, part)
        for name, part in vae.named_modules()
        if isinstance(part, WanCausalConv3d) and part.kernel_size[0] == 3
    ]


@torch.no_grad()
def make_blind_to_past(vae: AutoencoderKLWan) -> None:
    """Start from an autoencoder of single images: videos come in later, and learning is several times faster."""
    for name, part in causal_convolutions(vae):
        if not name.endswith("time_conv"):
            part.weight[:, :, 2] *= 3**0.5  # the variance that the other two taps would have brought
            part.weight[:, :, :2] = 0
            continue
        part.weight.zero_()
        part.bias.zero_()
        channels = part.weight.shape[1]
        if part.weight.shape[0] == channels:  # halving time: the mean of two frames
            part.weight[:, :, 1:, 0, 0] = 0.5 * torch.eye(channels)[..., None]
        else:  # doubling time: each frame twice
            part.weight[:, :, 2, 0, 0] = torch.eye(channels).repeat(2, 1)


def channel_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """Compute WanRMS_norm the same, but faster on a CPU than by `functional.normalize` over a strided axis."""
    return x * (x.square().sum(1, keepdim=True) + 1e-12).rsqrt() * norm.scale * norm.gamma


def quicken(vae: AutoencoderKLWan) -> None:
    for part in vae.modules():
        if isinstance(part, WanRMS_norm):
            part.forward = partial(channel_norm, part)


def split_weights(vae: AutoencoderKLWan) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden convolutions, for Muon, and every other weight that learns."""
    hidden, other = [], []
    for weight in vae.parameters():
        if weight.requires_grad:
            (hidden if weight.ndim >= 4 and min(weight.flatten(1).shape) > 3 else other).append(weight)
    return hidden, other


@contextmanager
def single_images(vae: AutoencoderKLWan) -> Iterator[None]:
    """Compute one-frame clips by 2D convolutions: exact, as the frames before the first are zeros, and faster."""
    patched = [part for name, part in causal_convolutions(vae) if not name.endswith("time_conv")]
    for part in patched:
        part.forward = lambda x, cache=None, part=part: functional.conv2d(
            x[:, :, 0], part.weight[:, :, 2], part.bias, padding=part._padding[0]
        )[:, :, None]
    try:
        yield
    finally:
        for part in patched:
            del part.forward


def pixels(clips: np.ndarray) -> Tensor:
    """Turn uint8 (B, F, H, W, 3) into (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1).contiguous()


def decoded(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Decode without the clamp of `vae.decode`, which gives overshooting pixels no gradient."""
    vae.clear_cache()
    x = vae.post_quant_conv(z)
    chunks = []
    for i in range(x.shape[2]):
        cache = {"feat_cache": vae._feat_map, "feat_idx": [0]}
        chunks.append(vae.decoder(x[:, :, i : i + 1], first_chunk=i == 0, **cache))
    vae.clear_cache()
    return torch.cat(chunks, 2)


def recolored(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert and permute channels of a quarter: else brightness explains nearly all, and colour is learnt very late."""
    if rng.random() < 0.75:
        return clip
    inverted = rng.integers(0, 2, 3).astype(np.uint8) * 255
    return (clip ^ inverted)[..., rng.permutation(3)]


def crops(pool: np.ndarray, rng: np.random.Generator, batch: int, size: tuple[int, int]) -> np.ndarray:
    """Cut random windows of (frames, side), each the liveliest of three, and flip or transpose them."""
    frames, side = size
    cut = []
    for _ in range(batch):
        clip = pool[rng.integers(len(pool))]
        windows = []
        for _ in range(3 if side < clip.shape[1] else 1):
            first = rng.integers(clip.shape[0] - frames + 1)
            top, left = rng.integers(clip.shape[1] - side + 1, size=2)
            windows.append(clip[first : first + frames, top : top + side, left : left + side])
        window = max(windows, key=lambda pixels: float(pixels[:, ::4, ::4].std()))
        flips = tuple(slice(None, None, int(rng.choice([-1, 1]))) for _ in range(3))
        window = recolored(window[flips], rng)
        cut.append(window.swapaxes(1, 2) if rng.random() < 0.5 else window)
    return np.stack(cut)


def batch_size(progress: float, rng: np.random.Generator) -> tuple[int, tuple[int, int]]:
    """How many windows, of how many frames and pixels a side: first images, then crops, at the end whole clips too."""
    if progress < IMAGES_UNTIL:
        return 16, (1, 32)
    # Whole clips teach the borders and the long cache.
    whole = rng.random() < (0.05 if progress < 0.85 else 0.6)
    return (1, (9, 64)) if whole else (4, (5, 32))


def loss_of(vae: AutoencoderKLWan, x: Tensor, generator: torch.Generator) -> Tensor:
    """L1 and squared error of a reconstruction from slightly noised means, with a weak pull of the latents to 0.

    Errors of colour at equal brightness count twice: a grey autoencoder is a place where training likes to rest.
    """
    mean, logvar = vae._encode(x).chunk(2, dim=1)
    z = mean + POSTERIOR_STD * torch.randn(mean.shape, generator=generator)
    error = decoded(vae, z) - x
    error = torch.cat([error, error - error.mean(1, keepdim=True)], 1)
    told = (logvar - 2 * np.log(POSTERIOR_STD)).square().mean()  # the noise is fixed, and the posterior says so
    return error.abs().mean() + error.square().mean() + 1e-4 * mean.square().mean() + 1e-4 * told


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: np.ndarray) -> float:
    """Mean decibels over clips of uint8 pixels rebuilt from posterior means."""
    levels = []
    for part in np.array_split(clips, max(1, len(clips) // 8)):
        rebuilt = vae.decode(vae.encode(pixels(part)).latent_dist.mode()).sample
        error = (rebuilt - pixels(part)).mul(127.5).square().flatten(1).mean(1)
        levels.append(10 * torch.log10(255**2 / error))
    return float(torch.cat(levels).mean())


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips."""
    means = torch.cat(
        [vae.encode(pixels(part)).latent_dist.mode() for part in np.array_split(clips, max(1, len(clips) // 8))]
    )
    return means.mean((0, 2, 3, 4)).tolist(), means.std((0, 2, 3, 4)).tolist()


def validation_clips(shapes: tuple[str, ...], count: int) -> np.ndarray:
    rng = np.random.default_rng(SEED + 1)
    return np.stack([render(random_scene(rng, shapes, held_out=True)) for _ in range(count)])


def export(average: Average, statistic_clips: np.ndarray) -> dict[str, float]:
    """Write the averaged weights, with their latent statistics, into the pipeline's folder; return the decibels."""
    vae = small_autoencoder().eval()
    vae.load_state_dict(average.weights)
    mean, std = latent_statistics(vae, statistic_clips)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    install(vae.half(), "vae")
    vae.float()
    known, rings = validation_clips(KNOWN_SHAPES, 32), validation_clips((RING,), 32)
    return {"vae_psnr_known_db": psnr(vae, known), "vae_psnr_ring_db": psnr(vae, rings)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--peak", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--export-minutes", type=float, default=3)
    told = parser.parse_args()
    ranks = Ranks()
    torch.manual_seed(SEED)
    pool_rng = np.random.default_rng(SEED)
    pool = np.stack([autoencoder_clip(pool_rng) for _ in range(POOL)])
    vae = small_autoencoder()
    make_blind_to_past(vae)
    quicken(vae)
    hidden, other = split_weights(vae)
    optimizer = MuonAndAdam(hidden, other, decay=0.0)
    average, budget = Average(vae, decay=0.995), Budget(told.steps, told.minutes)
    saved = WORK / "vae.pt"
    kept = {"vae": vae, "optimizer": optimizer, "average": average, "budget": budget}
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        for name, part in kept.items():
            part.load_state_dict(state[name])
    rng = np.random.default_rng((SEED, ranks.rank, budget.step))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    exported, running = budget.elapsed(), 0.0
    while (progress := ranks.agreed(budget.progress())) < 1:
        images = progress < IMAGES_UNTIL
        with single_images(vae) if images else nullcontext():
            loss = loss_of(vae, pixels(crops(pool, rng, *batch_size(progress, rng))), generator)
        vae.zero_grad()
        loss.backward()
        ranks.mean_gradients(vae)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        lr = learning_rate(told.peak, budget.step, progress)
        optimizer.step(lr, lr / 2)
        average.update(vae)
        budget.step += 1
        running = 0.98 * running + 0.02 * float(loss.detach()) if running else float(loss.detach())
        if ranks.rank > 0:
            continue
        if budget.step % 50 == 0:
            print(f"step {budget.step} of {told.steps}, {budget.elapsed():.0f} s: loss {running:.4f}", flush=True)
        if budget.elapsed() - exported > 60 * told.export_minutes:
            print(export(average, pool[:48]), flush=True)
            save_whole({name: part.state_dict() for name, part in kept.items()}, saved)
            exported = budget.elapsed()
    if ranks.rank > 0:
        return
    levels = export(average, pool[:512])
    save_whole({name: part.state_dict() for name, part in kept.items()}, saved)
    report = levels | {"vae_seed": SEED, "vae_steps": budget.step, "vae_seconds": round(budget.elapsed())}
    Path(WORK / "vae.json").write_text(json.dumps(report, indent=2))
    print(report)


if __name__ == "__main__":
    main()
