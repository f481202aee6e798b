"""Documents without text: a multilayer perceptron that sorts rows of small integers, as a family and as a learner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tests.learners import FixedStream, NoMilestones
from weft.adapters.attach import Standing, attach
from weft.adapters.no_adapter import NoAdapter
from weft.contracts import DEFAULT, Batch, Documents, Expert, Model
from weft.engines.single_device import SingleEngine
from weft.run.config import Schedule
from weft.run.learner import Learner
from weft.run.optimizers import CustomOptimizer
from weft.run.pace import Pace
from weft.run.roles import Rate
from weft.run.train import Course, train

ROLE = DEFAULT.name
LENGTH = 8
WORDS = 17  # values of an id: 0 to 16, as the pixels of scikit-learn's digits
SGD = CustomOptimizer(path="torch.optim.SGD", lr=0.1)


class Perceptron(nn.Module):
    """Linear layers with ReLU between: all but the last are its body, the last is its head."""

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        pairs = list(pairwise(sizes))
        self.body = nn.ModuleList(nn.Linear(a, b) for a, b in pairs[:-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(*pairs[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = self.dropout(layer(x).relu())
        return self.head(x)


@dataclass(frozen=True)
class ToyDocuments:
    """A family whose documents are rows of L ids, each a number in [0, 1]; padding is 0."""

    sizes: tuple[int, ...] = (8, 6, 5, 3)
    dtype: torch.dtype = torch.float64
    dropout: float = 0.0
    seed: int = 0
    medium: str = "documents"
    kind: str = "toy"
    experts: tuple[Expert, ...] = (DEFAULT,)
    all_experts: tuple[Expert, ...] = (DEFAULT,)
    multi_label: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(f"class {i}" for i in range(self.sizes[-1]))

    @property
    def targets(self) -> Mapping[str, str]:
        return {"auto": r"body\.\d+", "all": r"body\.\d+"}

    @property
    def context(self) -> int:
        return self.sizes[0]

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        return ("head",)

    def network(self) -> Perceptron:
        """With weights by the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Perceptron(self.sizes, self.dropout).to(self.dtype)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return list(network.get_submodule("body").children())

    def forward(self, call: Callable[..., Any], inputs: Documents) -> Tensor:
        numbers = inputs.ids.to(self.dtype) / (WORDS - 1)
        return call(torch.where(inputs.mask, numbers, 0.0))


def documents(rows: int, seed: int = 0, replay: int = 0, several: bool = False, classes: int = 3) -> Batch:
    """Rows by chance, and as many replayed ones as asked for; several: labels of which each row may have any."""
    chance = torch.Generator().manual_seed(seed)

    def some(count: int) -> dict[str, Tensor]:
        ids = torch.randint(WORDS, (count, LENGTH), generator=chance)
        labels = torch.randint(2, (count, classes), generator=chance).float()
        if not several:
            labels = torch.randint(classes, (count,), generator=chance)
        return {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "labels": labels}

    tensors = some(rows) | {"fresh": torch.ones(rows, dtype=torch.bool)}
    if replay:
        tensors |= {f"replay/{name}": tensor for name, tensor in some(replay).items()}
    return Batch(tensors, tuple(f"2019:{seed}.{i}" for i in range(rows)))


def model_of(family: ToyDocuments, recipe: Any = None, seed: int = 0) -> Model:
    """The family's network, all of it trained; recipe: an adapter on its body and its head beside that."""
    network = family.network()
    recipe = recipe or NoAdapter()
    if isinstance(recipe, NoAdapter):
        standing = Standing(recipe, ())
    else:
        paths = recipe.match(recipe.layers(network), family.targets, family.aliases).paths
        standing = Standing(recipe, paths, whole=family.heads(network))
    adapters = attach(network, {ROLE: standing}, seed)
    adapters.initialize()
    return Model(network.train(), family, adapters)  # type: ignore[arg-type]


def learner_of(
    objective: Any, family: ToyDocuments, optimizer: Any = SGD, steps: int = 1000, recipe: Any = None, seed: int = 0
) -> Learner:
    """A learner as run/assemble.py makes it."""
    model = model_of(family, recipe, seed)
    state = objective.init(model)
    optimizers = objective.optimizers(model, state, lambda name, own: optimizer.build(own, lambda key: 1.0))
    engine = SingleEngine(torch.device("cpu"), "fp32")
    return Learner(model, objective, state, engine, optimizers, seed, Pace(objective, family.experts, steps))


def trained(
    learner: Learner, batches: Sequence[Batch], steps: int, milestones: Any = None, **schedule: Any
) -> list[Any]:
    """The events of so many steps of the real loop on the given batches, in turn."""
    told: list[Any] = []
    settings = Schedule(**{"steps": learner.step + steps, "max_norm": 0.0, **schedule})
    steady = {name: Rate("constant", 0, 0.0, max_norm=0.0) for name in learner.objective.steady}  # type: ignore[attr-defined]
    course = Course(settings, milestones or NoMilestones(), told.append, rates=steady)
    train(learner, [FixedStream(batches, learner.step + steps)], course)
    return told


def weights(learner: Learner) -> dict[str, Tensor]:
    """Copies of what is trained."""
    return {name: p.detach().clone() for name, p in learner.model.adapters.parameters(ROLE).items()}
