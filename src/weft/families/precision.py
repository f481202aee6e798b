"""What of a network must not be computed in half precision, whatever autocast is told."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def widen(network: nn.Module, keeps_fp32: Callable[[str], bool]) -> None:
    """Hold some of a network's parameters in fp32."""
    for name, parameter in network.named_parameters():
        if keeps_fp32(name):
            parameter.data = parameter.data.float()


def keep_fp32(module: nn.Module) -> None:
    """Compute a module in fp32 under autocast too, from what it is given in half precision as well.

    Time embeddings lose their small steps in bf16: at T = 833 its neighbours are 4 apart.
    """
    module.forward = MethodType(_forward_in_fp32, module)  # type: ignore[method-assign]  # a copy has its own


def _forward_in_fp32(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device_type(args, kwargs), enabled=False):
        return type(module).forward(module, *map(wide, args), **{name: wide(value) for name, value in kwargs.items()})


def keep_residual_fp32(embedder: nn.Module) -> None:
    """Let a residual stream that begins with this module's output run in fp32 under fp16.

    Wan's residual leaves fp16's range, whose largest number is 65,504. Its blocks add in the dtype of the stream, so it
    is enough to begin with a wide one. bf16 has fp32's range, and is left alone.
    """

    def answer(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.float() if output.dtype == torch.float16 else output

    embedder.register_forward_hook(answer)


def wide(value: Any) -> Any:
    """A floating tensor in fp32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """cpu, cuda, ...: where the first tensor among a call's arguments lies."""
    return next(value.device.type for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
