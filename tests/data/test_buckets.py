"""The arithmetic of shapes: what a clip may become under a token budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.data.clips import WAN
from weft.data.buckets import Bucket, Buckets, kept_share, lengths_line, size_of_area
from weft.geometry import VideoGeometry

TI2V_5B = VideoGeometry(fps=24, space_stride=16, time_stride=4, patch=(1, 2, 2), latent_channels=48)


def test_49_frames_at_512_fill_a_budget_of_13312_tokens_exactly():
    buckets = Buckets(sides=(512,), frames=(49,), token_budget=13_312)
    assert buckets.choose(100, 1024, 1024, WAN) == Bucket(49, 512, 512, 13 * 32 * 32) == Bucket(49, 512, 512, 13_312)


def test_21_frames_at_768_exceed_13312_tokens_and_17_are_the_longest_that_fit():
    assert WAN.tokens(21, 768, 768) == 6 * 48 * 48 == 13_824
    buckets = Buckets(sides=(768,), frames=(9, 13, 17, 21, 25), token_budget=13_312)
    assert buckets.choose(100, 1024, 1024, WAN) == Bucket(17, 768, 768, 11_520)


def test_the_corrected_rule_gives_9_frames_at_1024_not_13():
    buckets = Buckets(sides=(1024,), frames=tuple(range(1, 50, 4)), token_budget=13_312)
    chosen = buckets.choose(100, 1024, 1024, WAN)
    assert chosen is not None and chosen.frames == 9


def test_the_shape_with_most_tokens_wins():
    buckets = Buckets(sides=(512, 768, 1024), frames=(49, 17, 9), token_budget=13_312)
    assert buckets.choose(49, 1920, 1920, WAN) == Bucket(49, 512, 512, 13_312)
    assert buckets.choose(20, 1920, 1920, WAN) == Bucket(9, 1024, 1024, 3 * 64 * 64)  # 12,288 against 11,520 of 17x768


def test_of_equal_tokens_more_frames_win():
    assert WAN.tokens(1, 128, 256) == 1 * 8 * 16 == WAN.tokens(13, 64, 128) == 4 * 4 * 8
    tied = Buckets(sizes=((256, 128), (128, 64)), frames=(1, 13), token_budget=128)
    assert tied.choose(13, 256, 128, WAN) == Bucket(13, 64, 128, 128)


# 723 is the side of the square that is as large as 960x544, musubi's default.
@pytest.mark.parametrize(("side", "shape"), [(640, (848, 480)), (723, (960, 544))])
def test_16_to_9_takes_the_size_that_musubi_gives_it(side, shape):
    assert size_of_area(side, 1920 / 1080, 16) == shape


def test_a_small_clip_keeps_its_own_size_cut_to_multiples():
    assert Buckets(sides=(512,), frames=(9,)).choose(9, 230, 228, WAN) == Bucket(9, 224, 224, 3 * 14 * 14)


def test_a_small_clip_is_enlarged_only_when_told():
    enlarging = Buckets(sides=(512,), frames=(9,), upscale=True)
    assert enlarging.choose(9, 230, 230, WAN) == Bucket(9, 512, 512, 3 * 32 * 32)


def test_a_portrait_clip_takes_the_portrait_size():
    buckets = Buckets(sizes=((848, 480), (480, 832)), frames=(17,))
    chosen = buckets.choose(17, 1080, 1920, WAN)
    assert chosen is not None and (chosen.width, chosen.height) == (480, 832)


def test_an_image_is_one_frame_whatever_videos_are_asked_for():
    chosen = Buckets(sides=(512,), frames=(49,)).choose(1, 512, 512, WAN, is_image=True)
    assert chosen == Bucket(1, 512, 512, 1024)


def test_a_clip_too_short_for_every_bucket_is_told_so():
    buckets = Buckets(sides=(512,), frames=(49, 17))
    assert buckets.choose(16, 512, 512, WAN) is None
    assert buckets.why_not(16, 512, 512, WAN) == "It has 16 frames at the training rate; the shortest bucket has 17."


def test_a_clip_too_small_for_every_size_is_told_so():
    buckets = Buckets(sizes=((832, 480),), frames=(17,))
    assert buckets.choose(17, 640, 360, WAN) is None
    assert "640x360 is smaller than the smallest size 832x480" in buckets.why_not(17, 640, 360, WAN)


def test_a_clip_whose_cheapest_shape_is_too_dear_is_told_so():
    buckets = Buckets(sides=(512,), frames=(49,), token_budget=10_000)
    assert buckets.choose(49, 512, 512, WAN) is None
    assert "49x512x512 has 13,312 tokens, above token_budget 10,000" in buckets.why_not(49, 512, 512, WAN)


def test_frame_counts_that_split_a_latent_frame_are_refused_with_the_nearest():
    (problem,) = Buckets(sides=(512,), frames=(49, 50)).problems(WAN)
    assert "50 frames" in problem and "49 and 53" in problem


def test_sizes_off_the_models_grid_are_refused_with_the_nearest():
    (problem,) = Buckets(sizes=((832, 480), (850, 480)), frames=(49,)).problems(WAN)
    assert "850x480" in problem and "multiples of 16" in problem and "848x480" in problem
    assert len(Buckets(sizes=((848, 480),), frames=(49,)).problems(TI2V_5B)) == 1  # its sides are multiples of 32


@pytest.mark.parametrize("both", [{}, {"sides": (512,), "sizes": ((832, 480),)}])
def test_size_is_said_in_exactly_one_way(both):
    with pytest.raises(ValidationError, match="exactly one of 'sides'"):
        Buckets.model_validate({"frames": [49], **both})


@given(
    frames=st.integers(1, 200),
    width=st.integers(8, 4000),
    height=st.integers(8, 4000),
    budget=st.integers(1, 40_000),
    sides=st.lists(st.integers(32, 1280), min_size=1, max_size=4),
    counts=st.lists(st.integers(0, 30).map(lambda k: 4 * k + 1), min_size=1, max_size=5),
    upscale=st.booleans(),
    geometry=st.sampled_from([WAN, TI2V_5B]),
)
def test_every_chosen_shape_obeys_the_budget_the_grid_and_the_clip(
    frames, width, height, budget, sides, counts, upscale, geometry
):
    buckets = Buckets(sides=tuple(sides), frames=tuple(counts), token_budget=budget, upscale=upscale)
    chosen = buckets.choose(frames, width, height, geometry)
    if chosen is None:
        assert buckets.why_not(frames, width, height, geometry).endswith(".")
        return
    assert geometry.tokens(chosen.frames, chosen.height, chosen.width) == chosen.tokens <= budget
    assert chosen.height % geometry.side_multiple == chosen.width % geometry.side_multiple == 0
    assert chosen.frames % 4 == 1 and chosen.frames <= frames and chosen.frames in counts
    assert geometry.latent_shape(chosen.frames, chosen.height, chosen.width)[1] >= 1
    assert chosen.height * chosen.width <= max(sides) ** 2
    if not upscale:
        assert chosen.width <= width and chosen.height <= height


@given(side=st.integers(64, 700), width=st.integers(64, 3000), height=st.integers(64, 3000), roomy=st.booleans())
def test_the_chosen_size_has_the_nearest_ratio_of_all_sizes(side, width, height, roomy):
    room = None if roomy else (width, height)
    most = (side * side, side * side) if roomy else (width, height)
    every = []
    for w in range(16, min(most[0], side * side) + 1, 16):
        h = min(side * side // w, most[1]) // 16 * 16
        every += [(w, h)] if h else []
    chosen = size_of_area(side, width / height, 16, room)
    assert chosen is not None

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1] / (width / height)))

    assert distance(chosen) == pytest.approx(min(map(distance, every)))


def test_covering_a_square_with_16_to_9_keeps_nine_sixteenths_of_it():
    assert kept_share(512, 512, 1600, 900) == pytest.approx(9 / 16)


def test_shapes_are_told_by_their_token_counts_which_is_what_blocks_are_compiled_for():
    wide, high = (Bucket(1, h, w, WAN.tokens(1, h, w)) for h, w in ((480, 832), (832, 480)))
    assert lengths_line([wide]) == ""
    assert lengths_line([wide, high]) == f"2 shapes have 1 token count: {30 * 52:,}."
    large = Bucket(1, 1024, 1024, WAN.tokens(1, 1024, 1024))
    assert lengths_line([wide, high, large]) == "3 shapes have 2 token counts, from 1,560 to 4,096."


def test_token_counts_that_nearly_agree_are_named():
    near = [Bucket(1, 480, w, WAN.tokens(1, 480, w)) for w in (832, 864)]
    line = lengths_line(near)
    assert "Some lie within 5% of another, as 1,560 of 1,620" in line  # 30 x 52 and 30 x 54
