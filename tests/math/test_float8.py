"""Products in e4m3: one rounding of each factor, one copy of a weight for both ways, and torch's own operator."""

import pytest
import torch
from torch import Tensor

from weft.math.float8 import (
    E4M3,
    Float8Kernel,
    as_a_whole,
    by_rows,
    fits,
    lacking,
    power_above,
    row_scales_on,
    scaled_product,
)
from weft.math.frozen import frozen_product

# Rounding to 4 significant digits is off by 2^-4 at most; over numbers that are normal 2.6 % in the mean square, and of
# a product of two 2^0.5 as much; and a tenth for the chance of so few numbers.
ONE, TWO = 0.029, 0.042


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, wanted: Tensor) -> float:
    return float(((found.float() - wanted.float()).norm() / wanted.float().norm()).detach())


def layer(out: int = 96, width: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight whose rows differ by a factor of 100, its codes and scales, and a bias."""
    weight = normal(out, width, seed=1) * torch.logspace(-2, 0, out)[:, None]
    codes, scale = by_rows(weight)
    return weight, codes.view(torch.uint8), scale, normal(out, seed=2)


def test_scales_are_powers_of_two_and_the_largest_number_of_a_row_stays_in_range() -> None:
    x = torch.cat([normal(30, 8) * 10 ** normal(30, 1, seed=3), torch.full((1, 8), 448.0), torch.zeros(1, 8)])
    codes, scale = by_rows(x)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert torch.isfinite(codes.float()).all()
    assert (codes.float()[:-1].abs().amax(1) > 448 / 2 - 32).all()  # no scale is twice as large as need be
    assert off(codes.float() * scale, x) < ONE
    assert scale[-2] == 1


def test_a_power_of_two_is_found_by_bits() -> None:
    given = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 3.0, 0.75, 2.0**-40, float("inf")])
    assert power_above(given).tolist() == [1, 2, 2, 2, 4, 1, 2.0**-40, float("inf")]


def test_scaling_rounds_nothing_in_half_precision_either() -> None:
    x = normal(50, 64).bfloat16()
    for encode in (by_rows, as_a_whole):
        half, full = encode(x), encode(x.float())
        assert torch.equal(half[0].view(torch.uint8), full[0].view(torch.uint8)) and torch.equal(half[1], full[1])


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(number: float) -> None:
    _, codes, scale, _ = layer()
    x = normal(3, 64)
    x[1, 5] = number
    y = Float8Kernel().product(x, codes, scale, None)
    assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_are_off_by_two_roundings_from_one_copy_of_the_weight(dtype: torch.dtype) -> None:
    weight, codes, scale, bias = layer()
    x, grad = normal(40, 64).to(dtype).requires_grad_(), normal(40, 96, seed=4).to(dtype)
    y = Float8Kernel().product(x, codes, scale, bias)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dx.dtype == dtype
    assert off(y - bias.to(dtype), x.float() @ weight.T) < TWO + (0.005 if dtype == torch.bfloat16 else 0)
    assert off(dx, grad.float() @ weight) < TWO + (0.005 if dtype == torch.bfloat16 else 0)


def test_scales_of_any_size_of_a_files_own_codes_serve_both_ways_too() -> None:
    weight, grad, x = normal(96, 64, seed=1), normal(40, 96, seed=4), normal(40, 64)
    for scale in (weight.abs().amax(1, keepdim=True) / 448, weight.abs().amax().view(1, 1) / 448):
        tensors = ((weight / scale).to(E4M3).view(torch.uint8), scale, None)
        assert off(Float8Kernel(exact=False).multiplied(x, *tensors), x @ weight.T) < TWO
        assert off(Float8Kernel(exact=False).gradient(grad.bfloat16(), *tensors), grad @ weight) < TWO


def test_torchs_own_operator_gives_the_emulated_numbers_both_ways() -> None:
    _, codes, scale, _ = layer()
    own, rows = by_rows(normal(40, 64))
    columns = scale.t().contiguous()
    y = torch._scaled_mm(own, codes.view(E4M3).t(), rows, columns, out_dtype=torch.bfloat16)
    assert off(y, scaled_product(own, codes.view(E4M3).t(), rows, columns, None, torch.bfloat16)) < 2**-8
    turned = codes.view(E4M3).t().contiguous().t()
    back, of_rows = by_rows(normal(40, 96) * columns)
    ones = torch.ones(1, 64)
    dx = torch._scaled_mm(back, turned, of_rows, ones, out_dtype=torch.bfloat16)
    assert off(dx, scaled_product(back, turned, of_rows, ones, None, torch.bfloat16)) < 2**-8


def test_a_question_of_many_dimensions_keeps_nothing_but_the_layers_own_tensors() -> None:
    _, codes, scale, bias = layer()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_product(Float8Kernel(), normal(2, 5, 64).requires_grad_(), codes, scale, bias)
    assert y.shape == (2, 5, 96)
    assert {t.data_ptr() for t in kept} == {codes.data_ptr(), scale.data_ptr()}
    assert torch.autograd.grad(y.sum(), y)[0].shape == y.shape


def test_a_second_derivative_is_no_silent_zero() -> None:
    _, codes, scale, _ = layer()
    x = normal(3, 64).requires_grad_()
    with pytest.raises(AssertionError, match="no second derivative"):
        torch.autograd.grad(Float8Kernel().product(x, codes, scale, None).square().sum(), x, create_graph=True)


def test_it_is_one_graph_for_the_compiler() -> None:
    _, codes, scale, bias = layer()

    def ask(x: Tensor) -> Tensor:
        return Float8Kernel().product(x, codes, scale, bias)

    x = normal(8, 64).requires_grad_()
    torch.testing.assert_close(torch.compile(ask, fullgraph=True, backend="aot_eager")(x), ask(x))


@pytest.mark.parametrize(
    ("capability", "version", "system", "rows"),
    [
        ((9, 0), "2.11.0", "Linux", True), ((8, 9), "2.11.0+cu130", "Linux", False), ((8, 9), "2.12.1", "Linux", True),
        ((9, 0), "2.13.0", "Windows", False), ((12, 0), "2.13.0", "Linux", True),
    ],
)  # fmt: skip
def test_rows_have_their_scales_where_the_product_takes_them(capability, version, system, rows) -> None:
    assert row_scales_on(capability, version, system) is rows


def test_the_hardware_wants_widths_by_sixteen_and_a_gpu_from_ada_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(96, 64) and not fits(24, 64) and not fits(64, 24)
    assert lacking(torch.device("cpu")) is None
    assert "NVIDIA" in str(lacking(torch.device("mps")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "capability 7.0" in str(lacking(torch.device("cuda")))


@pytest.mark.gpu
def test_a_gpu_gives_the_emulated_numbers() -> None:
    if not torch.cuda.is_available() or lacking(torch.device("cuda")):
        pytest.skip("needs a GPU with fp8 arithmetic")
    _, codes, scale, bias = layer()
    x, grad = normal(48, 64).bfloat16(), normal(48, 96, seed=4).bfloat16()
    here = Float8Kernel().multiplied(x, codes, scale, bias), Float8Kernel().gradient(grad, codes, scale, None)
    tensors = [t.cuda() for t in (codes, scale, bias)]
    there = Float8Kernel().multiplied(x.cuda(), *tensors), Float8Kernel().gradient(grad.cuda(), *tensors)
    for ours, theirs in zip(here, there, strict=True):
        assert off(theirs.cpu(), ours) < 2**-7  # sums in another order, of 14 digits where Hopper is fast
