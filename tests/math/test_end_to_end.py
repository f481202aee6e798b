"""Tensors end to end: what is laid comes back in its shape, and a stretch of memory is found again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from weft.math.end_to_end import ROW, EndToEnd, length_of, stretch_of

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6)


@given(SHAPES, SHAPES)
@settings(max_examples=40, deadline=None)
def test_what_is_laid_end_to_end_comes_back_with_zeros_between(first, second):
    groups = [[torch.randn(shape) for shape in shapes] for shapes in (first, second)]
    tensors = [t for group in groups for t in group]
    where = EndToEnd(groups)
    flat = where.laid(tensors)
    assert flat.numel() == where.length and where.length % ROW == 0
    assert all(torch.equal(view, t) for view, t in zip(where.views(flat), tensors, strict=True))
    assert int((flat != 0).sum()) == sum(int((t != 0).sum()) for t in tensors)
    (begin, middle), (after, end) = where.bounds
    assert (begin, middle, end) == (0, after, where.length)
    assert_close(flat[:middle].square().sum(), sum(t.square().sum() for t in groups[0]) + torch.zeros(()))


def test_what_comes_behind_is_behind_all_padding():
    where = EndToEnd([[torch.ones(3)]])
    flat = where.laid([torch.ones(3)], torch.tensor([7.0, 8.0]))
    assert flat[where.length :].tolist() == [7.0, 8.0]


def test_the_length_of_millions_of_numbers_is_right_in_the_sixth_digit():
    flat = torch.randn(2**23, generator=torch.Generator().manual_seed(0))
    assert float(length_of(flat)) == pytest.approx(float(flat.double().norm()), rel=1e-6)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_length_with_a_number_that_is_not_finite_is_not_finite(wrong):
    flat = torch.ones(ROW)
    flat[5] = wrong
    assert not length_of(flat).isfinite()


def test_views_of_one_memory_are_one_stretch_whatever_their_order():
    where = EndToEnd([[torch.zeros(3, 5), torch.zeros(70)]])
    flat = torch.arange(where.length).float()
    first, second = where.views(flat)
    stretch = stretch_of([second, first])
    assert stretch is not None and torch.equal(stretch, flat[: 64 + 70])
    assert stretch.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_tensors_that_lie_apart_or_far_from_each_other_are_no_stretch():
    flat = torch.zeros(1000)
    assert stretch_of([torch.zeros(3), torch.zeros(3)]) is None
    assert stretch_of([flat[:3], flat[900:]]) is None
    assert stretch_of([flat.view(10, 100).mT]) is None
