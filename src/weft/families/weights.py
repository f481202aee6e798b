"""Fill a network that has shapes only, one tensor of its files at a time: read, cast or packed, put, forgotten."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from weft.contracts import Berth, Read
from weft.errors import ConfigError, ModelError
from weft.families.memory import returned_at_once
from weft.families.storage import (
    COMPUTED,
    FULL,
    PACKINGS,
    Float8,
    Packed,
    PackedLinear,
    computable,
    encoded,
    packable,
    rounding_of,
    scaled,
)
from weft.families.stored import DTYPES, WeightFiles
from weft.math.float8 import E4M3, Float8Kernel
from weft.names.rules import Names

Module = TypeVar("Module", bound=nn.Module)
# Tensors beside a weight in 8 bits: its scale, and notes that only other programs' kernels need.
SCALES = (".scale_weight", ".weight_scale")
NOTES = (".scale_input", ".input_scale", ".comfy_quant")
MARKERS = ("scaled_fp8",)
HERE = Berth()  # read by this process, and left where it was read


def _nowhere(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Form:
    """How frozen weights are kept. dtype: fp32, bf16 or fp16, of what is not packed, and what is packed decodes to.
    storage: plain, fp8, int8 or nf4, of the linear layers in blocks. keeps_fp32: whether a tensor stays in fp32.
    compute: full, or fp8 where the linear layers of the inner blocks are multiplied as they are kept then."""

    dtype: str
    storage: str = "plain"
    keeps_fp32: Callable[[str], bool] = field(default=_nowhere)
    compute: str = "full"

    def full(self, name: str) -> torch.dtype:
        return torch.float32 if self.keeps_fp32(name) else FULL[self.dtype]


def bare(build: Callable[[], Module]) -> Module:
    """A module whose parameters have shapes only, and whose computed buffers (rope tables) are real."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tensor that two modules share must stay one
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        with torch.device("cpu"), returned_at_once():
            return build()
    finally:
        hook.remove()


