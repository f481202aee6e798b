"""The layers of a network that adapters can stand on: names and shapes, and the modules behind the names."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from weft.errors import ModelError, did_you_mean
from weft.math.sharded import whole
from weft.projection import FORWARD

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
EMBEDDING = "prompt_encoder.embedding.weight"  # canonical name of virtual tokens
READABLE = (torch.float32, torch.bfloat16, torch.float16)


def linears_of(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of every nn.Linear, quantized kinds included, in the network's own order."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }


def linears_at(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of those of some layers that are linear."""
    return {p: (each.out_features, each.in_features) for p, each in layers.items() if isinstance(each, nn.Linear)}


def layers_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Linear layers as `linears_of` gives them, and (out, in, *kernel) of every convolution, in network order."""
    found: dict[str, tuple[int, ...]] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = (module.out_features, module.in_features)
        elif isinstance(module, CONVOLUTIONS):
            found[path] = (module.out_channels, module.in_channels, *module.kernel_size)
    return found


def biases_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """PATH.bias -> (out,) of every linear layer and convolution that has a bias."""
    kinds = (nn.Linear, *CONVOLUTIONS)
    return {
        f"{path}.bias": tuple(module.bias.shape)
        for path, module in network.named_modules()
        if isinstance(module, kinds) and module.bias is not None
    }


def layers_at(network: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers and convolutions at paths, in the network's order. Raises ModelError for any other path."""
    wanted = set(paths)
    kinds = (nn.Linear, *CONVOLUTIONS)
    found: dict[str, nn.Module] = {
        path: module for path, module in network.named_modules() if path in wanted and isinstance(module, kinds)
    }
    if missing := [path for path in paths if path not in found]:
        advice = did_you_mean(missing[0], list(layers_of(network)))
        raise ModelError(f"{len(missing)} adapter targets are no linear layers, first '{missing[0]}'. {advice}")
    for path, module in found.items():
        if isinstance(module, CONVOLUTIONS) and not _is_plain(module):
            raise ModelError(
                f"adapter.targets: '{path}' is a convolution with groups, dilation or a padding other than zeros, "
                "which no adapter here follows. Exclude it."
            )
    return found


def rows_are_readable(layer: nn.Module) -> bool:
    """Whether the weight is plain numbers, (out, in) or a kernel, rather than packed or quantized codes."""
    shape, dtype = form_of_weight(layer)
    expected = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else shape
    return dtype in READABLE and shape == expected


def form_of_weight(layer: nn.Module) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a layer's weight. One that is decoded whenever it is asked for is decoded without numbers:
    while a network is read there may be none yet."""
    weight = layer._parameters.get("weight")
    if weight is None:
        weight = _with(layer, lambda tensor: tensor.to("meta")).weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape), weight.dtype


@torch.no_grad()
def dense_weight(layer: nn.Module, inputs: int = 1024) -> Tensor:
    """The weight (out, in) in fp32, of a convolution (out, in * kernel). Of a sharded layer every process must ask."""
    return plain_weight(layer, inputs).float()


@torch.no_grad()
def plain_weight(layer: nn.Module, inputs: int = 1024) -> Tensor:
    """The same in the dtype that it lies in or is decoded to, without a copy where it lies so.

    A layer whose weight is packed or quantized is asked for unit vectors, so many inputs at a time: its answers are the
    columns of what it multiplies with, whatever the storage.
    """
    layer = _with(layer, whole)
    if rows_are_readable(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1)
    assert isinstance(layer, nn.Linear), f"a {type(layer).__name__} keeps its weight as numbers"
    device, columns = next(iter([*layer.parameters(), *layer.buffers()])).device, []
    for start in range(0, layer.in_features, inputs):
        count = min(inputs, layer.in_features - start)
        unit = torch.zeros(count, layer.in_features, device=device)
        unit[torch.arange(count), start + torch.arange(count)] = 1
        columns.append((layer(unit).float() - (0 if layer.bias is None else layer.bias.float())).mT)
    return torch.cat(columns, 1)


def _with(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a layer whose own parameters are changed; it shares all else with it, but for an adapter's forward,
    which asks the layer itself."""
    twin = copy(layer)
    if twin.__dict__.pop(FORWARD, None) is not None:
        del twin.__dict__["forward"]
    twin._parameters = dict(layer._parameters)
    for name, parameter in layer._parameters.items():
        if parameter is not None and (changed := change(parameter)) is not parameter:
            twin._parameters[name] = nn.Parameter(changed, requires_grad=False)
    return twin


def _is_plain(layer: nn.Conv2d | nn.Conv3d) -> bool:
    undilated = all(step == 1 for step in layer.dilation)
    return layer.groups == 1 and undilated and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def refuse_packed(kind: str, layers: Mapping[str, nn.Module]) -> None:
    """Raises ModelError for a layer whose weight has not the shape of what it multiplies with."""
    for path, layer in layers.items():
        if isinstance(layer, nn.Linear) and form_of_weight(layer)[0] != (layer.out_features, layer.in_features):
            raise ModelError(
                f"adapter.kind: {kind} cannot stand on '{path}', whose weight is packed ({type(layer).__name__}): PEFT "
                "takes the shape of the change from it. Use adapter.kind=lora or oft, or another family.dtype."
            )
