"""The table of attention kernels: each is scaled_dot_product_attention, forward and backward, under a name."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from weft.math import attention
from weft.math.sdpa import KERNELS, Kernel, backend_of, kernel_for
from weft.math.tiled import TILED, kernel_here

SCALE = 1 / math.sqrt(32)


def asked(device: str = "cpu", dtype: torch.dtype = torch.float32, keys: int = 43) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 37, 32), (2, 3, keys, 32), (2, 3, keys, 32))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def check(kernel: Kernel, device: str, dtype: torch.dtype, bound: float, with_extras: bool) -> None:
    """Against the same attention in fp32, made of plain products."""
    given, grad = asked(device, dtype), torch.randn(2, 3, 37, 32, device=device)
    wide = [tensor.detach().float().requires_grad_() for tensor in given]
    q, k, v = wide
    scores = q @ k.mT * SCALE
    wanted = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(wanted, wide, grad)
    plain = (given[0].detach(), given[1].detach(), given[2].detach())
    out, sums, extras = kernel.forward(*plain, SCALE)
    found = kernel.backward(grad.to(dtype), plain, out, sums, SCALE, extras if with_extras else ())
    assert sums.shape == (2, 3, 37)
    torch.testing.assert_close(sums.float(), scores.logsumexp(-1), rtol=bound, atol=bound)
    for ours, theirs in zip((out, *found), (wanted, *gradients), strict=True):
        assert float((ours.float() - theirs.detach()).norm() / theirs.detach().norm()) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("with_extras", [True, False])
def test_the_cpus_kernel_is_attention_forward_and_backward(dtype: torch.dtype, bound: float, with_extras: bool) -> None:
    check(KERNELS["cpu-flash"], "cpu", dtype, bound, with_extras)


def test_tiles_are_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", 2 * 3 * 43 * 5)  # five queries at a time
    with sdpa_kernel(SDPBackend.MATH):
        check(TILED, "cpu", torch.float32, 1e-5, True)
        check(TILED, "cpu", torch.bfloat16, 1e-2, True)
    q, k, v = asked()
    assert kernel_here(q, k, v) is KERNELS["cpu-flash"]
    assert kernel_here(q.to("meta"), k.to("meta"), v.to("meta")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("with_extras", [True, False])
def test_a_gpus_kernels_are_attention_forward_and_backward(name: str, with_extras: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0) and name != "efficient":
        pytest.skip("this GPU has the memory-efficient kernel alone")
    if capability[0] != 9 and name == "cudnn":
        pytest.skip("cuDNN's is for Hopper and later")
    check(KERNELS[name], "cuda", torch.float16, 1e-2, with_extras)


def test_the_kernel_is_the_one_that_torch_would_run_and_none_where_it_is_switched_off() -> None:
    given = asked()
    assert kernel_for(*given) is KERNELS["cpu-flash"]
    assert backend_of(*given) == "cpu-flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_for(*given) is None
        assert backend_of(*given) == "math"


def test_groups_of_heads_and_values_of_another_width_have_no_kernel_here() -> None:
    q, k, v = asked()
    assert kernel_for(q, k[:, :1], v[:, :1]) is None
    assert kernel_for(q, k, v[..., :16]) is None
    assert backend_of(q, k[:, :1], v[:, :1]) in ("cpu-flash", "math")


def test_the_names_follow_a_mask() -> None:
    q, k, v = asked()
    mask = torch.ones(1, 1, 37, 43, dtype=torch.bool)
    assert backend_of(q, k, v, mask) in ("cpu-flash", "math")
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, mask), KERNELS["cpu-flash"].forward(q, k, v, SCALE)[0]
    )
