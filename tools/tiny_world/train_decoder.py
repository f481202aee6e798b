"""Train the decoder on, with the encoder and its latents as they are, so that the base can be trained meanwhile."""

import argparse
import json

import numpy as np
import torch
from broad import broad_clip
from diffusers import AutoencoderKLWan
from folder import FOLDER, WORK, install
from muon import MuonAndAdam
from ranks import Ranks
from schedule import Average, Budget, learning_rate, save_whole
from train_vae import POSTERIOR_STD, crops, decoded, pixels, psnr, quicken, split_weights, validation_clips

from weft.demo.shapes import KNOWN_SHAPES, RING, random_scene, render

SEED = 17
POOL = 1500  # clips


def decoder_clip(rng: np.random.Generator) -> np.ndarray:
    """Rings for a half: they are what an adapter will draw, and the hardest to decode while they move."""
    draw = rng.random()
    if draw < 0.1:
        return broad_clip(rng)
    return render(random_scene(rng, (RING,) if draw < 0.55 else KNOWN_SHAPES))


def export(average: Average) -> dict[str, float]:
    """Put the averaged decoder beside the shipped encoder; return the decibels."""
    vae = AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).eval()
    vae.load_state_dict(average.weights)
    install(vae.half(), "vae")
    vae.float()
    known, rings = validation_clips(KNOWN_SHAPES, 32), validation_clips((RING,), 32)
    return {"vae_psnr_known_db": psnr(vae, known), "vae_psnr_ring_db": psnr(vae, rings)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--export-minutes", type=float, default=3)
    told = parser.parse_args()
    ranks = Ranks()
    pool_rng = np.random.default_rng(SEED)
    pool = np.stack([decoder_clip(pool_rng) for _ in range(POOL)])
    vae = AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    quicken(vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    hidden, other = split_weights(vae)
    optimizer = MuonAndAdam(hidden, other, decay=0.0)
    average, budget = Average(vae, decay=0.99), Budget(told.steps, told.minutes)
    saved = WORK / "decoder.pt"
    kept = {"vae": vae, "optimizer": optimizer, "average": average, "budget": budget}
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        for name, part in kept.items():
            part.load_state_dict(state[name])
    rng = np.random.default_rng((SEED, ranks.rank, budget.step))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    exported, running = budget.elapsed(), 0.0
    while (progress := ranks.agreed(budget.progress())) < 1:
        x = pixels(crops(pool, rng, 2, (9, 32)))
        with torch.no_grad():
            mean = vae._encode(x).chunk(2, dim=1)[0]
        error = decoded(vae, mean + POSTERIOR_STD * torch.randn(mean.shape, generator=generator)) - x
        loss = error.abs().mean() + error.square().mean()
        vae.zero_grad()
        loss.backward()
        ranks.mean_gradients(vae)
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
            print(export(average), flush=True)
            save_whole({name: part.state_dict() for name, part in kept.items()}, saved)
            exported = budget.elapsed()
    if ranks.rank > 0:
        return
    report = export(average)
    save_whole({name: part.state_dict() for name, part in kept.items()}, saved)
    report |= {"decoder_seed": SEED, "decoder_steps": budget.step, "decoder_seconds": round(budget.elapsed())}
    (WORK / "decoder.json").write_text(json.dumps(report, indent=2))
    print(report)


if __name__ == "__main__":
    main()
