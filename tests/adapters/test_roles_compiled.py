"""Student and critic on one base whose blocks are compiled: each role has its own graphs, and nothing is made anew."""

from collections.abc import Iterator
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from tests.adapters.conftest import answer, new_wan
from tests.adapters.test_roles import NAMES, carried, gradients
from weft.adapters.full import FullChange
from weft.adapters.loha import LoHa
from weft.adapters.lora import Lora
from weft.adapters.named import NamedAdapters
from weft.adapters.recipe import Recipe
from weft.engines.recompute import recompute

ORDER = ("student", "critic", None, "student", None, "critic", None)
Mix = tuple[Recipe, Recipe]
# Carriers as in MIXES, on one layer of each shape: a compiler reads every adapted layer anew.
TWO = ("attn1.to_q", "ffn.net.2")
STUDENT, NATIVE = (Lora(rank=4, targets=TWO, fused=False, backend=backend) for backend in ("peft", "native"))
CONVOLVED = Lora(rank=3, alpha=2, conv_rank=2, targets=("attn1.to_q", "patch_embedding"), backend="native", fused=False)
CARRIERS: dict[str, Mix] = {
    "alike": (STUDENT, STUDENT),
    "native": (CONVOLVED, NATIVE),
    "peft, full": (STUDENT, FullChange(targets=(*TWO, "patch_embedding"))),
    "two kinds of peft": (STUDENT, LoHa(rank=2, targets=TWO)),
}


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# ---- A network with Wan's layers, and half of its operators ---------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BND: Tensor, y_BMD: Tensor) -> Tensor:
        q, k, v = (
            layer(z).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer, z in ((self.to_q, x_BND), (self.to_k, y_BMD), (self.to_v, y_BMD))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Up(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x_BND: Tensor) -> Tensor:
        return F.gelu(self.proj(x_BND), approximate="tanh")


class Block(nn.Module):
    """Layers under the names of Wan's, with its attention to the text alone: half of what a compiler has to read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn1 = Attention(width)
        self.ffn = nn.ModuleDict({"net": nn.ModuleList([Up(width, 64), nn.Identity(), nn.Linear(64, width)])})

    def forward(self, x_BND: Tensor, text_BMD: Tensor) -> Tensor:
        x_BND = x_BND + self.attn1(self.norm(x_BND), text_BMD)
        up, _, down = self.ffn["net"]
        return x_BND + down(up(self.norm(x_BND)))


class Attending(nn.Module):
    """A block of attention alone, of which inductor makes the fewest kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn1 = Attention(width)

    def forward(self, x_BND: Tensor, text_BMD: Tensor) -> Tensor:
        return x_BND + self.attn1(self.norm(x_BND), text_BMD)


class Network(nn.Module):
    """Asked as Wan is. A compiler reads one of its blocks in a third of the time."""

    def __init__(self, layers: int, block: type[nn.Module], width: int = 48) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(16, width, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(32, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        x_BND = self.patch_embedding(x).flatten(2).transpose(1, 2) + timestep[:, None, None] / 1000
        text_BMD = self.text(text)
        for block in self.blocks:
            x_BND = block(x_BND, text_BMD)
        return (x_BND,)


def small(layers: int, block: type[nn.Module] = Block) -> Network:
    torch.manual_seed(0)
    return Network(layers, block)


# ---- Graphs ---------------------------------------------------------------------------------------------------------


def asked_in_turn(network: nn.Module, adapters: NamedAdapters) -> list[Tensor]:
    """Answers and gradients of all roles, with the base asked while a graph waits."""
    found: list[Tensor] = []
    for role in ORDER:
        network.zero_grad()
        with adapters.use(role):
            with torch.no_grad():
                found.append(answer(network))
            if role is None:
                continue
            loss = answer(network).square().mean()
            with adapters.use(None), torch.no_grad():
                found.append(answer(network))
            loss.backward()
        found += [loss.detach(), *gradients(adapters, role).values()]
    return found


def graphs_of(adapters: NamedAdapters, blocks: int) -> int:
    """How many graphs all blocks share: without gradients one for each role and for the base; with gradients one for
    each role, and another where the first block is given what needs none, while later ones are."""
    apart = [blocks > 1 and "patch_embedding" not in adapters.paths_of(name) for name in NAMES]
    return 1 + 2 * len(NAMES) + sum(apart)


def check_compiled(
    mix: Mix, backend: str, networks: tuple[Any, Any], *, again: bool = False, exact: bool = True
) -> None:
    """networks: two of the same weights."""
    recipes = dict(zip(NAMES, mix, strict=True))
    (plain, one), (network, adapters) = (carried(each, recipes) for each in networks)
    expected = asked_in_turn(plain, one)
    for block in network.blocks:
        if again:
            recompute(block, None, None)
        block.compile(backend=backend, fullgraph=True)
    for seen in (False, True, True):
        with torch._dynamo.config.patch(error_on_recompile=seen):  # pyright: ignore[reportAttributeAccessIssue]
            found = asked_in_turn(network, adapters)
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine, other) if exact else torch.allclose(mine, other, rtol=1e-4, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == graphs_of(adapters, len(network.blocks))


def test_blocks_of_wan_follow_the_role_with_one_graph_for_each():
    # What the compiler reads, without what it would make of it, which takes longer; a carrier of each sort.
    mix = Lora(rank=4, targets="attn1.to_q"), FullChange(targets=("attn1.to_q", "attn2.to_v"))
    check_compiled(mix, "eager", (new_wan(2), new_wan(2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mix", "again", "layers"),
    [("alike", False, 2), ("native", True, 1), ("peft, full", True, 1), ("two kinds of peft", False, 1)],
)
def test_compiled_blocks_are_exact_with_every_carrier_and_when_they_run_again(mix, again, layers):
    # Each carrier, each sort of them run again, and one block or several; all with all would take minutes.
    check_compiled(CARRIERS[mix], "aot_eager", (small(layers), small(layers)), again=again)


@pytest.mark.slow
def test_compiled_blocks_with_fused_adapters_are_exact_to_rounding():
    # What is fused sums in another order than the plain operators that a compiler is shown.
    fused = tuple(recipe.model_copy(update={"fused": True}) for recipe in CARRIERS["native"])
    check_compiled(fused, "aot_eager", (small(1), small(1)), again=True, exact=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
def test_inductor_follows_the_role():
    # It reorders sums, so fp32 rounding is allowed.
    mix = Lora(rank=4, targets="attn1.to_q"), FullChange(targets="attn1.to_q")
    check_compiled(mix, "inductor", (small(1, Attending), small(1, Attending)), exact=False)
