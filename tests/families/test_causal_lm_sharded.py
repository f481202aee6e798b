"""A language model in shards: its losses and the gradients of its adapters are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.test_causal_lm import ROWS, relative
from tests.multi import spawn
from tests.small_text import TextKind, make_text, packed
from weft.adapters.lora import Lora
from weft.contracts import DEFAULT, Model
from weft.engines.parallel import Parallel
from weft.engines.torch_engine import Torch
from weft.families.causal_lm import CausalLM
from weft.math.sharded import whole

CASES: list[tuple[TextKind, tuple[str, ...], str]] = [
    ("qwen3", ("all",), "native"),
    ("qwen3", ("q_proj", "lm_head"), "peft"),
    ("gemma2", ("all",), "native"),
    ("qwen3_moe", ("attention",), "native"),
]


def asked(folder: str, parallel: dict[str, Any], targets: tuple[str, ...], backend: str) -> tuple[Any, ...]:
    """Losses, gradients, norm. Both processes see the same rows, and each counts them once."""
    family = CausalLM(source=folder)
    engine = Torch(device="cpu", recompute=True).open(Parallel(**parallel))
    network = family.load("fp32", DEFAULT.name, engine.berth(0))
    recipe = Lora(backend=backend, rank=4, targets=list(targets))  # type: ignore[arg-type]
    paths = recipe.match(recipe.layers(network), family.targets, family.aliases).paths
    adapters = recipe.attach(network, paths, (DEFAULT.name,), 0)
    network = engine.place(network, family.blocks(network)).train()
    adapters.initialize()
    chance = torch.Generator().manual_seed(5)
    own = adapters.state_dict(DEFAULT.name)
    adapters.load_state_dict(DEFAULT.name, {k: 0.1 * torch.randn(t.shape, generator=chance) for k, t in own.items()})
    model = Model(network, family, adapters)
    tokens = packed(ROWS, family.config.vocab_size)
    with adapters.use(DEFAULT.name), engine.computing():
        losses = model.losses(tokens)
        engine.backward(losses.sum(), last=True)
    grads: dict[str, Tensor] = {}
    for key, parameter in adapters.parameters(DEFAULT.name).items():
        assert parameter.grad is not None
        grads[key] = whole(parameter.grad).clone()
    return losses.detach(), grads


def both(folders: list[str]) -> list[tuple[Any, ...]]:
    return [asked(f, {"shard": 2}, *case[1:]) for f, case in zip(folders, CASES, strict=True)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    root: Path = tmp_path_factory.mktemp("sharded")
    folders = [str(make_text(root / f"{i}", case[0])) for i, case in enumerate(CASES)]
    ranks = spawn(2, both, folders)
    for a, b in zip(*ranks, strict=True):
        assert torch.equal(a[0], b[0])
    return [(asked(f, {}, *case[1:]), two) for f, case, two in zip(folders, CASES, ranks[0], strict=True)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case[0]}-{case[1][-1]}" for case in CASES])
def test_shards_answer_and_learn_as_one_process(found, number: int) -> None:  # type: ignore[no-untyped-def]
    """The gradient is the sum over two processes that saw the same: twice that of one."""
    (losses, grads), (sharded, sums) = found[number]
    torch.testing.assert_close(sharded, losses, rtol=1e-5, atol=1e-5)
    assert sums.keys() == grads.keys()
    assert all(relative(sums[key], 2 * grads[key]) < 1e-5 for key in grads)
