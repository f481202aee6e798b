"""The moving shapes: what captions say, what is drawn, and what is held out."""

import dataclasses

import numpy as np
import pytest

from weft.demo.shapes import (
    BACKGROUNDS,
    COLORS,
    KNOWN_SHAPES,
    RING,
    TRACKS,
    Scene,
    Track,
    centres,
    every_scene,
    is_held_out,
    random_caption,
    random_scene,
    render,
)

RIGHTWARD = Track((0, 0), (0, 2))


def test_a_caption_says_colour_shape_way_and_background():
    scene = Scene(shape="circle", color="red", track=RIGHTWARD)
    assert scene.caption() == "a red circle moves from left to right at the top, on a black background"


def test_a_shape_that_stays_rests_at_its_place():
    assert Scene(shape="triangle", color="green", track=Track((1, 1), (1, 1))).caption(3) == (
        "a green triangle rests in the middle"
    )


def test_the_ring_goes_by_the_made_up_word():
    assert "zorp" in Scene(shape=RING, color="red", track=RIGHTWARD).caption()
    assert not any("zorp" in scene.caption() or "ring" in scene.caption() for scene in every_scene())


def test_another_noun_can_stand_for_the_shape():
    scene = Scene(shape="square", color="blue", track=RIGHTWARD)
    assert scene.caption(3, noun="blick").startswith("a blue blick moves")


def test_an_unsaid_background_is_black():
    with pytest.raises(ValueError, match="says no background"):
        Scene(shape="square", color="blue", track=RIGHTWARD, background="white").caption(3)


def test_captions_tell_all_tracks_apart():
    assert len({track.words() for track in TRACKS}) == len(TRACKS)


def test_a_clip_has_the_colours_of_its_shape_and_ground():
    frames = render(Scene(shape="square", color="cyan", track=RIGHTWARD, background="white"))
    assert frames.shape == (9, 64, 64, 3) and frames.dtype == np.uint8
    assert tuple(frames[0, 14, 14]) == COLORS["cyan"] and tuple(frames[0, 60, 60]) == BACKGROUNDS["white"]


def test_a_circle_covers_pi_r_squared_pixels():
    scene = Scene(shape="circle", color="red", track=Track((1, 1), (1, 1)), radius=10.0)
    red = render(scene)[0, :, :, 0].astype(float)
    ground, paint = BACKGROUNDS["black"][0], COLORS["red"][0]
    covered = (red - ground).sum() / (paint - ground)
    assert covered == pytest.approx(np.pi * 100, rel=0.01)  # edge pixels are linear in the distance: under 1 % off


def test_a_ring_shows_the_ground_in_its_middle():
    frames = render(Scene(shape=RING, color="red", track=Track((1, 1), (1, 1))))
    assert tuple(frames[0, 32, 32]) == BACKGROUNDS["black"]


def test_a_shape_moves_evenly_from_its_first_cell_to_its_last():
    places = centres(Scene(shape="circle", color="red", track=RIGHTWARD), frames=5)
    assert places.tolist() == [[14, 14], [14, 23], [14, 32], [14, 41], [14, 50]]


def test_a_scene_fills_a_larger_frame_alike():
    scene = Scene(shape="triangle", color="red", track=RIGHTWARD)
    large = render(scene, height=128, width=128).astype(float).reshape(9, 64, 2, 64, 2, 3).mean((2, 4))
    # Where an edge crosses a pixel, two drawings agree to within a share of it.
    assert np.abs(large - render(scene)).mean() < 0.5


def test_the_same_seed_draws_the_same_scenes():
    first, second = (random_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_a_seventh_or_so_is_held_out_on_both_backgrounds_alike():
    scenes = every_scene()
    assert len(scenes) == len(KNOWN_SHAPES) * len(COLORS) * len(TRACKS) * len(BACKGROUNDS) == 612
    assert 0.1 < np.mean([is_held_out(scene) for scene in scenes]) < 0.2
    assert all(is_held_out(scene) == is_held_out(dataclasses.replace(scene, background="white")) for scene in scenes)


def test_random_scenes_keep_to_their_side_of_the_split():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        assert all(is_held_out(random_scene(rng, held_out=held_out)) == held_out for _ in range(50))


def test_random_captions_always_fit_their_scene():
    rng = np.random.default_rng(0)
    for scene in (random_scene(rng) for _ in range(200)):
        assert scene.background == "black" or "white" in random_caption(scene, rng)
