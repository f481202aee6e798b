"""Student and critic on one base are what separate copies are: whoever carries them, recomputed, compiled, sharded."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from tests.adapters.conftest import PRESETS, answer, new_wan
from tests.adapters.test_shards import whole
from tests.multi import spawn
from weft.adapters.attach import attach
from weft.adapters.full import FullChange
from weft.adapters.loha import LoHa
from weft.adapters.lora import Lora
from weft.adapters.named import NamedAdapters
from weft.adapters.recipe import Recipe, Standing
from weft.contracts import Engine
from weft.engines.parallel import Parallel
from weft.engines.recompute import recompute
from weft.engines.torch_engine import Torch

STUDENT = Lora(rank=4, targets="attention+ffn")
NATIVE = STUDENT.model_copy(update={"backend": "native"})
DROPPING = Lora(rank=3, input_dropout=0.3, rank_dropout=0.4)
CONVOLVED = Lora(rank=3, alpha=2, conv_rank=2, targets=("attention", "patch_embedding"), backend="native")
MIXES: dict[str, tuple[Recipe, Recipe]] = {
    "alike": (STUDENT, STUDENT),
    "alike native": (NATIVE, NATIVE),
    "peft": (STUDENT, Lora(rank=2, alpha=6, targets="attn1.to_q")),
    "native": (CONVOLVED, Lora(rank=2, alpha=6, targets=("attention", "ffn.net.2"), backend="native")),
    "peft, native": (STUDENT, Lora(rank=2, alpha=6, backend="native")),
    "peft, full": (STUDENT, FullChange(targets=("attention+ffn", "patch_embedding"))),
    "native, full": (CONVOLVED, FullChange(targets="attn1.to_q")),
    "dropouts": (DROPPING, DROPPING.model_copy(update={"backend": "native", "rank": 2})),
    "two kinds of peft": (STUDENT, LoHa(rank=2, targets=("attn1.to_q", "ffn.net.2"))),
    "two kinds of peft, turned": (LoHa(rank=2), Lora(rank=3, dora=True, targets="attention+ffn")),
}
NAMES: tuple[str, ...] = ("student", "critic")
every_mix = pytest.mark.parametrize("mix", MIXES)
Ask = Callable[[str | None, float], Tensor]  # (role, what its input is shifted by) -> its answer
Using = Callable[[str | None], AbstractContextManager[None]]


def standings(network: nn.Module, recipes: Mapping[str, Recipe]) -> dict[str, Standing]:
    return {name: Standing(r, r.match(r.layers(network), PRESETS, {}).paths) for name, r in recipes.items()}


def shake(adapters: NamedAdapters) -> None:
    """Weights with which each adapter changes the network, the same ones wherever the adapter stands."""
    for name in adapters.names:
        chance = torch.Generator().manual_seed(NAMES.index(name))
        state, trained = adapters.state_dict(name), adapters.parameters(name)
        noise = {key: 0.1 * torch.randn(t.shape, generator=chance) for key, t in state.items()}
        adapters.load_state_dict(name, {key: t + noise[key] if key in trained else t for key, t in state.items()})


def with_adapters(recipes: Mapping[str, Recipe], layers: int = 2) -> tuple[Any, NamedAdapters]:
    return carried(new_wan(layers), recipes)


def carried(network: nn.Module, recipes: Mapping[str, Recipe]) -> tuple[Any, NamedAdapters]:
    """A network with an adapter of each recipe, under its role's name."""
    network.train()
    adapters = attach(network, standings(network, recipes), seed=7)
    adapters.initialize()
    shake(adapters)
    return network, adapters


def dmd_step(ask: Ask, using: Using, backward: Callable[[Tensor], None]) -> list[Tensor]:
    """The order of questions in distribution matching: the student's way to a later step, a step with a graph, what
    critic and teacher say of it while that graph waits, its backward pass; then the critic's own turn."""
    with torch.no_grad():
        start = ask("student", 0.0)
    with using("student"):
        sample = ask("student", 0.1)
        with torch.no_grad():
            fake, real = ask("critic", 0.2), ask(None, 0.2)
            ask("student", 0.3)
            real = real + 0.5 * (real - ask(None, 0.4))
        backward((sample * (fake - real)).mean() + (sample * start).mean())
    with torch.no_grad():
        sample = ask("student", 0.5)
    with using("critic"):
        loss = (ask("critic", 0.6) - sample).square().mean()
        with torch.no_grad():
            ask("student", 0.7)
        backward(loss)
    return [start, fake, real, sample, loss.detach()]


def shifted(network: nn.Module, shift: float) -> Tensor:
    with torch.random.fork_rng():  # each question draws its own chance, in any order of them
        torch.manual_seed(int(100 * shift))
        return answer(network) * (1 + shift)


def shared_step(network: nn.Module, adapters: NamedAdapters) -> list[Tensor]:
    def ask(role: str | None, shift: float) -> Tensor:
        with adapters.use(role):
            return shifted(network, shift)

    return dmd_step(ask, adapters.use, lambda loss: loss.backward())


def gradients(adapters: NamedAdapters, name: str) -> dict[str, Tensor]:
    found = {key: p.grad for key, p in adapters.parameters(name).items()}
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    return {key: whole(gradient) for key, gradient in found.items()}


