"""Optimizers by name: sections that build a torch optimizer over named parameters."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from weft.errors import ConfigError
from weft.section import Section

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

LrFactor = Callable[[str], float]


def parameter_groups(
    parameters: "Mapping[str, nn.Parameter]", lr: float, weight_decay: float, factor: LrFactor
) -> list[dict[str, Any]]:
    """One group for each learning-rate factor (LoRA+ has two), in the order in which the factors first appear.

    Each group carries `base_lr`, from which the schedule computes `lr`, and `names`, by which checkpoints pair state.
    """
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        scale = factor(name)
        group = groups.setdefault(
            scale,
            {"params": [], "names": [], "lr": lr * scale, "base_lr": lr * scale, "weight_decay": weight_decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class Adam(Section):
    """What both kinds of AdamW take."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate at the top of the schedule")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="decay of the two moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay")


class AdamW(Adam):
    """AdamW. Loshchilov & Hutter 2019, arXiv:1711.05101."""

    kind: Literal["adamw"] = "adamw"

    def build(self, parameters: "Mapping[str, nn.Parameter]", factor: LrFactor) -> "Optimizer":
        """Flat where parameters can lie end to end; else torch's own, of sharded ones too, fused where the device has
        the kernel, which all of torch's devices but mps do for fp32."""
        import torch

        from weft.engines.flat_adamw import FlatAdamW, can_be_flat

        groups = parameter_groups(parameters, self.lr, self.weight_decay, factor)
        if can_be_flat(list(parameters.values())):
            return FlatAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        on = next(iter(parameters.values())).device.type
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=on in ("cuda", "cpu"))


class AdamW8bit(Adam):
    """AdamW with moments in 8 bits, by bitsandbytes. Dettmers et al. 2022, arXiv:2110.02861. The host waits for each
    gradient's length, for the kernels step by any."""

    kind: Literal["adamw8bit"] = "adamw8bit"

    def build(self, parameters: "Mapping[str, nn.Parameter]", factor: LrFactor) -> "Optimizer":
        """Raises ConfigError when bitsandbytes is not installed."""
        try:
            optimizers = import_module("bitsandbytes.optim")
        except ImportError as missing:
            raise ConfigError(
                "optimizer.kind: 'adamw8bit' needs bitsandbytes, which is not installed. "
                "Run: pip install 'weft[quantized]', or choose 'adamw'."
            ) from missing
        groups = parameter_groups(parameters, self.lr, self.weight_decay, factor)
        return optimizers.AdamW8bit(groups, lr=self.lr, betas=self.betas, eps=self.eps)


class CustomOptimizer(Section):
    """Any torch optimizer class by its dotted path, with its own arguments. The host waits for each gradient's length,
    unless it is one of torch's that takes `fused`, which look for themselves whether it is finite."""

    kind: Literal["custom"] = "custom"
    path: str = Field(description="module and class, such as torch.optim.Adafactor")
    lr: float = Field(default=1e-4, gt=0, description="learning rate at the top of the schedule")
    weight_decay: float = Field(default=0.0, ge=0, description="passed on to the class")
    args: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments of the class")

    @field_validator("path")
    @classmethod
    def _is_dotted(cls, path: str) -> str:
        if "." not in path or not all(part.isidentifier() for part in path.split(".")):
            raise ValueError(f"'{path}' is not a dotted path. Write it like torch.optim.Adafactor.")
        return path

    def build(self, parameters: "Mapping[str, nn.Parameter]", factor: LrFactor) -> "Optimizer":
        """Raises ConfigError when the class is not there, is no optimizer, or refuses its arguments."""
        from torch.optim import Optimizer

        module, _, name = self.path.rpartition(".")
        try:
            made = getattr(import_module(module), name)
        except (ImportError, AttributeError) as missing:
            raise ConfigError(f"optimizer.path: '{self.path}' cannot be imported ({missing}).") from missing
        if not (isinstance(made, type) and issubclass(made, Optimizer)):
            raise ConfigError(f"optimizer.path: '{self.path}' is not a torch optimizer class.")
        groups = parameter_groups(parameters, self.lr, self.weight_decay, factor)
        make: Callable[..., Any] = made
        try:
            return make(groups, **{"lr": self.lr, **self.args})
        except (TypeError, ValueError) as refused:
            raise ConfigError(f"optimizer.args: {self.path} refuses its arguments: {refused}.") from refused
