"""scikit-learn's digits, turned or shuffled anew for each task, through the real data, objectives and loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import nn

from tests.learners import NoMilestones
from tests.small_documents import WORDS, ToyDocuments, learner_of
from weft import plugins
from weft.contracts import Batch, Documents
from weft.data.documents import ReplayMemory
from weft.data.documents_loader import opened
from weft.data.documents_survey import TEST, TRAIN, Collection, DocumentsSurvey, Padding
from weft.math.transfer import ScoreMatrix
from weft.run.config import Schedule
from weft.run.learner import Learner
from weft.run.optimizers import CustomOptimizer
from weft.run.roles import Rate
from weft.run.train import Course, train

Kind = Literal["rotations", "permutations"]
SIDE, CLASSES = 8, 10
PIXELS = SIDE * SIDE
LAYERS = (PIXELS, 100, 100, CLASSES)
TESTED = 497  # images, the same ones of every task
MEMORY, REPLAYED, BATCH, GLANCES = 200, 10, 10, 5


@dataclass(frozen=True)
class Method:
    """A learner of the stream. lr: of plain SGD. settings: of the objective."""

    kind: str
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    glances: int = GLANCES
    clip: float = 0.0  # norm of the outer gradient

    @property
    def objective(self) -> Any:
        return plugins.find("objective", self.kind)(**self.settings)


# As La-MAML's code for MNIST has it (run_experiments.sh, rotations): inner steps on single samples, a rate for each
# number, both gradients cut to norm 2, and no ordinary steps before.
PUBLISHED = {"preset": "paper", "inner_steps": BATCH, "inner_clip": None, "warm_up": 0.0}
RATES = {"start": 0.15, "lr": 0.3}
METHODS: Mapping[str, Method] = {
    "online": Method("traditional", 0.1),
    "replay": Method("replay", 0.2),
    "replay, equal evaluations": Method("replay", 0.1, glances=25),
    "agem": Method("agem", 0.1),
    "cmaml, first order": Method("cmaml", 0.1, {**PUBLISHED, "order": "first", "rate": 0.1}, clip=2.0),
    "sync, first order": Method(
        "sync", 0.3, {**PUBLISHED, "order": "first", "rates": {"start": 0.15, "lr": 0.1}}, clip=2.0
    ),
    "lamaml, first order": Method("lamaml", 0.1, {**PUBLISHED, "order": "first", "rates": RATES}, clip=2.0),
    "lamaml, second order": Method("lamaml", 0.1, {**PUBLISHED, "order": "second", "rates": RATES}, clip=2.0),
}


@cache
def images() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All 1,797 images (n, 8, 8) of 0 to 16 in an order by chance, and their digits."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.images[order], digits.target[order].astype(np.int64)


def changes(kind: Kind, tasks: int, seed: int) -> list[Any]:
    """How each task's images are changed: turned by an angle of its own part of 0 to 180 degrees, as in the published
    MNIST rotations, or with its pixels in an order of its own."""
    rng = np.random.default_rng([seed, 1])
    if kind == "rotations":
        angles = [180 * (task + rng.random()) / tasks for task in range(tasks)]
        return [
            lambda x, angle=angle: np.clip(rotate(x, angle, axes=(2, 1), reshape=False, order=1), 0, WORDS - 1)
            for angle in angles
        ]
    orders = [rng.permutation(PIXELS) for _ in range(tasks)]
    return [lambda x, order=order: x.reshape(len(x), -1)[:, order].reshape(x.shape) for order in orders]


@cache
def survey_of(kind: Kind, tasks: int, samples: int, seed: int, glances: int) -> DocumentsSurvey:
    """The stream as a survey of documents whose tokens are pixels."""
    pictures, digits = images()
    rng, ids, facts = np.random.default_rng([seed, 2]), [], []
    for task, change in enumerate(changes(kind, tasks, seed)):
        chosen = TESTED + rng.choice(len(pictures) - TESTED, samples, replace=False)
        for split, numbers in ((TRAIN, chosen), (TEST, np.arange(TESTED))):
            ids.append(np.rint(change(pictures[numbers])).astype(np.int32).reshape(len(numbers), -1))
            facts += [(task, split, digits[number]) for number in numbers]
    every = np.concatenate(ids)
    of_task, of_split, labels = (np.array(column) for column in zip(*facts, strict=True))
    rows = np.arange(len(every))
    documents = Collection(
        every.reshape(-1), np.arange(len(every) + 1) * PIXELS, rows + 1, of_task, of_split, rows, labels
    )
    names = tuple(f"task {task}" for task in range(tasks))
    return DocumentsSurvey(
        documents=documents, labels=tuple(map(str, range(CLASSES))), multi_label=False, names=names,
        experiences={name: documents.within(TRAIN, task) for task, name in enumerate(names)},
        batch_size=BATCH, glances=glances, padding=Padding(0, False), length=PIXELS, truncate="head", cut=0,
        whole=PIXELS, unreadable=(), rows_read=len(every), left_out={}, notices=(), problems=(), grouped=False,
    )  # fmt: skip


@dataclass
class Scores(NoMilestones):
    """Accuracy on all tasks after each."""

    tests: Mapping[str, Batch] = field(default_factory=dict)
    rows: list[list[float]] = field(default_factory=list)

    @torch.no_grad()
    def after_experience(self, learner: Learner) -> None:
        right = []
        for batch in self.tests.values():
            logits = learner.model.logits(Documents(batch["ids"], batch["mask"]))
            right.append((logits.argmax(1) == batch["labels"]).double().mean().item())
        self.rows.append(right)


@dataclass(frozen=True)
class Shape:
    """Of a stream. With SHORT the whole table takes minutes, with LONG hours."""

    tasks: int
    samples: int


SHORT, LONG = Shape(5, 100), Shape(10, 200)


def matrix_of(method: Method, kind: Kind, seed: int, shape: Shape = SHORT) -> tuple[ScoreMatrix, float]:
    """R of one run, and how many gradients of a batch it has taken."""
    survey = survey_of(kind, shape.tasks, shape.samples, seed, method.glances)
    per_task = ceil(shape.samples / BATCH) * method.glances
    ends = {name: (task + 1) * per_task for task, name in enumerate(survey.names)}
    objective, family = method.objective, ToyDocuments(sizes=LAYERS, dtype=torch.float32, seed=seed)
    data = Data(BATCH, method.glances, memory(objective))
    dataset = opened(data, survey, seed=seed, last_steps=ends, per_step=1)  # type: ignore[arg-type]
    steps = ends[survey.names[-1]]
    learner = learner_of(objective, family, CustomOptimizer(path="torch.optim.SGD", lr=method.lr), steps, seed=seed)
    begin(learner.model.network, seed)
    scores = Scores(tests={name: joined(batches) for name, batches in dataset.tests.items()})
    rates = {name: Rate("constant", 0, 0.0, 0.0) for name in objective.steady}
    schedule = Schedule(steps=steps, max_norm=method.clip)
    assert train(learner, dataset.stream, Course(schedule, scores, lambda event: None, rates=rates))
    return ScoreMatrix(survey.names, survey.names, np.array(scores.rows)), steps * objective.gradient_evaluations


@torch.no_grad()
def begin(network: nn.Module, seed: int) -> None:
    """First weights as the published code draws them: Kaiming's normal distribution, biases zero."""
    chance = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=chance)
            nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class Data:
    """What the loader asks of a config's section."""

    batch_size: int
    glances: int
    replay: ReplayMemory | None
    shuffle: bool = True


def memory(objective: Any) -> ReplayMemory | None:
    return ReplayMemory(size=MEMORY, batch=REPLAYED) if objective.replays else None


def joined(batches: list[Batch]) -> Batch:
    names = batches[0].tensors
    tensors = {name: torch.cat([batch[name] for batch in batches]) for name in names}
    return Batch(tensors, tuple(key for batch in batches for key in batch.keys))