def of_copies(recipes: Mapping[str, Recipe]) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    """The same step on three networks, each with the adapter of its role alone."""
    own = {name: with_adapters({name: recipe}) for name, recipe in recipes.items()}
    teacher = new_wan().train().requires_grad_(False)

    def ask(role: str | None, shift: float) -> Tensor:
        if role is None:
            return shifted(teacher, shift)
        with own[role][1].use(role):
            return shifted(own[role][0], shift)

    def using(role: str | None) -> AbstractContextManager[None]:
        return own[role][1].use(role) if role else nullcontext()

    told = dmd_step(ask, using, lambda loss: loss.backward())
    return told, {name: gradients(adapters, name) for name, (_, adapters) in own.items()}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@every_mix
def test_one_base_learns_what_three_copies_learn_bit_by_bit(mix, again):
    recipes = dict(zip(NAMES, MIXES[mix], strict=True))
    network, adapters = with_adapters(recipes)
    for block in network.blocks if again else ():
        recompute(block, None, None)
    told, expected = of_copies(recipes)
    for found, other in zip(shared_step(network, adapters), told, strict=True):
        assert torch.equal(found, other)
    for name in NAMES:
        found = gradients(adapters, name)
        assert list(found) == list(expected[name])
        assert all(torch.equal(found[key], gradient) for key, gradient in expected[name].items())


@every_mix
def test_roles_have_layers_of_their_own_and_the_base_is_bare_and_frozen_under_none(mix, ask):
    recipes = dict(zip(NAMES, MIXES[mix], strict=True))
    network, adapters = with_adapters(recipes)
    expected = standings(new_wan(), recipes)
    assert {name: adapters.paths_of(name) for name in NAMES} == {n: tuple(s.paths) for n, s in expected.items()}
    assert adapters.names == NAMES and adapters.paths == adapters.paths_of("student")
    trained = {id(p) for name in NAMES for p in adapters.parameters(name).values()}
    for name in (None, "student", "critic", None):
        with adapters.use(name):
            ask(network)
            assert {id(p) for p in network.parameters() if p.requires_grad} == trained
    network.eval()
    assert torch.equal(ask(network), ask(new_wan().eval()))


@pytest.mark.parametrize("mix", ["native", "peft, full", "two kinds of peft"])
def test_first_values_and_saved_ones_are_those_of_a_role_alone(mix):
    recipes = dict(zip(NAMES, MIXES[mix], strict=True))
    network = new_wan()
    together = attach(network, standings(network, recipes), seed=7)
    together.initialize()
    for name, recipe in recipes.items():
        lone = attach(network := new_wan(), standings(network, {name: recipe}), seed=7)
        lone.initialize()
        state = together.state_dict(name)
        assert list(state) == list(lone.state_dict(name))
        assert all(torch.equal(state[key], tensor) for key, tensor in lone.state_dict(name).items())


@pytest.mark.parametrize("mix", ["alike", "alike native"])
def test_a_backward_in_another_role_would_be_wrong_without_an_error_where_blocks_run_again(mix):
    found = []
    for role in ("student", "critic"):
        network, adapters = with_adapters(dict(zip(NAMES, MIXES[mix], strict=True)))
        for block in network.blocks:
            recompute(block, None, None)
        with adapters.use("student"):
            loss = answer(network).square().mean()
        with adapters.use(role):
            loss.backward()
        found.append(gradients(adapters, "student") | {"loss": loss.detach()})
    assert torch.equal(found[0]["loss"], found[1]["loss"])
    assert not all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


@pytest.mark.parametrize("mix", ["peft, full", "native, full"])
def test_a_backward_in_a_role_of_another_recipe_is_noticed_where_blocks_run_again(mix):
    network, adapters = with_adapters(dict(zip(NAMES, MIXES[mix], strict=True)))
    for block in network.blocks:
        recompute(block, None, None)
    with adapters.use("student"):
        loss = answer(network).square().mean()
    with adapters.use("critic"), pytest.raises(CheckpointError):
        loss.backward()


# ---- In shards ----

SHARDED = ("native", "peft, full")


def all_steps(parallel: Parallel) -> dict[str, tuple[list[Tensor], dict[str, dict[str, Tensor]]]]:
    engine = Torch(device="cpu", precision="fp32", recompute=True).open(parallel)
    return {mix: one_step(mix, engine) for mix in SHARDED}


def one_step(mix: str, engine: Engine) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    network = new_wan().requires_grad_(False)
    adapters = attach(network, standings(network, dict(zip(NAMES, MIXES[mix], strict=True))), seed=7)
    engine.place(network, list(network.blocks)).train()
    adapters.initialize()
    shake(adapters)

    def ask(role: str | None, shift: float) -> Tensor:
        with adapters.use(role):
            return answer(network) * (1 + shift)

    # Every process asks the same, so its share of the gradient is that of one over their number.
    told = dmd_step(ask, adapters.use, lambda loss: engine.backward(loss / engine.data_world, last=True))
    return [t.clone() for t in told], {name: gradients(adapters, name) for name in NAMES}


@pytest.fixture(scope="module")
def sharded() -> list[Any]:
    return spawn(2, all_steps, Parallel(shard="auto"))


@pytest.fixture(scope="module")
def alone() -> Any:
    return all_steps(Parallel())


@pytest.mark.parametrize("mix", SHARDED)
def test_two_processes_with_shards_of_one_base_learn_what_one_does(mix, alone, sharded):
    told, expected = alone[mix]
    for rank in sharded:
        for found, other in zip(rank[mix][0], told, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)
        for name in NAMES:
            for key, gradient in expected[name].items():
                error = (rank[mix][1][name][key] - gradient).norm() / gradient.norm()
                assert error < 1e-5, (name, key, float(error))  # fp32 sums in another order
