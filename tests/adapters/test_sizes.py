"""How large a change is, against the change written out: what a layer answers to unit vectors, with it and without."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.adapters.conftest import new_wan
from tests.adapters.test_packed_base import pack
from tests.adapters.test_shards import RECIPES, change, placed
from tests.multi import spawn
from weft.adapters import sizes as module
from weft.adapters.lora import Lora
from weft.adapters.modules import dense_weight
from weft.adapters.named import NamedAdapters, by_path
from weft.adapters.recipe import Recipe
from weft.adapters.sizes import Adapted, Size, sizes, weight_norm
from weft.engines.parallel import Parallel
from weft.engines.torch_engine import Torch
from weft.math.spectrum import effective_rank

ALL = {**RECIPES, "lora native": Lora(rank=3, alpha=12, rslora=True, targets="attention+ffn", backend="native")}
# ||dW|| of a change that is a difference of large numbers is known to fp32's rounding of the large ones.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def measured(recipe: Recipe, adapters: NamedAdapters, role: str = "student") -> dict[str, Size]:
    paths = adapters.paths_of(role)
    tensors = by_path({**adapters.parameters(role), **adapters.fixed(role)}, paths)
    return sizes(recipe, {path: Adapted(adapters.base_layer(role, path), tensors[path]) for path in paths})


@torch.no_grad()
def written_out(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """What a layer, wrapped or hooked, multiplies with: its answers to unit vectors, or to unit kernels."""
    width = torch.Size(shape[1:]).numel()
    unit, nothing = torch.eye(width).view(width, *shape[1:]), torch.zeros(1, *shape[1:])
    return (layer(unit) - layer(nothing)).flatten(1).mT.double()


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]


def expected(network: nn.Module, adapters: NamedAdapters, role: str = "student") -> dict[str, Tensor]:
    """The change of each layer, written out."""
    found = {}
    for path in adapters.paths_of(role):
        shape, layer = shape_of(adapters.base_layer(role, path)), network.get_submodule(path)
        answers = []
        for name in (role, None):
            with adapters.use(name):
                adapters.carried_by[role].answer(name)
                answers.append(written_out(layer, shape))
        found[path] = answers[0] - answers[1]
    return found


@pytest.fixture
def trained(attach, shaken, tiny_wan) -> Any:
    """A network with changed adapters of a recipe."""

    def make(recipe: Recipe, packed: bool = False) -> tuple[nn.Module, NamedAdapters]:
        network = tiny_wan().eval()
        adapters = attach(recipe, pack(network) if packed else network)
        shaken(adapters)
        return network, adapters

    return make


@pytest.mark.parametrize("name", ALL)
def test_norms_are_those_of_the_change_that_the_network_makes(name, trained):
    network, adapters = trained(ALL[name])
    found, dense = measured(ALL[name], adapters), expected(network, adapters)
    assert list(found) == list(dense)
    for path, delta in dense.items():
        assert found[path].norm > 0.01
        assert_close(torch.tensor(found[path].norm, dtype=torch.float64), delta.norm(), **NEAR)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(("oft", "dora"))])
def test_effective_ranks_are_those_of_the_change_that_the_network_makes(name, trained):
    network, adapters = trained(ALL[name])
    dense = expected(network, adapters)
    for path, size in measured(ALL[name], adapters).items():
        values = torch.linalg.svdvals(dense[path])
        values[values < 1e-5 * values[0]] = 0  # what fp32 leaves where there is nothing
        assert size.effective_rank == pytest.approx(float(effective_rank(values)), rel=1e-3), path


@pytest.mark.parametrize("name", ["oft", "dora", "dora native", "oft exact, shared"])
def test_kinds_whose_change_has_every_direction_tell_no_effective_rank(name, trained):
    _, adapters = trained(ALL[name])
    assert {size.effective_rank for size in measured(ALL[name], adapters).values()} == {None}


@pytest.mark.parametrize("name", ["dora", "dora native", "oft"])
def test_on_a_packed_base_the_change_is_of_its_decoded_weights(name, trained):
    network, adapters = trained(ALL[name], packed=True)
    for path, delta in expected(network, adapters).items():
        assert measured(ALL[name], adapters)[path].norm == pytest.approx(float(delta.norm()), rel=1e-4), path


def test_a_lora_is_what_peft_would_merge(trained):
    network, adapters = trained(ALL["lora"])
    for path, size in measured(ALL["lora"], adapters).items():
        delta = network.get_submodule(path).get_delta_weight("student").detach().double()
        assert size.norm == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-5)
        assert size.effective_rank == pytest.approx(float(effective_rank(torch.linalg.svdvals(delta))), rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_change_of_so_many_equal_directions_has_that_effective_rank(rank, attach):
    recipe, network = Lora(rank=4, alpha=8, targets=("0",)), nn.Sequential(nn.Linear(9, 7))
    adapters = attach(recipe, network)
    a, b = torch.eye(9)[:4], torch.eye(7)[:, :4].clone()
    b[:, rank:] = 0
    adapters.load_state_dict("student", {"0.lora_A.weight": a, "0.lora_B.weight": b})
    size = measured(recipe, adapters)["0"]
    assert size.effective_rank == pytest.approx(rank, rel=1e-6) and size.norm == pytest.approx(2 * rank**0.5)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "full"])
def test_too_wide_a_change_has_a_norm_and_no_effective_rank(name, trained, monkeypatch):
    _, adapters = trained(ALL[name])
    before = measured(ALL[name], adapters)
    monkeypatch.setattr(module, "WIDEST", 1)
    for path, size in measured(ALL[name], adapters).items():
        assert size.norm == pytest.approx(before[path].norm, rel=1e-5) and size.effective_rank is None


@pytest.mark.parametrize("name", ["lora", "dora", "oft"])
def test_looking_at_some_rows_at_a_time_is_looking_at_all(name, trained, monkeypatch):
    _, adapters = trained(ALL[name])
    before = {path: (size.norm, weight_norm(adapters.base_layer("student", path)))
              for path, size in measured(ALL[name], adapters).items()}  # fmt: skip
    monkeypatch.setattr(module, "NUMBERS", 100)
    for path, size in measured(ALL[name], adapters).items():
        again = size.norm, weight_norm(adapters.base_layer("student", path))
        assert again == pytest.approx(before[path], rel=1e-6)


def test_a_change_that_is_no_number_has_no_effective_rank_and_stops_nothing(trained):
    _, adapters = trained(ALL["lora"])
    path = adapters.paths[0]
    with torch.no_grad():
        adapters.parameters("student")[f"{path}.lora_B.weight"].fill_(float("nan"))
    found = measured(ALL["lora"], adapters)
    assert found[path].norm != found[path].norm and found[path].effective_rank is None
    assert all(size.effective_rank is not None for other, size in found.items() if other != path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_frozen_weight_is_that_of_its_numbers(dtype, tiny_wan):
    network = tiny_wan().to(dtype)
    for layer in (network.patch_embedding, network.blocks[0].ffn.net[2], pack(network).blocks[0].attn1.to_q):
        assert weight_norm(layer) == pytest.approx(float(dense_weight(layer).double().norm()), rel=1e-6)


def test_of_a_kind_that_is_not_known_nothing_is_said():
    assert sizes.dispatch(Recipe)(ALL["lora"], {}) == {} and sizes.dispatch(Recipe) is not sizes.dispatch(Lora)


SHARDED = ["conv native", "pissa", "dora", "loha", "lokr", "oft on fp8", "full"]


def all_sizes(cases: list[str], parallel: Parallel) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Case -> path -> norm and effective rank of the change, and norm of the weight, on a mesh."""
    engine = Torch(device="cpu", precision="fp32").open(parallel)
    found: dict[str, dict[str, tuple[Any, ...]]] = {}
    for case in cases:
        name, _, packed = case.partition(" on ")
        network = new_wan(layers=1)
        adapters = placed(RECIPES[name], (pack(network) if packed else network).requires_grad_(False), engine)
        change(adapters, "student", 3)
        own: Mapping[str, Size] = measured(RECIPES[name], adapters)
        found[case] = {path: (size.norm, size.effective_rank, weight_norm(adapters.base_layer("student", path)))
                       for path, size in own.items()}  # fmt: skip
    return found


def test_on_a_base_in_shards_every_process_measures_what_one_does():
    alone = all_sizes(SHARDED, Parallel())
    for rank in spawn(2, all_sizes, SHARDED, Parallel(shard="auto")):
        for case, layers in alone.items():
            for path, expected in layers.items():
                for number, other in zip(rank[case][path], expected, strict=True):
                    assert number == (other and pytest.approx(other, rel=1e-6)), (case, path)
