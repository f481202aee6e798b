"""Adapters of every kind on a base that lies in shards on several processes are those of one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.conftest import PRESETS, answer, new_wan
from tests.adapters.recipes import KINDS
from tests.adapters.test_packed_base import pack
from tests.multi import spawn
from weft.adapters.full import FullChange
from weft.adapters.lora import Lora
from weft.adapters.named import NamedAdapters
from weft.adapters.recipe import Recipe
from weft.contracts import Engine
from weft.engines.parallel import Parallel
from weft.engines.residency import frozen_by_block
from weft.engines.torch_engine import Torch

NAMES = ("student", "critic")
RECIPES: dict[str, Recipe] = {
    **KINDS,
    "lora": Lora(rank=3, targets="attention+ffn"),
    "full": FullChange(targets=("attn1.to_q", "ffn.net.2", "patch_embedding")),
    "dora": Lora(rank=3, dora=True, alpha=2),
    "dora native": Lora(rank=3, dora=True, alpha=2, backend="native"),
    "max norm": Lora(rank=5, max_norm=0.3),
    "max norm native": Lora(
        rank=5, conv_rank=2, max_norm=0.3, backend="native", targets=("attention", "patch_embedding")
    ),
}  # fmt: skip
PACKED = {"pissa", "pissa native", "dora", "dora native", "oft"}  # shown on a base in 8 bits too
CASES = [*RECIPES, *(f"{name} on fp8" for name in sorted(PACKED))]
MESHES = {2: Parallel(shard="auto"), 3: Parallel(shard="auto"), 4: Parallel(data=2, shard=2)}
# What is shown on how many: on three no width divides, and some parts are empty; on four there are two copies.
SHOWN = {
    2: CASES,
    3: ["full", "loha", "lokr", "oft", "pissa", "conv native", "dora native", "max norm native", "dora on fp8"],
    4: ["lokr", "pissa native", "dora", "max norm"],
}


@dataclass(frozen=True)
class Shown:
    """first: values of both adapters. answers: of the new adapter, under none, and of both when they were changed.
    gradients, ruled: of the first one, and what a step's rule left of it."""

    first: dict[str, Tensor]
    answers: list[Tensor]
    gradients: dict[str, Tensor]
    ruled: dict[str, Tensor]
    told: dict[str, float]


def all_shown(cases: Sequence[str], parallel: Parallel) -> dict[str, Shown]:
    engine = Torch(device="cpu", precision="fp32", recompute=True).open(parallel)
    return {case: shown(case, engine) for case in cases}


def shown(case: str, engine: Engine) -> Shown:
    """What an adapter is and does on this engine: attached before the weights have numbers, placed, begun, changed."""
    name, _, packed = case.partition(" on ")
    network = new_wan(layers=1)
    if packed:
        pack(network)
    adapters = placed(RECIPES[name], network.requires_grad_(False), engine)
    first = {f"{role} {key}": t.clone() for role in NAMES for key, t in adapters.state_dict(role).items()}
    answers = [asked(network, adapters, "student"), asked(network, adapters, None)]
    for seed, role in enumerate(NAMES):
        change(adapters, role, seed)
    answers += [asked(network, adapters, role) for role in NAMES]
    network.train()
    with adapters.use("student"):
        loss = answer(network).square().mean()
        with adapters.use("critic"), torch.no_grad():
            answer(network)  # a look in between, by another role
        engine.backward(loss / engine.data_world, last=True)
    assert all(p.grad is None for p in adapters.parameters("critic").values())
    gradients = {key: whole(p.grad) for key, p in adapters.parameters("student").items()}
    told = {name: float(value) for name, value in adapters.after_step("student").items()}
    ruled = {key: t.clone() for key, t in adapters.state_dict("student").items()}
    return Shown(first, answers, gradients, ruled, told)


def placed(recipe: Recipe, network: Any, engine: Engine) -> NamedAdapters:
    """Adapters on a network whose weights went to their berth, as a run does it."""
    blocks, berth = list(network.blocks), engine.berth(0)
    for block, tensors in frozen_by_block(network, blocks).items():
        for tensor in tensors:
            tensor.data = berth.put(tensor.data, block, len(blocks))
    paths = recipe.match(recipe.layers(network), PRESETS, {}).paths
    adapters = recipe.attach(network, paths, NAMES, seed=7)
    engine.place(network, network.blocks)
    adapters.initialize()
    return adapters


def change(adapters: NamedAdapters, role: str, seed: int) -> None:
    chance, state = torch.Generator().manual_seed(seed), adapters.state_dict(role)
    trained = adapters.parameters(role)
    moved = {k: t + 0.1 * torch.randn(t.shape, generator=chance) if k in trained else t for k, t in state.items()}
    adapters.load_state_dict(role, moved)


def asked(network: nn.Module, adapters: NamedAdapters, role: str | None) -> Tensor:
    with adapters.use(role), torch.no_grad():
        return answer(network).clone()


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


@pytest.fixture(scope="module")
def alone() -> dict[str, Shown]:
    return all_shown(CASES, Parallel())


@pytest.fixture(scope="module")
def together() -> dict[int, list[dict[str, Shown]]]:
    """By the number of processes: what each of them shows."""
    return {world: spawn(world, all_shown, SHOWN[world], MESHES[world], timeout=300) for world in MESHES}


places = pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in SHOWN.items() for case in cases])


@places
def test_first_values_are_the_same_whatever_the_mesh(alone, together, world, case):
    for shown in together[world]:
        assert list(shown[case].first) == list(alone[case].first)
        for key, tensor in alone[case].first.items():
            assert tensor.isfinite().all() and torch.equal(shown[case].first[key], tensor), key


@places
def test_answers_and_gradients_are_those_of_one_process(alone, together, world, case):
    for shown in together[world]:
        for found, expected in zip(shown[case].answers, alone[case].answers, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # Every process asks the same, so their gradients' sum over as many as that is one process's.
        assert list(shown[case].gradients) == list(alone[case].gradients)
        for key, gradient in alone[case].gradients.items():
            error = (shown[case].gradients[key] - gradient).norm() / gradient.norm()
            assert gradient.any() and error < 1e-5, (key, float(error))


@places
def test_a_rule_after_each_step_holds_for_whole_tensors(alone, together, world, case):
    for shown in together[world]:
        assert shown[case].told == alone[case].told and bool(shown[case].told) == case.startswith("max norm")
        assert all(torch.equal(shown[case].ruled[key], t) for key, t in alone[case].ruled.items())
