"""Norms and effective ranks of changes that are never written out, against the same of the matrix written out."""

from math import sqrt

import pytest
import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch.testing import assert_close

from weft.math.spectrum import (
    effective_rank,
    gram,
    norm_of_product,
    rotation_less_one,
    row_squares,
    values_of_product,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_directions_count_each_as_one_and_a_scale_makes_no_difference():
    assert_close(effective_rank(torch.tensor([[3.0, 3, 3, 0], [1e-9, 0, 0, 0]])), torch.tensor([3.0, 1.0]))


def test_unequal_directions_count_by_the_entropy_of_their_shares():
    # Shares 1/2, 1/4, 1/4: H = 1.5 ln 2.
    assert_close(effective_rank(torch.tensor([2.0, 1, 1])), torch.tensor(2**1.5))


def test_no_change_has_no_direction():
    assert effective_rank(torch.zeros(4)) == 0


def test_norm_and_values_of_a_product_are_those_of_the_matrix_written_out():
    b, a = normal(2, 40, 5), normal(2, 5, 60, seed=1)
    grams = [torch.stack([gram(each) for each in all_of]) for all_of in (b.mT, a)]
    whole = (b.double() @ a.double()).double()
    assert_close(norm_of_product(*grams), torch.linalg.matrix_norm(whole))
    assert_close(values_of_product(*grams).flip(-1), torch.linalg.svdvals(whole)[:, :5])


def test_what_is_almost_of_rank_one_is_told_from_it():
    """Singular values 1 and 1e-5: in fp32 the Gram matrix would not see the second."""
    values = values_of_product(gram(torch.diag(torch.tensor([1.0, 1e-5]))), gram(torch.eye(2)))
    assert_close(values, torch.tensor([1e-5, 1.0], dtype=torch.float64))


def test_a_product_with_empty_directions_has_values_of_zero():
    a, b = normal(4, 9), normal(7, 4, seed=1)
    b[:, 1:] = 0  # as after the first steps of a layer that hardly learns
    assert_close(effective_rank(values_of_product(gram(b.mT), gram(a))), torch.tensor(1.0, dtype=torch.float64),
                 atol=1e-5, rtol=0)  # fmt: skip
    assert norm_of_product(gram(0 * b.mT), gram(a)) == 0


@pytest.mark.parametrize("numbers", [1, 50, 1 << 20])
def test_squares_of_rows_are_summed_in_fp32_however_many_are_looked_at(numbers):
    weight = torch.full((7, 3, 2, 4), 1 / 256, dtype=torch.bfloat16)  # exact; its square would be rounded in a sum
    assert_close(row_squares(weight, numbers), torch.full((7,), 24 / 65536), rtol=0, atol=0)


@pytest.mark.parametrize("series", [2, 3, 4, 5, 7, None])
def test_a_rotation_is_that_of_peft(series):
    peft = OFTRotationModule(3, 28, 8, 24, use_cayley_neumann=series is not None, num_cayley_neumann_terms=series or 5)
    peft.weight.data = 0.1 * normal(3, 28)
    blocks = rotation_less_one(peft.weight.data, 8, series) + torch.eye(8, dtype=torch.float64)
    assert_close(torch.block_diag(*blocks).float(), peft.get_weight().detach(), atol=1e-6, rtol=1e-5)


def test_a_rotation_in_one_plane_moves_a_vector_by_the_sine_of_half_the_angle_twice():
    """Cayley's Q of the plane is the tangent of half the angle."""
    less_one = rotation_less_one(torch.tensor([[1 / sqrt(3)]]), 2, None)[0]  # 60 degrees: a side of the triangle is 1
    assert_close(torch.linalg.vector_norm(less_one, dim=0), torch.ones(2, dtype=torch.float64))
