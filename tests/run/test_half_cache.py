"""Half precision that a cache keeps goes to the device as it is, and learns what it did when the loader widened it."""

from typing import Any

import pytest
import torch

from tests.run.test_resume import EXACT, STEPS, assert_same_run, silent
from tests.small import config_of
from weft.data import laying
from weft.data.loader import VideoExperience
from weft.run.start import train_run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.dtype]]:
    """The dtypes of each batch that a loader makes from here on."""
    seen: list[dict[str, torch.dtype]] = []
    made = VideoExperience._batch

    def noted(self: VideoExperience, *asked: Any) -> Any:
        batch = made(self, *asked)
        seen.append({name: tensor.dtype for name, tensor in batch.tensors.items()})
        return batch

    monkeypatch.setattr(VideoExperience, "_batch", noted)
    return seen


def test_widening_on_the_device_learns_bit_by_bit_what_widening_in_the_loader_does(plain, drawn, monkeypatch):
    exact = {**EXACT, "data": {**EXACT["data"], "cache_dtype": "bf16"}, "validation": {"every": STEPS}}
    late, early = (config_of(plain, **exact, name=name) for name in ("late", "early"))
    assert train_run(late, silent).finished
    assert drawn and all(of["latents"] == torch.bfloat16 and of["text"].itemsize == 2 for of in drawn)
    drawn.clear()
    monkeypatch.setattr(laying, "HALVES", set())
    assert train_run(early, silent).finished
    assert drawn and all(of["latents"] == of["text"] == torch.float32 for of in drawn)
    assert_same_run(late.folder, early.folder)
