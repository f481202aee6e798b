"""Frozen linear layers whose weights are kept in 8 or 4 bits and decoded for each multiplication, forward and backward.

The layers are nn.Linear to whoever looks for adapter targets; their gradient goes to the input alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import ConfigError, ModelError
from weft.math.float8 import MULTIPLE, by_rows, fits
from weft.math.frozen import frozen_product
from weft.projection import Kernel, computing_dtype

FULL = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED = ("fp8", "int8", "nf4")
BLOCK = 64  # numbers along the input that share a scale
SAMPLED = 64  # rows by which the rounding of a weight is known
CHUNK = 1 << 24  # numbers that are encoded at once: the copy in fp32 stays small
FP8 = torch.float8_e4m3fn


class Packing(Protocol):
    """A way to keep a weight (out, in) as codes and scales."""

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and fp32 scales of a weight of whole rows."""
        ...

    def decode(self, codes: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor: ...

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Bytes of the codes and of the scales of a weight (out, in)."""
        ...


def columns(width: int) -> int:
    """Scales of a row: one for each 64 numbers, or one where 64 does not divide the row."""
    return width // BLOCK if width % BLOCK == 0 else 1


def scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (out, in) times scale (1 or out, columns), multiplied in fp32 and rounded once to dtype."""
    out, width = codes.shape
    parts = codes.to(dtype).view(out, scale.shape[1], width // scale.shape[1])
    return torch.mul(parts, scale.unsqueeze(2), out=torch.empty_like(parts)).view(out, width)


def largest(weight: Tensor, top: float) -> Tensor:
    """The scale (out, columns) that takes the largest number of each block to top; 1 for blocks of zeros."""
    peak = weight.float().view(weight.shape[0], columns(weight.shape[1]), -1).abs().amax(2)
    return torch.where(peak > 0, peak / top, torch.ones_like(peak))


@dataclass(frozen=True)
class Float8:
    """Eight-bit floats with an fp32 scale for each block. Codes are kept as uint8, so that no cast of a module, and
    no code that asks for floating tensors, can turn them into numbers."""

    kind: torch.dtype = FP8

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.finfo(self.kind).max
        scale = largest(weight, top)
        parts = weight.float().view(*scale.shape, -1) / scale.unsqueeze(2)
        return parts.clamp_(-top, top).to(self.kind).view(weight.shape).view(torch.uint8), scale

    def decode(self, codes: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return scaled(codes.view(self.kind), scale, dtype)

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return prod(shape), 4 * shape[0] * columns(shape[1])


@dataclass(frozen=True)
class Float8Rows(Float8):
    """Eight-bit floats as they are multiplied: e4m3 with one scale for each row, a power of two."""

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = by_rows(weight.float())
        return codes.view(torch.uint8), scale

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return prod(shape), 4 * shape[0]


@dataclass(frozen=True)
class Int8:
    """Integers in -127..127 with an fp32 scale for each block."""

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = largest(weight, 127.0)
        parts = weight.float().view(*scale.shape, -1) / scale.unsqueeze(2)
        return parts.round_().clamp_(-127, 127).to(torch.int8).view(weight.shape), scale

    def decode(self, codes: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return scaled(codes, scale, dtype)

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return prod(shape), 4 * shape[0] * columns(shape[1])


@dataclass(frozen=True)
class Nf4:
    """Sixteen quantiles of a normal distribution, by bitsandbytes' kernels. Dettmers et al. 2023, arXiv:2305.14314."""

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        kernels = _bitsandbytes()
        codes, scale = kernels.quantize_4bit(weight.float().contiguous(), BLOCK, "nf4", torch.uint8)
        return codes, scale.float()

    def decode(self, codes: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # As one row: on some processors bitsandbytes 0.50 decodes wrongly where blocks run over the ends of rows.
        flat = _bitsandbytes().dequantize_4bit(codes, scale, BLOCK, "nf4", [prod(shape)], dtype)
        return flat.view(shape)

    def bytes_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return -(-prod(shape) // 2), 4 * -(-prod(shape) // BLOCK)


PACKINGS: dict[str, Packing] = {"fp8": Float8(), "int8": Int8(), "nf4": Nf4()}
COMPUTED = Float8Rows()  # of the layers that are multiplied in fp8


def _bitsandbytes() -> Any:
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "family.dtype: nf4 needs the package bitsandbytes, which is not installed. "
            "Install it with 'pip install weft[quantized]', or write family.dtype=fp8."
        )
    import bitsandbytes  # noqa: F401  (registers the operators)

    return torch.ops.bitsandbytes


def encoded(packing: Packing, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a whole weight, some rows at a time."""
    rows = max(1, CHUNK // weight.shape[1])
    if weight.shape[1] % BLOCK:
        rows = weight.shape[0]  # blocks of NF4 then run over the ends of rows
    parts = [packing.encode(chunk) for chunk in weight.split(rows)]
    codes, scales = zip(*parts, strict=True)
    return (codes[0], scales[0]) if len(parts) == 1 else (torch.cat(codes), torch.cat(scales))


def rounding_of(packing: Packing, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    """Relative error of codes, on some rows of the weight (out, in) that they were made from."""
    rows = slice(None, None, max(1, weight.shape[0] // SAMPLED))
    wanted = weight[rows].float()
    found = packing.decode(codes[rows], scale[rows], (wanted.shape[0], wanted.shape[1]), torch.float32)
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-38))


def check_storage(storage: str) -> None:
    """Raises ModelError where a storage cannot be used on this machine."""
    if storage == "nf4":
        _bitsandbytes()


def storage_of(dtype: str, precision: str, stored: str) -> tuple[str, str]:
    """The full precision of weights, kept or decoded, and how the large ones are kept: plain, fp8, int8 or nf4.

    dtype: as the config says. precision: of the engine. stored: kind of the file; auto keeps fp8 files in fp8.
    """
    if dtype == "auto":
        return precision, "fp8" if stored.startswith("fp8") else "plain"
    return (precision, dtype) if dtype in PACKED else (dtype, "plain")


# ---- The layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) as codes and scales. kernel: how it is multiplied; None: decoded first. rounding: how far the
    codes are from what was encoded, relative, where that is known."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    packing: Packing
    kernel: Kernel | None = None
    rounding: float = 0.0


@dataclass(frozen=True)
class Decoding:
    """A layer of codes, scales and a bias or None, decoded for each multiplication; nothing decoded is kept."""

    packing: Packing
    shape: tuple[int, int]

    def product(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """x W^T + b (N, out) of x (N, in), in x's dtype."""
        return frozen_product(self, x, *tensors)

    def multiplied(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        codes, scale, bias = tensors
        assert codes is not None and scale is not None
        weight = self.packing.decode(codes, scale, self.shape, x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        """grad W (N, in) of grad (N, out), in grad's dtype."""
        codes, scale, _ = tensors
        assert codes is not None and scale is not None
        return grad @ self.packing.decode(codes, scale, self.shape, grad.dtype)


class PackedLinear(nn.Linear):
    """y = x W^T + b with a frozen W (out, in) kept as codes and scales."""

    def __init__(self, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.out_features, self.in_features = packed.shape
        self.codes = nn.Parameter(packed.codes, requires_grad=False)
        self.scale = nn.Parameter(packed.scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packing, self.dtype = packed.packing, dtype
        self.kernel: Kernel = packed.kernel or Decoding(packed.packing, packed.shape)
        self.rounding = packed.rounding

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight (out, in): a new tensor at each call, which cannot be written through."""
        return self.decode(self.dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.packing.decode(self.codes, self.scale, (self.out_features, self.in_features), dtype)

    def weft_kernel(self) -> tuple[Kernel, tuple[Tensor | None, ...]]:
        """For whoever multiplies by itself: see weft.projection."""
        return self.kernel, (self.codes, self.scale, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Computed in autocast's dtype, else the input's."""
        kernel, tensors = self.weft_kernel()
        return kernel.product(input.to(computing_dtype(input)), *tensors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packing={self.packing}, kernel={type(self.kernel).__name__}"


def computable(network: nn.Module, blocks: Sequence[nn.Module]) -> set[str]:
    """Paths of the linear layers that may be multiplied in fp8: those that may be packed, but for the first and the
    last block, whose errors show most, and for widths that the hardware does not take. Raises ConfigError for none."""
    inner = packable(network, blocks[1:-1])
    found = {path for path, layer in inner.items() if fits(layer.out_features, layer.in_features)}
    if not found:
        raise ConfigError(
            "family.compute: fp8 leaves the first and the last block as they are, and takes layers whose widths divide "
            f"by {MULTIPLE}. This network of {len(blocks)} blocks has none. Write family.compute=full."
        )
    return found


def packable(network: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Linear]:
    """The linear layers that may be packed: those inside blocks, but for the modulation by time (that is in a norm)."""
    inside = {id(module) for block in blocks for module in block.modules() if isinstance(module, nn.Linear)}
    return {
        path: module
        for path, module in network.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear) and not _modulates(path)
    }


def _modulates(path: str) -> bool:
    parts = (part for part in path.split(".") if part != "model")  # as transformers calls what stands below a head
    return any(part.startswith("norm") or "mod" in part for part in parts)
