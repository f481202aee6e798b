"""Noise prediction, kept as a legacy: its formula by hand, and that it is never what a config gets by default."""

import pytest
import torch
from torch.testing import assert_close

from tests.small import config_of, plain_config
from weft.contracts import Batch
from weft.objectives.flow_matching import FlowMatching, Question
from weft.objectives.legacy_epsilon import LegacyEpsilon


def test_x_is_a_mixture_by_square_roots_and_the_target_is_the_noise(zero, asked):
    latents, noise = torch.full((2, 1, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1, 1), 3.0)
    batch = Batch({"latents": latents}, ("a", "b"))
    found = LegacyEpsilon().errors(zero, batch, Question(noise, torch.tensor([0.0, 0.36]), "default"))
    assert_close(asked.questions[0].x.flatten(), torch.tensor([2.0, 0.8 * 2 + 0.6 * 3]))
    assert found.tolist() == [9.0, 9.0]  # a network that answers zero is wrong by the noise


@pytest.mark.parametrize("kind", ["flow-matching", "legacy-epsilon"])
def test_it_must_be_asked_for_by_name(kind, tmp_path):
    plain = plain_config(tmp_path, "tiny-wan", tmp_path)
    config = config_of(plain, objective={"kind": kind})
    assert type(config.objective) is {"flow-matching": FlowMatching, "legacy-epsilon": LegacyEpsilon}[kind]
