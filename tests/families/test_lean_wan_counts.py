"""What a lean Wan block keeps, starts and moves, counted: the bars of a step near the limit."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.families.lean import TEXT_TO_VIDEO, adapted, prepared, question
from tests.families.networks import wan
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.families.lean_wan import lean_blocks, make_lean
from weft.families.precision import widen
from weft.families.wan_network import keeps_fp32
from weft.run.counting import Pass, counted_pass
from weft.run.rehearsal import default_dtype

WIDTH, RANK = 1536, 32
TOKENS = (1560, 32_760)  # an image and 81 frames at 480 x 832, on fake tensors: real shapes, real autograd, no memory


class OneBlock(nn.Module):
    """A block of Wan 2.1 1.3B."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([WanTransformerBlock(WIDTH, 8960, 12, cross_attn_norm=True)])
        lean_blocks(self.blocks)

    def forward(self, *args: Tensor) -> Tensor:
        return self.blocks[0](*args)


@cache
def passes(dtype: torch.dtype) -> tuple[Pass, Pass, int]:
    """Of so many tokens, with adapters on all linear layers, and the bytes by which one Nd differs between them."""
    few, many = (pass_of(tokens, dtype) for tokens in TOKENS)
    return few, many, (TOKENS[1] - TOKENS[0]) * WIDTH * dtype.itemsize


def pass_of(tokens: int, dtype: torch.dtype) -> Pass:
    half = dtype != torch.float32
    with FakeTensorMode():
        with default_dtype(dtype):
            network = OneBlock().requires_grad_(False)
        widen(network, keeps_fp32)
        adapters = Lora(rank=RANK, backend="native").attach(network, list(layers_of(network)), ["default"], 0)
        x = torch.empty(1, tokens, WIDTH, dtype=dtype, requires_grad=True)
        given = torch.empty(1, 512, WIDTH, dtype=dtype), torch.empty(1, 1, 6, WIDTH), torch.empty(2, tokens, 1, 128)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=half):
                return network(x, *given)

        with adapters.use("default"):
            return counted_pass(forward, [*given, *network.parameters()])


@cache
def kernels_of(tokens: int, dtype: torch.dtype) -> Pass:
    """Of the one block of a small network, on real numbers: kernels do not depend on widths."""
    network: Any = prepared(dtype, lean=True) if dtype != torch.float32 else wan(**TEXT_TO_VIDEO)
    make_lean(network)
    adapters = adapted(network, [path for path in layers_of(network) if path.startswith("blocks.")])
    seen: list[tuple[Tensor, ...]] = []
    network.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    inputs = {**question(network, 1), "hidden_states": torch.randn(1, 16, 1, 4, tokens)}
    with adapters.use("default"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        network(**inputs)
        x, *rest = (each.detach() for each in seen[0])
        return counted_pass(lambda: network.blocks[1].forward(x.requires_grad_(), *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_keeps_at_most_15_tensors_of_its_tokens_width(dtype: torch.dtype):
    """9 of width d, one of 8960 / 1536 d, rank activations of five layers, and some numbers a token: exact."""
    few, many, unit = passes(dtype)
    assert (many.saved - few.saved) / unit <= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_starts_at_most_70_kernels_forward_and_110_backward(dtype: torch.dtype):
    few, many = kernels_of(16, dtype), kernels_of(32, dtype)
    assert few.forward.operations == many.forward.operations <= 70, few.forward.names
    assert few.backward.operations == many.backward.operations <= 110, few.backward.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointwise_mathematics_moves_at_most_100_tensors_forward_and_170_backward(dtype: torch.dtype):
    few, many, unit = passes(dtype)
    assert (many.forward.pointwise - few.forward.pointwise) / unit <= 100
    assert (many.backward.pointwise - few.backward.pointwise) / unit <= 170


def test_a_pass_makes_no_host_wait_and_runs_no_wide_product_and_no_attention_twice():
    few = kernels_of(16, torch.float32)
    assert few.forward.syncs == few.backward.syncs == 0
    attention = [sum(n for name, n in t.names.items() if "attention" in name) for t in (few.forward, few.backward)]
    assert attention == [2, 2]
    # Frozen weights: 10 forward, 8 backward, for the text wants no gradient. Beside these products of ranks alone: u of
    # seven groups of layers forward and what it adds to 10 answers; back v and dB of 10 layers, dA and dx of seven
    # groups, and u once more for q, k, v and for the text's k, v: but six dx, for the text wants none.
    products = [sum(t.names[name] for name in ("mm", "addmm", "addmm_")) for t in (few.forward, few.backward)]
    assert products == [10 + 7 + 10, 8 + 10 + 10 + 7 + 6 + 2]
