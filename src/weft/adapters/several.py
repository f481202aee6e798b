"""The adapters of several networks as one: each network has its own, under its own names."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from weft.contracts import Adapters


class SeveralAdapters:
    """Adapters whose names stand on different networks. `use` of one leaves the others as they are, so that the
    adapters of two experts can be in use together; `use(None)` rests them all."""

    def __init__(self, networks: Mapping[str, Adapters]) -> None:
        self.networks = dict(networks)
        self.of = {name: adapters for adapters in networks.values() for name in adapters.names}
        self.names = tuple(self.of)
        assert len(self.names) == sum(len(adapters.names) for adapters in networks.values()), "a name stands twice"
        self.paths = next(iter(networks.values())).paths

    def paths_of(self, name: str) -> tuple[str, ...]:
        return self.of[name].paths_of(name)

    def whole(self, name: str) -> tuple[str, ...]:
        return self.of[name].whole(name)

    def base_layer(self, name: str, path: str) -> nn.Module:
        return self.of[name].base_layer(name, path)

    def initialize(self) -> None:
        for adapters in self.networks.values():
            adapters.initialize()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return self.of[name].parameters(name)

    def fixed(self, name: str) -> dict[str, Tensor]:
        return self.of[name].fixed(name)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        with ExitStack() as stack:
            for adapters in self.networks.values() if name is None else (self.of[name],):
                stack.enter_context(adapters.use(name))
            yield

    def state_dict(self, name: str) -> dict[str, Tensor]:
        return self.of[name].state_dict(name)

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.of[name].load_state_dict(name, tensors)

    def after_step(self, name: str, moved: Tensor | None = None) -> Mapping[str, Tensor]:
        return self.of[name].after_step(name, moved)
