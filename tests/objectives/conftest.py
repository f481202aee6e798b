"""A small real Wan, and a toy family that answers zero and keeps what it was asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners import learner_of, small_config
from tests.small import make_wan
from weft.contracts import DEFAULT, Denoise, Expert, Model
from weft.run.learner import Learner


@dataclass
class Asked:
    """A family whose velocity is zero everywhere."""

    medium = "video"

    questions: list[Denoise] = field(default_factory=list)
    image: Any = "none"
    experts: tuple[Expert, ...] = (DEFAULT,)

    def forward(self, call: Callable[..., Any], inputs: Denoise) -> Tensor:
        self.questions.append(inputs)
        return torch.zeros_like(inputs.x)

    @property
    def times(self) -> Tensor:
        return torch.cat([question.t for question in self.questions])


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def zero(asked: Asked) -> Model:
    """A model that predicts no movement: its error is the mean square of the target."""
    return Model(nn.Identity(), asked, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    root: Path = tmp_path_factory.mktemp("objective")
    return learner_of(small_config(root, make_wan(root / "model")))
