"""The linear layers of a network: their names and shapes, and the modules behind the names."""

from collections.abc import Sequence

from torch import nn

from weft.errors import ModelError, did_you_mean


def linears_of(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of every nn.Linear, quantized kinds included, in the network's own order."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }


def linears_at(network: nn.Module, paths: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers at paths, in the network's order. Raises ModelError for a path that is no linear layer."""
    wanted = set(paths)
    found = {
        path: module for path, module in network.named_modules() if path in wanted and isinstance(module, nn.Linear)
    }
    if missing := [path for path in paths if path not in found]:
        advice = did_you_mean(missing[0], list(linears_of(network)))
        raise ModelError(f"{len(missing)} adapter targets are no linear layers, first '{missing[0]}'. {advice}")
    return found
