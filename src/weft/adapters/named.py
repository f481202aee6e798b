"""What both backends share: canonical state, strict loading, first values, and the max-norm rule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from weft.adapters.initial import initial_a, initial_magnitude
from weft.adapters.lora import Lora
from weft.errors import ModelError, did_you_mean
from weft.math.lowrank import delta_norm, norm_ratio

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class NamedAdapters(ABC):
    """Named adapters on the linear layers of one network; the base is frozen, adapter weights are fp32 masters.

    Outside `use` the base answers alone. A backward pass belongs inside `use`, for checkpointed blocks run their
    forward a second time there.
    """

    def __init__(self, recipe: Lora, paths: Sequence[str], names: Sequence[str], seed: int) -> None:
        assert names and len(set(names)) == len(names), f"adapter names must differ and not be empty: {list(names)}"
        self.recipe = recipe
        self.names = tuple(names)
        self.paths = tuple(paths)
        self.seed = seed

    @abstractmethod
    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, in network order; looked up anew, because engines may replace parameters."""

    @abstractmethod
    def use(self, name: str | None) -> AbstractContextManager[None]:
        """Answer under one adapter, or with None as the bare base; the former choice returns afterwards."""

    @abstractmethod
    def base_weight(self, path: str) -> Tensor:
        """The frozen weight (out, in) under a path."""

    @torch.no_grad()
    def initialize(self) -> None:
        """Give every adapter its first values: again after a network that stood on the meta device got its weights."""
        for name in self.names:
            for key, parameter in self.parameters(name).items():
                if parameter.is_meta:
                    continue
                if key.endswith(A):
                    parameter.copy_(initial_a(self.seed, name, key.removesuffix(A), parameter.shape))
                elif key.endswith(B):
                    parameter.zero_()
                else:
                    parameter.copy_(initial_magnitude(self.base_weight(key.removesuffix(MAGNITUDE))))

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor, detached; it shares memory with the parameters, as torch's does."""
        return {key: parameter.detach() for key, parameter in self.parameters(name).items()}

    @torch.no_grad()
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in. Raises ModelError when keys or shapes differ, naming the first of each kind."""
        parameters = self.parameters(name)
        problems = [*_key_problems(parameters, tensors), *_shape_problems(parameters, tensors)]
        if problems:
            raise ModelError(f"the weights do not fit adapter '{name}': {' '.join(problems)}")
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])

    @torch.no_grad()
    def after_step(self, name: str) -> Mapping[str, float]:
        """Shrink every ||scale B A||_F above max_norm to it, half in A and half in B. Once per optimizer step."""
        limit = self.recipe.max_norm
        if limit is None:
            return {}
        parameters = self.parameters(name)
        norms, ratios = [], []
        for path in self.paths:
            a, b = parameters[path + A], parameters[path + B]
            norm = delta_norm(a, b, self.recipe.scale)
            ratio = norm_ratio(norm, limit)
            a.mul_(ratio.sqrt())
            b.mul_(ratio.sqrt())
            norms.append(norm * ratio)
            ratios.append(ratio)
        # One transfer to the host for the whole network.
        norm_all, scaled = torch.stack(norms), torch.stack(ratios) < 1
        mean, largest, count = torch.stack([norm_all.mean(), norm_all.max(), scaled.sum().to(norm_all)]).tolist()
        return {"max_norm/scaled": count, "max_norm/mean": mean, "max_norm/largest": largest}


def _key_problems(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in parameters if key not in tensors]
    unknown = [key for key in tensors if key not in parameters]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(parameters)} tensors are missing, first '{missing[0]}'.")
    if unknown:
        advice = did_you_mean(unknown[0], list(parameters))
        problems.append(f"{len(unknown)} tensors have no place in it, first '{unknown[0]}'. {advice}")
    return problems


def _shape_problems(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    wrong = [key for key, p in parameters.items() if key in tensors and tensors[key].shape != p.shape]
    if not wrong:
        return []
    key = wrong[0]
    found, expected = tuple(tensors[key].shape), tuple(parameters[key].shape)
    return [f"{len(wrong)} tensors have another shape, first '{key}': {found} in place of {expected}."]
