"""The judge: the truth passes, and each kind of wrong fails for its own reason."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import weft.demo
from weft.demo.judge import judge
from weft.demo.shapes import KNOWN_SHAPES, RING, SHAPES, Scene, Track, random_scene, render

TINY_WAN = Path(weft.demo.__file__).with_name("tiny_wan")
SCENE = Scene(shape="circle", color="red", track=Track((0, 0), (0, 2)))


def blurred(video: np.ndarray) -> np.ndarray:
    """Average each pixel with its eight neighbours."""
    padded = np.pad(video.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    side = video.shape[1]
    moved = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return np.rint(np.mean(moved, axis=0)).astype(np.uint8)


def test_the_truth_is_right_whatever_the_scene():
    rng = np.random.default_rng(0)
    for scene in (random_scene(rng, SHAPES, held_out=bool(i % 2)) for i in range(60)):
        assert judge(render(scene), scene).right, scene


def test_a_blurred_truth_is_still_right():
    rng = np.random.default_rng(1)
    for scene in (random_scene(rng, SHAPES) for _ in range(40)):
        assert judge(blurred(render(scene)), scene).right, scene


@pytest.mark.parametrize("color", ["green", "blue", "yellow", "magenta", "cyan"])
def test_another_colour_is_wrong_in_colour_alone(color: str):
    verdict = judge(render(dataclasses.replace(SCENE, color=color)), SCENE)
    assert (verdict.color, verdict.motion, verdict.shape) == (False, True, True)
    assert verdict.seen_color == color


def test_a_mirrored_way_is_wrong_in_motion_alone():
    verdict = judge(render(SCENE)[:, :, ::-1], SCENE)
    assert (verdict.color, verdict.motion, verdict.shape) == (True, False, True)


def test_a_clip_played_backwards_is_wrong_in_motion():
    assert not judge(render(SCENE)[::-1], SCENE).motion


def test_the_neighbouring_lane_is_wrong_in_motion():
    assert not judge(render(dataclasses.replace(SCENE, track=Track((1, 0), (1, 2)))), SCENE).motion


def test_a_shape_that_jumps_to_its_end_is_wrong_in_motion():
    video = render(SCENE)
    video[1:] = video[-1]
    assert not judge(video, SCENE).motion


@pytest.mark.parametrize("shape", KNOWN_SHAPES)
def test_a_filled_shape_is_no_ring_and_a_ring_no_filled_shape(shape: str):
    filled, ring = dataclasses.replace(SCENE, shape=shape), dataclasses.replace(SCENE, shape=RING)
    assert not judge(render(filled), ring).shape
    assert not judge(render(ring), filled).shape


def test_a_circle_is_no_square():
    verdict = judge(render(SCENE), dataclasses.replace(SCENE, shape="square"))
    assert not verdict.shape and verdict.seen_shape == "circle"


def test_a_broken_ring_is_no_ring():
    ring = dataclasses.replace(SCENE, shape=RING, track=Track((1, 1), (1, 1)))
    video = render(ring)
    video[:, 32:, 24:40] = video[0, 0, 0]  # cut open at the bottom
    assert not judge(video, ring).shape


def test_an_empty_clip_is_wrong_in_everything():
    verdict = judge(np.zeros((9, 64, 64, 3), np.uint8), SCENE)
    assert not (verdict.color or verdict.motion or verdict.shape)


def test_grey_noise_is_wrong_in_everything():
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 1)).astype(np.uint8).repeat(3, -1)
    verdict = judge(noise, SCENE)
    assert not (verdict.color or verdict.motion or verdict.shape)


def test_the_shipped_pipeline_is_at_most_8_mb_and_loads():
    from diffusers import WanPipeline

    assert sum(file.stat().st_size for file in TINY_WAN.rglob("*") if file.is_file()) <= 8_000_000
    pipeline = WanPipeline.from_pretrained(TINY_WAN)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    assert pipeline.vae.config.z_dim == pipeline.transformer.config.in_channels == 16
    assert pipeline.tokenizer("").input_ids == [pipeline.tokenizer.eos_token_id]