@dataclass(frozen=True)
class Source:
    """The tensors of files under the names of a network. scales: weight in the file -> its scale there."""

    weights: WeightFiles
    names: Names
    scales: Mapping[str, str]
    label: str  # for messages

    @classmethod
    def open(
        cls, weights: WeightFiles, names: Callable[[Mapping[str, tuple[int, ...]]], Names], label: str
    ) -> "Source":
        """Translate the names of a file's tensors; scales and notes of 8-bit weights are set apart."""
        scales, shapes = {}, {}
        for name, shape in weights.shapes.items():
            owner = next((name.removesuffix(end) + ".weight" for end in SCALES if name.endswith(end)), None)
            if owner is not None:
                scales[owner] = name
            elif not name.endswith(NOTES) and name.rpartition(".")[2] not in MARKERS:
                shapes[name] = shape
        return cls(weights, names(shapes), scales, label)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.weights.entries[self.names[name].source].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        piece = self.names[name]
        stored = self.weights.entries[piece.source].shape
        if piece.shape is not None:
            return piece.shape
        return (sum(b - a for a, b in piece.rows), *stored[1:]) if piece.rows else stored

    def place(self, name: str) -> tuple[str, int]:
        """Where a tensor begins, so that files are read from front to back."""
        entry = self.weights.entries[self.names[name].source]
        return str(entry.file), entry.start

    def read(self, name: str) -> Tensor:
        piece = self.names[name]
        tensor = self.weights.read(piece.source, piece.rows)
        return tensor if piece.shape is None else tensor.view(piece.shape)

    def scale_shape(self, name: str) -> tuple[int, int]:
        """(1 or out, columns) of the scale of a weight in 8 bits; one number where the file has none."""
        out = self.shape(name)[0]
        scale = self.scales.get(self.names[name].source)
        numbers = 1 if scale is None else prod(self.weights.entries[scale].shape)
        if numbers == 1:
            return 1, 1
        rows = self.weights.entries[self.names[name].source].shape[0]
        if numbers % rows or self.shape(name)[1] % (numbers // rows):
            shape = self.weights.entries[scale].shape if scale else ()
            raise ModelError(
                f"{self.label}: the scale of '{name}' has the shape {shape}, which is neither one number, nor one for "
                "each row, nor one for each block of a row. Weft does not know this kind of fp8 file."
            )
        return out, numbers // rows

    def read_scale(self, name: str) -> Tensor:
        """The fp32 scale of a weight in 8 bits, (1 or out, columns)."""
        shape, piece = self.scale_shape(name), self.names[name]
        scale = self.scales.get(piece.source)
        if scale is None:
            return torch.ones(1, 1)
        rows = piece.rows if shape[0] > 1 else ()
        return self.weights.read(scale, rows).float().view(shape)

    def in_8_bits(self, name: str) -> bool:
        return self.dtype(name) in (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Reader:
    """The tensors of a source as they are read here, or by another process for all. All ask in one order."""

    source: Source
    by: Read

    def stored(self, name: str) -> Tensor:
        """A tensor as it lies in its file."""
        return self.by(lambda: self.source.read(name), self.source.shape(name), self.source.dtype(name))

    def scale(self, name: str) -> Tensor:
        """The fp32 scale of a weight in 8 bits, (1 or out, columns)."""
        return self.by(lambda: self.source.read_scale(name), self.source.scale_shape(name), torch.float32)

    def wide(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in a full precision, decoded where the file has it in 8 bits."""
        tensor = self.stored(name)
        if self.source.in_8_bits(name) and self.source.names[name].source in self.source.scales:
            return scaled(tensor.flatten(1), self.scale(name), dtype).view(tensor.shape)
        return tensor.to(dtype)


# ---- What is kept how ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """How a packed layer is kept. own: as the file's own codes. computed: multiplied in fp8, not decoded."""

    own: bool
    computed: bool = False


def packed_layers(
    network: nn.Module, blocks: Sequence[nn.Module], form: Form, source: Source | None
) -> dict[str, Kept]:
    """Path of each linear layer that is packed -> how. An fp8 file stays as it is under fp8: what its maker left wide
    stays wide. Raises ConfigError for files whose codes cannot be multiplied where that was asked for."""
    found = {} if form.storage == "plain" else _stored_layers(network, blocks, form, source)
    if form.compute == "fp8":
        for path in computable(network, blocks):
            found[path] = Kept(_has_factors(f"{path}.weight", form, source), computed=True)
    return found


def _stored_layers(
    network: nn.Module, blocks: Sequence[nn.Module], form: Form, source: Source | None
) -> dict[str, Kept]:
    own = source is not None and form.storage == "fp8" and any(source.in_8_bits(name) for name in source.names)
    paths = list(packable(network, blocks))
    if source is None or not own:
        return dict.fromkeys(paths, Kept(False))
    return {path: Kept(True) for path in paths if source.in_8_bits(f"{path}.weight")}


def _has_factors(name: str, form: Form, source: Source | None) -> bool:
    """Whether a file's own codes can be multiplied: e4m3, with one scale for the whole or for each row."""
    if source is None or not source.in_8_bits(name):
        return False
    columns = source.scale_shape(name)[1]
    if columns == 1 and source.dtype(name) == E4M3:
        return True
    if form.storage != "fp8":
        return False  # decoded and rounded anew, as family.dtype asks for
    kept = f"in {columns} blocks of each row" if columns > 1 else "as e5m2"
    raise ConfigError(
        f"family.compute: {source.label} keeps '{name}' {kept}, which fp8 products cannot take as it is. Write "
        "family.dtype=bf16, and the weights are rounded a second time, or family.compute=full."
    )


def weight_bytes(
    network: nn.Module, blocks: Sequence[nn.Module], form: Form, source: Source | None = None
) -> dict[int | None, int]:
    """Bytes of a network's frozen weights and tables in memory by the number of their block; None: outside."""
    packed = packed_layers(network, blocks, form, source)
    numbers = block_numbers(network, blocks)
    total: dict[int | None, int] = dict.fromkeys([None, *range(len(blocks))], 0)
    for name, parameter in network.named_parameters():
        path, _, end = name.rpartition(".")
        if end == "weight" and path in packed:
            size = _packed_bytes(name, tuple(parameter.shape), packed[path], form, source)
        else:
            size = parameter.numel() * form.full(name).itemsize
        total[numbers(name)] += size
    for name, buffer in network.named_buffers():
        total[numbers(name)] += buffer.numel() * buffer.element_size()
    return total


def _packed_bytes(name: str, shape: tuple[int, ...], kept: Kept, form: Form, source: Source | None) -> int:
    if kept.own:
        assert source is not None
        return prod(shape) + 4 * prod(source.scale_shape(name))
    packing = COMPUTED if kept.computed else PACKINGS[form.storage]
    return sum(packing.bytes_of((shape[0], shape[1])))


def block_numbers(network: nn.Module, blocks: Sequence[nn.Module]) -> Callable[[str], int | None]:
    """Name of a tensor -> number of the block that it is in."""
    number = {id(block): i for i, block in enumerate(blocks)}
    paths = {path: number[id(module)] for path, module in network.named_modules() if id(module) in number}

    def of(name: str) -> int | None:
        parts = name.split(".")
        return next((paths[p] for n in range(1, len(parts)) if (p := ".".join(parts[:n])) in paths), None)

    return of


# ---- Filling ------------------------------------------------------------------------------------------------------


def fill(network: Module, blocks: Sequence[nn.Module], source: Source, form: Form, berth: Berth = HERE) -> Module:
    """Read every tensor of a network into its place. Raises ModelError when the files hold another network."""
    wanted = matched(tensors_of(network), source)
    check_shapes(network, wanted, source)
    packed = packed_layers(network, blocks, form, source)
    number, reader = block_numbers(network, blocks), Reader(source, berth.read)
    with returned_at_once():
        for name in sorted(wanted, key=source.place):
            path, _, end = name.rpartition(".")

            def put(tensor: Tensor, block: int | None = number(name)) -> Tensor:
                return berth.put(tensor, block, len(blocks))

            if end == "weight" and path in packed:
                _pack(network, path, reader, packed[path], form, put)
                continue
            tensor = put(reader.wide(name, form.full(name)).contiguous())
            shared = nn.Parameter(tensor, requires_grad=False)
            for alias in wanted[name]:
                assign(network, alias, shared)
    source.weights.close()
    real_buffers(network)
    return network


def tensors_of(network: nn.Module) -> list[tuple[str, ...]]:
    """Parameters and saved buffers; together the names that parts of a network share one tensor under."""
    names: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [tuple(group) for group in names.values()]


def matched(groups: Sequence[tuple[str, ...]], source: Source) -> dict[str, tuple[str, ...]]:
    """Name in the files -> names in the network. Raises ModelError that counts what is missing and what is too much,
    with the first of each."""
    found = {next((n for n in group if n in source.names), group[0]): group for group in groups}
    missing = [name for name in found if name not in source.names]
    known = {name for group in groups for name in group}
    extra = [name for name in source.names if name not in known]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(found)} tensors are missing, first '{missing[0]}'")
    if extra:
        belong = "tensor belongs" if len(extra) == 1 else "tensors belong"
        faults.append(f"{len(extra)} {belong} elsewhere, first '{source.names[extra[0]].source}'")
    if faults:
        raise ModelError(f"{source.label}: {', and '.join(faults)}. The files are incomplete or of another model.")
    return found


def check_shapes(network: nn.Module, names: Mapping[str, tuple[str, ...]], source: Source) -> None:
    """Raises ModelError for tensors of other shapes than the network's, counting them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict(keep_vars=True).items()}
    other = [name for name in names if source.shape(name) != shapes[name]]
    if other:
        first = other[0]
        raise ModelError(
            f"{source.label}: {len(other)} tensors have another shape than the config asks for, first '{first}': "
            f"{source.shape(first)} in the file, {shapes[first]} expected. The config or the file is of another model."
        )


def _pack(
    network: nn.Module, path: str, reader: Reader, kept: Kept, form: Form, put: Callable[[Tensor], Tensor]
) -> None:
    """Put a packed layer in the place of a linear one; its bias is kept for when it comes."""
    linear = network.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    name, shape = f"{path}.weight", (linear.out_features, linear.in_features)
    rounding = 0.0
    if kept.own:
        codes, scale = reader.stored(name), reader.scale(name)
        packing = Float8(codes.dtype)
        codes = codes.view(torch.uint8)
    else:
        packing = COMPUTED if kept.computed else PACKINGS[form.storage]
        full = torch.float32 if reader.source.in_8_bits(name) else reader.source.dtype(name)
        weight = reader.wide(name, full)
        codes, scale = encoded(packing, weight)
        if kept.computed:
            rounding = rounding_of(packing, weight, codes, scale)
    put_packed(network, path, Packed(put(codes), put(scale), shape, packing, kernel_of(kept), rounding), form)


def kernel_of(kept: Kept) -> Float8Kernel | None:
    return Float8Kernel(exact=not kept.own) if kept.computed else None  # a file's scales are any numbers


def put_packed(network: nn.Module, path: str, packed: Packed, form: Form) -> None:
    linear = network.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    layer = PackedLinear(packed, linear.bias, FULL[form.dtype])
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, layer.train(linear.training))


def assign(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, end = name.rpartition(".")
    module = network.get_submodule(path)
    if end in module._parameters:
        assert isinstance(tensor, nn.Parameter)
        module._parameters[end] = tensor
    else:
        module._buffers[end] = tensor.data


def real_buffers(network: nn.Module) -> None:
    """Compute the buffers that no file has, where the network was made without numbers: by making it once more."""
    if not any(buffer.is_meta for _, buffer in network.named_buffers()):
        return
    made = bare(lambda: type(network).from_config(network.config))  # type: ignore[attr-defined]
    for name, buffer in made.named_buffers():
        if network.get_buffer(name).is_meta:
            assign(network, name, buffer)
