"""A model of numbers that are normally distributed: what a teacher, a critic and a student of it answer is known.

Data is N(m, s^2), each number by itself, and x_t = (1-t) x_0 + t n has the variance v = (1-t)^2 s^2 + t^2. The mean of
x_0 given x_t is m + (1-t) s^2 / v (x_t - (1-t) m), and the velocity is (x_t - x_0) / t. A caption is the mean itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.contracts import DEFAULT, Batch, Denoise, Expert, Model
from weft.few_steps import StepList
from weft.objectives.dmd import CRITIC, STUDENT
from weft.objectives.few_step import part_of

Normal = tuple[Tensor, Tensor]  # mean and standard deviation


def posterior(x: Tensor, t: Tensor, mixture: Sequence[Normal]) -> Tensor:
    """The mean of x_0 given x_t = x (B, C, F, H, W) at t (B,). All numbers of an item come from the same one of several
    normals, each equally often, as those of a student do that was left at one of its steps."""
    t = t.reshape(-1, 1, 1, 1, 1)
    means, chances = [], []
    for mean, std in mixture:
        variance = ((1 - t) * std).square() + t.square()
        off = x - (1 - t) * mean
        means.append(mean + (1 - t) * std.square() / variance * off)
        chances.append(-0.5 * (off.square() / variance + variance.log()).sum((1, 2, 3, 4), keepdim=True))
    if len(means) == 1:
        return means[0]
    return (torch.stack(means) * torch.stack(chances).softmax(0)).sum(0)


class Numbers(nn.Module):
    """The base knows the caption's mean and one std. The student is a x + b, with an a and a b of each step. The critic
    learns one normal of each step, or with exact knows those that the student makes."""

    def __init__(self, steps: StepList, std: float, exact: bool = False) -> None:
        super().__init__()
        self.steps, self.exact = steps, exact
        self.role: str | None = None
        self.std = nn.Buffer(torch.tensor(std))
        count = len(steps.times)
        self.a, self.b = nn.Parameter(torch.full((count,), 0.3)), nn.Parameter(torch.full((count,), -1.0))
        self.mean, self.log_std = nn.Parameter(0.1 * torch.arange(count)), nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return (x - self.estimate(x, t, text)) / t.reshape(-1, 1, 1, 1, 1)

    def estimate(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if self.role is None:
            return posterior(x, t, [(text.reshape(-1, 1, 1, 1, 1), self.std)])
        if self.role.partition("_")[0] == STUDENT:
            number = self.number_of(t)
            return self.a[number] * x + self.b[number]
        if self.exact:
            return posterior(x, t, self.made())
        return posterior(x, t, list(zip(self.mean, self.log_std.exp(), strict=True)))

    def number_of(self, t: Tensor) -> int:
        """Which of the steps is asked at this time."""
        (time,) = t.unique()
        return min(range(len(self.steps.times)), key=lambda i: abs(self.steps.times[i] - float(time)))

    @torch.no_grad()
    def made(self) -> list[Normal]:
        """What the student makes where its way is left at each step: affine of a normal, mixed with fresh noise."""
        found: list[Normal] = []
        for number, t in enumerate(self.steps.times):
            mean, std = found[-1] if found else (torch.zeros(()), torch.ones(()))
            x_mean, x_std = (1 - t) * mean, (((1 - t) * std).square() + t**2).sqrt()
            found.append((self.a[number] * x_mean + self.b[number], self.a[number].abs() * x_std))
        return found


class Roles:
    """The parts of Numbers as adapters, of an expert under its name."""

    paths = ()

    def __init__(self, network: Numbers, expert: str = DEFAULT.name) -> None:
        self.network = network
        self.names = tuple(part_of(part, expert) for part in (STUDENT, CRITIC))

    def paths_of(self, name: str) -> tuple[str, ...]:
        return ()

    def initialize(self) -> None: ...

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        own = {STUDENT: ("a", "b"), CRITIC: ("mean", "log_std")}[name.partition("_")[0]]
        return {key: self.network.get_parameter(key) for key in own}

    def fixed(self, name: str) -> dict[str, Tensor]:
        return {}

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        before, self.network.role = self.network.role, name
        try:
            yield
        finally:
            self.network.role = before

    def state_dict(self, name: str) -> dict[str, Tensor]:
        return {key: p.detach() for key, p in self.parameters(name).items()}

    @torch.no_grad()
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        for key, p in self.parameters(name).items():
            p.copy_(tensors[key])

    def after_step(self, name: str, moved: Tensor | None = None) -> Mapping[str, Tensor]:
        return {}


@dataclass
class NumbersFamily:
    """Asks a network of numbers."""

    flow_shift: float = 5.0
    medium: Any = "video"
    image: Any = "none"
    embeds_guidance: bool = False
    experts: tuple[Expert, ...] = (DEFAULT,)
    all_experts: tuple[Expert, ...] = (DEFAULT,)

    def forward(self, call: Any, inputs: Denoise) -> Tensor:
        return call(inputs.x, inputs.t, inputs.cond["text"])


def family_of(flow_shift: float = 5.0, **options: Any) -> Any:
    """A family that has of a VideoFamily what an objective asks for."""
    return NumbersFamily(flow_shift, **options)


def numbers(steps: StepList, std: float, exact: bool = False) -> Model:
    """A model of numbers, its student and its critic far from the teacher."""
    network = Numbers(steps, std, exact)
    return Model(network, NumbersFamily(steps.shift), Roles(network))  # type: ignore[arg-type]


def blank(items: int, mean: float, negative: float | None = None, side: int = 8) -> Batch:
    """Captions alone, and in what shape samples are made: (items, 4, 1, side, side)."""
    tensors = {"blank": torch.zeros(items, 4, 1, side, side), "text": torch.full((items, 1, 1), mean)}
    if negative is not None:
        tensors["negative/text"] = torch.full((1, 1, 1), negative)
    return Batch(tensors, tuple(map(str, range(items))))
