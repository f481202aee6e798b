"""A real, small Wan transformer with random weights, and one question to it."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from weft.adapters.named import NamedAdapters
from weft.adapters.recipe import Recipe

ATTENTION = r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)"
BOTH = r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
PRESETS = {"attention": ATTENTION, "attention+ffn": BOTH}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and far slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_wan(layers: int = 2) -> WanTransformer3DModel:
    """A network of blocks of width 48, the same one whenever it is made."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers,
    )  # fmt: skip


@pytest.fixture(scope="session")
def one_wan() -> WanTransformer3DModel:
    return new_wan()


@pytest.fixture
def tiny_wan(one_wan: WanTransformer3DModel) -> Callable[[], WanTransformer3DModel]:
    """Fresh copies of one network: 2 blocks of width 48."""
    return lambda: deepcopy(one_wan)


def answer(network: nn.Module) -> Tensor:
    """The network's answer (2, 16, 2, 4, 4) to a fixed question."""
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 2, 4, 4, generator=chance)
    text = torch.randn(2, 5, 32, generator=chance)
    dtype = next(network.parameters()).dtype
    return network(x.to(dtype), torch.tensor([100.0, 500.0]), text.to(dtype), return_dict=False)[0]


@pytest.fixture
def ask() -> Callable[[nn.Module], Tensor]:
    return answer


@pytest.fixture
def attach() -> Callable[..., NamedAdapters]:
    """Put adapters with first values on the attention of a network (or on what the recipe names)."""

    def put(recipe: Recipe, network: nn.Module, names: tuple[str, ...] = ("student",), seed: int = 7) -> NamedAdapters:
        adapters = recipe.attach(network, recipe.match(recipe.layers(network), PRESETS, {}).paths, names, seed)
        adapters.initialize()
        return adapters

    return put


@pytest.fixture
def shaken() -> Callable[..., None]:
    """Give an adapter weights other than its first ones, B included, so that it changes the network."""

    def shake(adapters: NamedAdapters, name: str = "student", seed: int = 3) -> None:
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapters.parameters(name).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))

    return shake
