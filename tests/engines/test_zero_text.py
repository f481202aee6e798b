"""A language model under ZeRO learns what it learns on one process: a small real Qwen3 with a tied head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.equality import distance
from tests.families.test_causal_lm import ROWS
from tests.multi import spawn
from tests.small_text import make_qwen3, packed
from weft.adapters.lora import Lora
from weft.contracts import DEFAULT, Engine, Model
from weft.engines.deepspeed import DeepSpeed
from weft.engines.torch_engine import Torch
from weft.families.causal_lm import CausalLM

pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
STEPS = 3


def taught(folder: Path, engine: Engine, backend: str, copies: int) -> dict[str, Any]:
    """Steps of AdamW on the sum over `copies` of the same rows; losses, lengths of gradients, and the adapter."""
    family = CausalLM(source=str(folder))
    network = family.load("fp32", DEFAULT.name, engine.berth(0))
    recipe = Lora(backend=backend, rank=4, targets=("all",))  # type: ignore[arg-type]
    paths = recipe.match(recipe.layers(network), family.targets, family.aliases).paths
    adapters = recipe.attach(network, paths, (DEFAULT.name,), 0)
    network = engine.place(network, family.blocks(network)).train()
    adapters.initialize()
    named = adapters.parameters(DEFAULT.name)
    given = torch.optim.AdamW([{"params": list(named.values()), "names": list(named)}], lr=1e-2)
    optimizer = engine.own(network, {"train": given})["train"]
    model, tokens = Model(network, family, adapters), packed(ROWS, family.config.vocab_size)
    losses, norms = [], []
    for _ in range(STEPS):
        with adapters.use(DEFAULT.name), engine.computing():
            loss = model.losses(tokens).sum() / 10
            engine.backward(copies * loss, last=True)
        losses.append(float(loss.detach()))
        norms.append(float(engine.step(optimizer, 1.0).norm))
    return {
        "losses": losses,
        "norms": norms,
        "adapter": {k: t.clone() for k, t in adapters.state_dict("default").items()},
    }


def under_zero(folder: Path) -> list[dict[str, Any]]:
    engines = (DeepSpeed(device="cpu", zero=2), DeepSpeed(device="cpu", zero=3, recompute=True))
    return [
        taught(folder, engine.open(), backend, 1) for engine, backend in zip(engines, ("peft", "native"), strict=True)
    ]


@pytest.mark.slow
def test_two_processes_under_zero_learn_what_one_learns(tmp_path: Path):
    """Both read the same rows, so that their sum is twice what one of them finds. B begins at 0: the first steps of
    AdamW are hardly more than signs, and rounding weighs ten times what it does in test_zero."""
    folder = make_qwen3(tmp_path / "model")
    expected = taught(folder, Torch(device="cpu").open(), "native", 2)
    for said in spawn(2, under_zero, folder):
        for found in said:
            assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6)
            assert found["norms"] == pytest.approx(expected["norms"], rel=2e-6)
            assert distance(found["adapter"], expected["adapter"]) < 2e-5
