"""Products of frozen layers in eight-bit floats: forward and input gradient in e4m3, one scale for each row.

Letters: N tokens. All scales are powers of two, so that scaling rounds nothing, in half precision too, and each number
is rounded once, to e4m3's four digits. The scales of a weight's rows do not come out of the sum over rows that its
input gradient is; they go into the gradient before that is rounded, which costs nothing where rounding is relative.
So one copy of a weight serves both ways. Gradients are e4m3 like the rest: with e5m2's three digits they are worse.
Micikevicius et al. 2022, arXiv:2209.05433.
"""

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.math.frozen import frozen_product

E4M3 = torch.float8_e4m3fn
TOP = 448.0  # its largest number
ADA, HOPPER = (8, 9), (9, 0)
MULTIPLE = 16  # of both widths of a layer, as the hardware wants it
MANTISSA, EXPONENT = 0x7FFFFF, 0x7F800000  # of an fp32's bits


def power_above(x: Tensor) -> Tensor:
    """The least power of two that is not below x, fp32 and positive, by its bits. Infinity stays what it is."""
    return ((x.view(torch.int32) + MANTISSA) & EXPONENT).view(torch.float32)


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of x (N, width), and their scales (N, 1) fp32. What is not finite stays so."""
    peak = torch.linalg.vector_norm(x, float("inf"), 1, keepdim=True, dtype=torch.float32)
    scale = power_above(peak.clamp_min(1e-30) / TOP)
    return _coded(x, scale), scale


def as_a_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one scale (1, 1) for all rows."""
    peak = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).view(1, 1)
    scale = power_above(peak.clamp_min(1e-30) / TOP)
    return _coded(x, scale), scale


def _coded(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float() if x.dtype == torch.float16 else x  # whose powers of two do not reach far enough
    return (wide * scale.reciprocal().to(wide.dtype)).to(E4M3)


@dataclass(frozen=True)
class Float8Kernel:
    """A layer of e4m3 codes (out, in) kept as uint8, scales (out, 1) or (1, 1) fp32, and a bias (out,) or None.

    exact: whether the scales are powers of two, and the gradient can be scaled in half precision without rounding.
    """

    exact: bool = True

    def product(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """x W^T + b (N, out) of x (N, in), in x's dtype."""
        return frozen_product(self, x, *tensors)

    def multiplied(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        codes, scale, bias = _parts(tensors)
        own, of_rows = by_rows(x)
        return self.scaled(own, codes.t(), of_rows, scale.t().expand(1, codes.shape[0]), bias, x.dtype)

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        """grad W (N, in) of grad (N, out), in grad's dtype."""
        codes, scale, _ = _parts(tensors)
        assert not (torch.is_grad_enabled() and grad.requires_grad), "a rounded product has no second derivative"
        dtype = grad.dtype if self.exact or scale.numel() == 1 else torch.float32
        uneven = scale.numel() > 1
        own, of_rows = by_rows(grad * scale.t().to(dtype) if uneven else grad)
        columns = torch.ones_like(scale[:1]) if uneven else scale
        # The hardware reads both factors along the sum: W turned on the way costs 0.5 % of a long product.
        turned = codes.t().contiguous().t()  # (out, in)
        return self.scaled(own, turned, of_rows, columns.expand(1, codes.shape[1]), None, grad.dtype)

    def scaled(
        self, a: Tensor, b: Tensor, of_rows: Tensor, of_columns: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The product, where it is."""
        return scaled_product(a, b, of_rows, of_columns, bias, dtype)


def _parts(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scale, bias = tensors
    assert codes is not None and scale is not None
    return codes.view(E4M3), scale, bias


def scaled_product(
    a: Tensor, b: Tensor, of_rows: Tensor, of_columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(a x of_rows) (b x of_columns) + bias, summed in fp32: a (N, K) and b (K, M) e4m3, scales (N, 1) and (1, M)."""
    if a.device.type != "cuda":
        return _emulated(a, b, of_rows, of_columns, bias, dtype)
    return by_hardware(a, b, of_rows, of_columns, bias, dtype, has_row_scales(a.device))


def by_hardware(
    a: Tensor, b: Tensor, of_rows: Tensor, of_columns: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: bool
) -> Tensor:
    """The same by torch's kernel. rows: which takes a scale for each row."""
    wide = torch.bfloat16 if dtype != torch.float32 else dtype  # what the hardware answers in
    if rows and wide == torch.bfloat16:
        given = None if bias is None else bias.to(wide)
        y = torch._scaled_mm(a, b, of_rows, of_columns.contiguous(), given, out_dtype=wide, use_fast_accum=True)
        return y.to(dtype)
    one = torch.ones((), device=a.device)
    y = torch._scaled_mm(a, b, one, one, out_dtype=wide, use_fast_accum=True)
    y = (y * of_rows.to(wide)).mul_(of_columns)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _emulated(
    a: Tensor, b: Tensor, of_rows: Tensor, of_columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same numbers on a processor without such arithmetic: slow, for measurements and tests."""
    y = (a.float() @ b.float()).mul_(of_rows).mul_(of_columns)
    return (y if bias is None else y.add_(bias)).to(dtype)


# ---- Where it runs ------------------------------------------------------------------------------------------------


@functools.cache
def has_row_scales(device: torch.device) -> bool:
    """Whether torch's product takes a scale for each row there; elsewhere they are multiplied in afterwards."""
    return row_scales_on(torch.cuda.get_device_capability(device), torch.__version__, platform.system())


def row_scales_on(capability: tuple[int, int], version: str, system: str) -> bool:
    """Hopper and later, and Ada from torch 2.12 on (before, it stalls: pytorch #177651); not on Windows."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return system != "Windows" and (capability >= HOPPER or (capability == ADA and numbers >= (2, 12)))


def lacking(device: torch.device) -> str | None:
    """Why products in fp8 cannot be made on a device; None where they can. A CPU emulates them."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "fp8 products are written for NVIDIA's GPUs alone"
    found = torch.cuda.get_device_capability(device)
    if found < ADA:
        return f"this GPU has no fp8 arithmetic (capability {found[0]}.{found[1]}, and 8.9 is the first that has)"
    return None


def fits(out: int, width: int) -> bool:
    """Whether the hardware takes a layer of these widths."""
    return out % MULTIPLE == 0 and width % MULTIPLE == 0
