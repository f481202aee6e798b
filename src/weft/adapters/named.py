"""What all backends share: canonical state, strict loading, and first values."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from weft.adapters.initial import chance_of
from weft.adapters.recipe import Recipe
from weft.errors import ModelError, did_you_mean
from weft.math.sharded import fill, whole

UNSET = float("nan")  # what adapters hold before their first values: a loss then tells that they were forgotten


class NamedAdapters(ABC):
    """Named adapters on the layers of one network; the base is frozen, adapter weights are fp32 masters.

    They have no values until `initialize` or `load_state_dict` gives them some: UNSET shows whoever asks before that.
    Outside `use` the base answers alone. A backward pass belongs inside `use`, for checkpointed blocks run their
    forward a second time there.
    """

    def __init__(self, recipe: Recipe, paths: Sequence[str], names: Sequence[str], seed: int) -> None:
        assert names and len(set(names)) == len(names), f"adapter names must differ and not be empty: {list(names)}"
        self.recipe = recipe
        self.names = tuple(names)
        self.paths = tuple(paths)
        self.seed = seed

    @abstractmethod
    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, in network order; looked up anew, because engines may replace parameters."""

    @abstractmethod
    def fixed(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor that belongs to an adapter and is not trained: PiSSA's first factors."""

    @abstractmethod
    def use(self, name: str | None) -> AbstractContextManager[None]:
        """Answer under one adapter, or with None as the bare base; the former choice returns afterwards."""

    @abstractmethod
    def base_layer(self, path: str) -> nn.Module:
        """The frozen layer under a path."""

    @torch.no_grad()
    def initialize(self) -> None:
        """Give every adapter its first values, once the network stands where it trains. Every process draws them whole
        and keeps its part; those that come of a sharded base are made of one whole layer at a time."""
        for name in self.names:
            for path, own in self._by_path({**self.parameters(name), **self.fixed(name)}).items():
                first = self.recipe.first_values(
                    partial(self._chance, name, path),
                    {end: tensor.shape for end, tensor in own.items()},
                    self.base_layer(path),
                )
                for end, tensor in own.items():
                    fill(tensor, first[end])

    def _chance(self, name: str, path: str, end: str) -> torch.Generator:
        return chance_of(self.seed, name, path + end)

    def _by_path(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Path -> end of the name -> tensor."""
        paths = set(self.paths)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            path = key
            while path not in paths:
                path = path.rpartition(".")[0]
                assert path, f"'{key}' belongs to none of the adapted layers"
            found.setdefault(path, {})[key.removeprefix(path)] = tensor
        return found

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> whole tensor, detached. It shares memory with the adapter's, as torch's does, unless that
        is sharded; then every process must ask."""
        return {key: whole(tensor.detach()) for key, tensor in {**self.parameters(name), **self.fixed(name)}.items()}

    @torch.no_grad()
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy whole tensors in. Raises ModelError when keys or shapes differ, naming the first of each kind."""
        own = {**self.parameters(name), **self.fixed(name)}
        problems = [*_key_problems(own, tensors), *_shape_problems(own, tensors)]
        if problems:
            raise ModelError(f"the weights do not fit adapter '{name}': {' '.join(problems)}")
        for key, tensor in own.items():
            fill(tensor, tensors[key])

    @torch.no_grad()
    def after_step(self, name: str) -> Mapping[str, float]:
        """What must hold after each optimizer step; numbers worth logging."""
        # Gathering the parameters takes as long as some layers do, so it is done where a rule asks for it.
        return self.recipe.after_step(self.paths, self.parameters(name)) if self.recipe.has_rule else {}


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
