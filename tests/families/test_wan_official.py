"""An official checkpoint, read by Weft, answers as the formulas of Wan's own model say: a network, and both experts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from tests.families.official_wan import Sizes, random_weights, velocity
from weft.contracts import Denoise
from weft.families.wan import Wan
from weft.families.weights import HERE

KINDS = {
    "t2v": Sizes(),
    "i2v with clip": Sizes(taken=36, clip=16),
    "i2v": Sizes(taken=36),
    "ti2v": Sizes(taken=48, given=48),
}
T = torch.tensor([0.8333, 0.02])
LENGTHS = (3, 7)


def official_folder(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    save_file(random_weights(sizes, seed), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(sizes.official_config()))
    return folder


def asked(sizes: Sizes) -> tuple[Denoise, Tensor]:
    """The question in Weft's words, and the channels that the official code would make of it."""
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(2, sizes.given, 3, 4, 6, generator=chance)
    told = {"text": torch.randn(2, max(LENGTHS), sizes.text, generator=chance)}
    for i, length in enumerate(LENGTHS):
        told["text"][i, length:] = 0
    stacked = x
    if sizes.taken != sizes.given:
        told["image"] = torch.randn(2, 16, 3, 4, 6, generator=chance)
        mask = torch.zeros(2, 4, 3, 4, 6)
        mask[:, :, 0] = 1
        stacked = torch.cat([x, mask, told["image"]], dim=1)
    if sizes.clip:
        told["clip"] = torch.randn(2, 257, sizes.clip, generator=chance)
    return Denoise(x, T, told), stacked


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_velocity_is_what_the_formulas_give_on_the_official_weights(kind, tmp_path):
    sizes = KINDS[kind]
    family = Wan(source=str(official_folder(tmp_path / "official", sizes)), text_length=512)
    question, stacked = asked(sizes)
    expected = velocity(
        random_weights(sizes), sizes, stacked, 1000 * T[:, None].expand(2, 18), question.cond["text"],
        question.cond.get("clip"),
    )  # fmt: skip
    ours = family.forward(family.load("fp32", "default", HERE), question)
    # Angles up to 833 radians, in fp32 in diffusers, in fp64 in the formulas.
    assert_close(ours, expected, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_a_clean_frame_is_at_time_0_in_the_formulas_too(tmp_path):
    sizes = KINDS["ti2v"]
    family = Wan(source=str(official_folder(tmp_path / "official", sizes)), text_length=512)
    question, x = asked(sizes)
    given = torch.tensor([[True, False, False], [False, False, False]])
    times = torch.stack([torch.tensor([0, 833.3, 833.3]), torch.tensor([20.0, 20, 20])]).repeat_interleave(6, 1)
    expected = velocity(random_weights(sizes), sizes, x, times, question.cond["text"])
    assert family.image == "frames"
    ours = family.forward(family.load("fp32", "default", HERE), Denoise(x, T, question.cond, given))
    assert_close(ours, expected, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_each_official_expert_is_the_network_in_its_own_folder(tmp_path):
    sizes, root = KINDS["t2v"], tmp_path / "official"
    for seed, name in enumerate(("high", "low")):
        official_folder(root / f"{name}_noise_model", sizes, seed)
    family = Wan(source=str(root), expert="both", text_length=512)
    assert [(e.name, e.times) for e in family.experts] == [("high", (0.875, 1.0)), ("low", (0.0, 0.875))]
    question, x = asked(sizes)
    for seed, expert in enumerate(family.experts):
        network = family.load("fp32", expert.name, HERE)
        expected = velocity(
            random_weights(sizes, seed), sizes, x, 1000 * T[:, None].expand(2, 18), question.cond["text"]
        )
        assert_close(family.forward(network, question), expected, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_a_single_file_with_comfyuis_prefix_is_the_same_network(tmp_path):
    sizes = KINDS["t2v"]
    file = tmp_path / "repackaged.safetensors"
    save_file({f"model.diffusion_model.{name}": t for name, t in random_weights(sizes).items()}, file)
    file.with_suffix(".json").write_text(json.dumps(sizes.official_config()))  # heads of 12: released ones have 128
    family = Wan(source=str(file), text_length=512)
    question, x = asked(sizes)
    expected = velocity(random_weights(sizes), sizes, x, 1000 * T[:, None].expand(2, 18), question.cond["text"])
    assert_close(family.forward(family.load("fp32", "default", HERE), question), expected, rtol=1e-4, atol=5e-5)
