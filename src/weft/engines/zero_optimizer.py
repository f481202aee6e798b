"""An optimizer whose moments ZeRO spreads, in the form that every other engine's has: whole, by parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.engines.flat_adamw import FlatAdamW
from weft.errors import ConfigError, RunError

# Those that treat every number for itself: only they do not notice that ZeRO lays parameters end to end and cuts them.
ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


@dataclass(frozen=True)
class Share:
    """Where this process's part of a parameter lies. flat: the fp32 tensor that the inner optimizer moves. Numbers
    begin_flat... of it are numbers begin... of the parameter."""

    flat: Tensor
    begin_flat: int
    begin: int
    length: int


class Shares:
    """How ZeRO-2 spreads parameters: those of a group are laid end to end, and that is cut."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.group = {id(p): i for i, group in enumerate(zero.bit16_groups) for p in group}

    def flats(self) -> list[Tensor]:
        """What the inner optimizer moves in this process."""
        return list(self.zero.single_partition_of_fp32_groups)

    def flat_of(self, parameter: nn.Parameter) -> Tensor:
        """The one in which a parameter's part lies, or would lie if this process had one."""
        return self.flats()[self.group[id(parameter)]]

    def of(self, parameter: Any) -> Share | None:
        """This process's part of a parameter, if it has one."""
        found = parameter._hp_mapping
        if found is None:
            return None
        inside, outside = found.hp_fragment_address, found.lp_fragment_address
        return Share(self.flat_of(parameter), inside.start, outside.start, inside.numel)


class ZeroOptimizer(Optimizer):
    """Groups of the parameters as they are in the network; the engine steps. state_dict is torch's own, with whole
    tensors: saved here it goes on under any engine, and the other way round. Every process must ask for it.

    Raises ConfigError for an optimizer that ZeRO would change.
    """

    def __init__(self, given: Optimizer) -> None:
        if isinstance(given, FlatAdamW):
            given = given.apart()  # ZeRO lays parameters end to end itself
        kind = type(given)
        if kind.__name__ not in ELEMENTWISE or not kind.__module__.startswith("torch.optim"):
            raise ConfigError(
                f"optimizer: {kind.__name__} is not for engine.kind 'deepspeed': ZeRO lays parameters end to end and "
                "cuts them, and only optimizers that treat every number for itself do not notice. Write "
                "optimizer.kind=adamw, or engine.kind=torch."
            )
        super().__init__([dict(group) for group in given.param_groups], dict(given.defaults))
        self.inner = given
        self.deepspeed: Any = None  # the engine that moves it
        self.shares: Shares | None = None  # known once DeepSpeed has taken over

    def taken_over(self, deepspeed: Any) -> None:
        """Note the engine that moves the parameters from now on."""
        self.deepspeed, self.shares = deepspeed, Shares(deepspeed.optimizer)

    def step(self, closure: Any = None) -> None:
        raise AssertionError("ZeRO's optimizer is moved by its engine")

    def hand_on(self) -> None:
        """Give the inner optimizer the learning rates, and what else is set in groups."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        assert self.shares is not None
        numbers = {id(p): i for i, p in enumerate(self.parameters)}
        groups = [{**group, "params": [numbers[id(p)] for p in group["params"]]} for group in self.param_groups]
        states = [self.inner.state.get(self.shares.flat_of(p), {}) for p in self.parameters]
        entries: dict[int, dict[str, Any]] = {i: {} for i, state in enumerate(states) if state}
        for key in dict.fromkeys(key for state in states for key in state):
            holders = [i for i in entries if key in states[i]]
            spread = [i for i in holders if self._is_spread(states[i][key], self.parameters[i])]
            for i, whole in zip(spread, self._gathered(key, [self.parameters[i] for i in spread]), strict=True):
                entries[i][key] = whole
            for i in set(holders) - set(spread):
                value = states[i][key]
                entries[i][key] = value.clone() if isinstance(value, Tensor) else value
        return {"state": entries, "param_groups": groups}

    def _is_spread(self, value: Any, parameter: nn.Parameter) -> bool:
        assert self.shares is not None
        return isinstance(value, Tensor) and value.shape == self.shares.flat_of(parameter).shape

    def _gathered(self, key: str, parameters: list[nn.Parameter]) -> list[Tensor]:
        """A moment of several parameters, whole: each process adds its parts to zeros, in one collective."""
        assert self.shares is not None
        if not parameters:
            return []
        state = self.inner.state[self.shares.flat_of(parameters[0])][key]
        together = torch.zeros(sum(p.numel() for p in parameters), dtype=state.dtype, device=state.device)
        wholes = together.split([p.numel() for p in parameters])
        for parameter, whole in zip(parameters, wholes, strict=True):
            share = self.shares.of(parameter)
            if share is not None:
                moment = self.inner.state[share.flat][key]
                whole[share.begin : share.begin + share.length] = moment[share.begin_flat :][: share.length]
        dist.all_reduce(together)
        return [whole.view(p.shape) for p, whole in zip(parameters, wholes, strict=True)]

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises RunError when parameters that ZeRO moves together have gone different ways so far."""
        assert self.shares is not None
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        numbers = [i for saved in state_dict["param_groups"] for i in saved["params"]]
        pairs = list(zip(numbers, self.parameters, strict=True))
        for flat in self.shares.flats():
            own = [(state_dict["state"].get(i, {}), p) for i, p in pairs if self.shares.flat_of(p) is flat]
            self.inner.state.pop(flat, None)
            if any(entry for entry, _ in own):
                self.inner.state[flat] = self._laid(flat, own)

    def _laid(self, flat: Tensor, own: list[tuple[Mapping[str, Any], nn.Parameter]]) -> dict[str, Any]:
        """The inner state of one flat tensor from whole entries of its parameters."""
        assert self.shares is not None
        laid: dict[str, Any] = {}
        for key in own[0][0]:
            values = [entry.get(key) for entry, _ in own]
            if isinstance(values[0], Tensor) and values[0].shape == own[0][1].shape:
                laid[key] = torch.zeros_like(flat, dtype=values[0].dtype)
                for value, (_, parameter) in zip(values, own, strict=True):
                    share = self.shares.of(parameter)
                    if share is not None and value is not None:
                        part = value.reshape(-1)[share.begin : share.begin + share.length]
                        laid[key][share.begin_flat :][: share.length] = part.to(flat.device)
            else:
                laid[key] = self._common(key, values, flat)
        return laid

    def _common(self, key: str, values: list[Any], flat: Tensor) -> Any:
        """What has one value for all that ZeRO moves together, such as the count of steps."""
        said = {None if value is None else float(value) for value in values}
        if len(said) != 1 or None in said:
            raise RunError(
                f"the checkpoint's optimizer has several values of '{key}' for parameters that ZeRO moves together: "
                f"{sorted(map(str, said))[:3]}. Go on with engine.kind=torch."
            )
        value = values[0]
        if not isinstance(value, Tensor):
            return value
        options = self.inner.param_groups[0]
        on_device = bool(options.get("fused") or options.get("capturable"))
        return value.to(flat.device if on_device else "cpu", copy=True)
