"""Train a LoRA with Weft's parts and a loop of one's own: family, adapter, objective, and a plain torch optimizer.

Nothing of `weft.run` is used: no config file, no run folder, no checkpoints. The clips are rendered here, a ring in
each, which the small base model that Weft ships has never seen.

    python examples/by_hand/train.py --steps 20 --out adapter
"""

import argparse
from pathlib import Path

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence

from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.contracts import DEFAULT, Batch, Berth, Encoders, Model, Rng
from weft.demo.shapes import RING, random_caption, random_scene, render
from weft.families.wan import Wan
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.math.chance import generator
from weft.objectives.flow_matching import FlowMatching, Shift

CLIPS = 8
SEED = 0
ROLE = DEFAULT.name  # of the one adapter


def encoded_clips(encoders: Encoders) -> Batch:
    """Eight clips of rings as one batch: latents (B, C, f, h, w), text (B, L, D) with zeros behind the shorter."""
    rng = numpy.random.default_rng(SEED)
    scenes = [random_scene(rng, (RING,)) for _ in range(CLIPS)]
    frames = numpy.stack([render(scene) for scene in scenes])  # (B, F, H, W, 3) uint8
    pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1  # (B, 3, F, H, W) in [-1, 1]
    captions = encoders.text([random_caption(scene, rng) for scene in scenes])
    text = pad_sequence([caption["text"].float() for caption in captions], batch_first=True)
    tensors = {"latents": encoders.latents(pixels), "text": text}
    return Batch(tensors, tuple(str(number) for number in range(CLIPS)))


def model_with_adapter(family: Wan, recipe: Lora) -> Model:
    """The frozen network with a new adapter on the layers that the recipe's targets name."""
    network = family.load("fp32", DEFAULT.name, Berth())
    report = recipe.match(linears_of(network), family.targets, family.aliases)
    print(f"{len(report.paths)} layers, {report.parameters(recipe.rank):,} trainable parameters")
    adapters = recipe.attach(network, report.paths, (ROLE,), SEED)
    adapters.initialize()
    return Model(network.train(), family, adapters)


def validation_loss(objective: FlowMatching, model: Model, batch: Batch) -> float:
    """The same question each time: fixed noise at fixed times."""
    asked = objective.measured(model.family.experts)
    with model.adapters.use(ROLE):
        return float(torch.stack([objective.measure(model, batch, *each, SEED) for each in asked]).mean())


def train(model: Model, objective: FlowMatching, batch: Batch, steps: int, lr: float) -> None:
    """One step is one batch: loss, backward within the adapter's use, optimizer."""
    optimizer = torch.optim.AdamW(model.adapters.parameters(ROLE).values(), lr=lr)
    state = objective.init(model)
    for step in range(steps):
        rng = Rng(generator("cpu", SEED, "own", step), generator("cpu", SEED, "shared", step), SEED, step)
        with model.adapters.use(ROLE):
            loss = objective.loss("train", model, batch, state, rng).total / objective.count(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA on the shipped model without Weft's loop.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    arguments = parser.parse_args()

    family, recipe = Wan(source="tiny-wan"), Lora(rank=8, targets="attention")
    objective = FlowMatching(timesteps=Shift(shift=3.0))
    batch = encoded_clips(family.encoders(torch.device("cpu"), lambda module: module))
    model = model_with_adapter(family, recipe)
    before = validation_loss(objective, model, batch)
    train(model, objective, batch, arguments.steps, lr=2e-3)
    print(f"validation loss {before:.4f} -> {validation_loss(objective, model, batch):.4f}")

    adapters = model.adapters
    saved = SavedAdapter(adapters.state_dict(ROLE), recipe.rank, recipe.strength, targets=adapters.paths)
    print(f"saved {PeftFolder().write(arguments.out, saved)}")


if __name__ == "__main__":
    main()
