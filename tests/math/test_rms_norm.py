"""RMSNorm with a frozen weight: its own gradient against autograd's in fp64, what it keeps, and what it starts."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from weft.math.rms_norm import Normed, RmsNorm, normed, plain_gradient

EPS, ROWS, WIDTH = 1e-3, 7, 40  # sqrt(40) is no power of two
ROUNDINGS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(x: Tensor, weight: Tensor, above: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
    """The answer and the gradient of x, in fp64."""
    wide = x.detach().double().requires_grad_()
    y = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.offset + weight.double())
    return y.detach(), torch.autograd.grad(y, wide, above.double())[0]


def far(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_its_gradient_is_that_of_autograd_to_a_rounding_or_two(dtype: torch.dtype, offset: float, device: str) -> None:
    norm = RmsNorm(EPS, offset)
    x, above = (drawn(2, ROWS, 3, WIDTH, seed=seed).to(device, dtype) for seed in (1, 2))
    x[0, 0] *= 1e-2  # there eps counts
    weight = drawn(WIDTH, seed=3).to(device, dtype)
    y, gradient = exact(x, weight, above, norm)
    found, inverse = norm.forward(x, weight, dtype)
    assert found.dtype == dtype
    assert inverse.shape == (2, ROWS, 3, 1)
    assert torch.equal(norm.again(x, weight, inverse, dtype), found)
    ours = norm.backward(x, above, weight, inverse)
    plain = plain_gradient(x, above, weight.to(inverse.dtype) + offset, inverse)
    assert far(found, y) < ROUNDINGS[dtype]
    assert far(ours, gradient) < ROUNDINGS[dtype]
    assert far(plain, gradient) < ROUNDINGS[dtype]
    assert ours.dtype == plain.dtype == dtype


def test_rows_that_are_not_next_to_each_other_and_no_rows_are_normed_too() -> None:
    norm, weight = RmsNorm(EPS, 0.0), drawn(WIDTH, seed=3).float()
    x, above = (drawn(ROWS, 2 * WIDTH, seed=seed).float()[:, :WIDTH] for seed in (1, 2))
    y, gradient = exact(x, weight, above, norm)
    found, inverse = norm.forward(x, weight, torch.float32)
    assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    assert_close(norm.backward(x, above, weight, inverse).double(), gradient, rtol=1e-5, atol=1e-5)
    none = x[:0]
    found, inverse = norm.forward(none, weight, torch.float32)
    assert found.shape == norm.backward(none, none, weight, inverse).shape == (0, WIDTH)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_keeps_its_input_and_a_number_a_row(offset: float) -> None:
    norm, x = RmsNorm(EPS, offset), drawn(ROWS, WIDTH, seed=1).float().requires_grad_()
    weight, above = drawn(WIDTH, seed=3).float(), drawn(ROWS, WIDTH, seed=2).float()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = normed(x, weight, norm)
    assert sorted(tensor.numel() for tensor in kept) == [ROWS, WIDTH, ROWS * WIDTH]
    truth, gradient = exact(x, weight, above, norm)
    assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    assert_close(torch.autograd.grad(y, x, above)[0].double(), gradient, rtol=1e-5, atol=1e-5)


def test_a_trained_weight_gets_autograds_gradient() -> None:
    norm, x = RmsNorm(EPS, 1.0), drawn(ROWS, WIDTH, seed=1).float()
    weight = drawn(WIDTH, seed=3).float().requires_grad_()
    y = normed(x, weight, norm)
    unit = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_close(torch.autograd.grad(y.sum(), weight)[0], unit.sum(0))


def test_fake_tensors_of_a_gpu_have_the_shapes_and_dtypes_of_real_ones() -> None:
    """A plan asks with them."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(WIDTH, dtype=torch.bfloat16, device="cuda")
        for offset in (0.0, 1.0):
            producer = Normed(RmsNorm(EPS, offset), weight, torch.bfloat16)
            h = producer.forward(x, weight)
            assert producer.inverse is not None
            assert producer.inverse.shape == (2, ROWS, 1)
            for found in (h, producer.forward(x, weight), producer.backward(x, h, weight)):
                assert (found.shape, found.dtype, found.device.type) == (x.shape, torch.bfloat16, "cuda")
