"""Named adapters on one network, whoever carries them: the one in use, canonical state, loading, first values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from weft.adapters.initial import chance_of
from weft.adapters.recipe import Recipe, Standing
from weft.errors import ModelError, did_you_mean
from weft.math.sharded import fill, whole

Chance = Callable[[str], torch.Generator]  # a generator for the place of a tensor

UNSET = float("nan")  # what adapters hold before their first values: a loss then tells that they were forgotten


class Beside(Protocol):
    """What is trained of a network beside its adapters: modules as wholes, biases."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> every tensor of an adapter that its files or its checkpoints hold, in network order; those
        that are trained are parameters. Looked up anew, because engines may replace them."""
        ...

    def begin(self, name: str, chance: Chance) -> None:
        """Give one of its adapters its first values."""
        ...

    def answer(self, name: str | None) -> None:
        """Answer under one of its adapters from now on, or with None under none of them."""
        ...

    def rest(self) -> None:
        """Answer under none of them when the network is asked the next time; nothing waits for a backward pass."""
        ...


class Carrier(Beside, Protocol):
    """Some of a network's adapters as one way of carrying them holds them: hooks of ours, or PEFT's wrappers."""

    names: tuple[str, ...]

    def paths_of(self, name: str) -> tuple[str, ...]:
        """The layers that an adapter stands on, in the network's own order."""
        ...

    def base_layer(self, path: str) -> nn.Module:
        """The frozen layer under a path."""
        ...


class NamedAdapters:
    """Named adapters on the layers of one network; the base is frozen, adapter weights are fp32 masters.

    They have no values until `initialize` or `load_state_dict` gives them some: UNSET shows whoever asks before that.
    Outside `use` the base answers alone. A backward pass belongs inside `use`, for checkpointed blocks run their
    forward a second time there.
    """

    def __init__(
        self, standings: Mapping[str, Standing], carriers: Sequence[Carrier], seed: int, beside: Sequence[Beside] = ()
    ) -> None:
        self.recipes = {name: standing.recipe for name, standing in standings.items()}
        self.names = tuple(standings)
        self.wholes = {name: tuple(standing.whole) for name, standing in standings.items()}
        self.carriers = tuple(carriers)
        self.beside = tuple(beside)
        self.carried_by = {name: carrier for carrier in carriers for name in carrier.names}
        self.paths = self.paths_of(self.names[0])
        self.seed = seed
        self.in_use: str | None = None

    def _carrier(self, name: str) -> Carrier:
        assert name in self.names, f"no adapter is called '{name}', only {self.names}"
        return self.carried_by[name]

    def paths_of(self, name: str) -> tuple[str, ...]:
        """The layers that an adapter stands on, in the network's own order."""
        return self._carrier(name).paths_of(name)

    def base_layer(self, name: str, path: str) -> nn.Module:
        """The frozen layer under one of them."""
        return self._carrier(name).base_layer(path)

    def whole(self, name: str) -> tuple[str, ...]:
        """Paths of the modules that are trained whole beside an adapter: a tensor of theirs is called PATH.KEY."""
        return self.wholes[name]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return {
            key: tensor for part in (self._carrier(name), *self.beside) for key, tensor in part.tensors(name).items()
        }

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, the adapter's in network order, then those of modules that are trained whole and
        biases; looked up anew, because engines may replace parameters."""
        return {key: tensor for key, tensor in self._tensors(name).items() if isinstance(tensor, nn.Parameter)}

    def fixed(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor that belongs to an adapter and is not trained: PiSSA's first factors."""
        return {key: tensor for key, tensor in self._tensors(name).items() if not isinstance(tensor, nn.Parameter)}

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Answer under one adapter, or with None as the bare base; the former choice returns afterwards."""
        assert name is None or name in self.names, f"no adapter is called '{name}', only {self.names}"
        before = self.in_use
        self._answer(name)
        try:
            yield
        finally:
            if before is not None:
                self._answer(before)
            else:
                self.in_use = None
                for part in (*self.carriers, *self.beside):
                    part.rest()

    def _answer(self, name: str | None) -> None:
        self.in_use = name
        for carrier in self.carriers:
            carrier.answer(name if name in carrier.names else None)
        for part in self.beside:
            part.answer(name)

    @torch.no_grad()
    def initialize(self) -> None:
        """Give every adapter its first values, once the network stands where it trains. Every process draws them whole
        and keeps its part; those that come of a sharded base are made of one whole layer at a time."""
        for name in self.names:
            for part in (self._carrier(name), *self.beside):
                part.begin(name, partial(chance_of, self.seed, name))

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
    def after_step(self, name: str, moved: Tensor | None = None) -> Mapping[str, Tensor]:
        """What must hold after each optimizer step; numbers worth logging, on the device."""
        # Gathering the parameters takes as long as some layers do, so it is done where a rule asks for it.
        recipe = self.recipes[name]
        return recipe.after_step(self.paths_of(name), self.parameters(name), moved) if recipe.has_rule else {}


def begin_layers(carrier: Carrier, recipe: Recipe, name: str, chance: Chance) -> None:
    """First values of an adapter that stands on layers, one whole layer after the other."""
    for path, own in by_path(carrier.tensors(name), carrier.paths_of(name)).items():
        shapes = {end: tensor.shape for end, tensor in own.items()}
        first = recipe.first_values(partial(_at, chance, path), shapes, carrier.base_layer(path))
        for end, tensor in own.items():
            fill(tensor, first[end])


def _at(chance: Chance, path: str, end: str) -> torch.Generator:
    return chance(path + end)


def by_path(tensors: Mapping[str, Tensor], paths: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Path -> end of the name -> tensor. What belongs to none of the layers is left out."""
    known = set(paths)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path = key
        while path and path not in known:
            path = path.rpartition(".")[0]
        if path:
            found.setdefault(path, {})[key.removeprefix(path)] = tensor
    return found


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
