"""Lean Wan blocks that run again in the backward pass: some tokens and heads at a time, exact, in half the memory."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.families.lean import adapted, prepared, question
from tests.families.networks import wan
from tests.families.test_lean_wan import FP32, KINDS, errors, learned
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.engines.recompute import recompute
from weft.families.lean_wan import lean_blocks, make_lean
from weft.families.precision import widen
from weft.families.wan_network import keeps_fp32
from weft.math import by_tokens, normed_attention
from weft.run.rehearsal import LiveBytes, default_dtype

HALF = torch.bfloat16


@pytest.fixture
def in_crumbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of some tokens, and single heads, of networks so small."""
    monkeypatch.setattr(by_tokens, "AT_ONCE", 8)
    monkeypatch.setattr(by_tokens, "ALIGNED", 2)
    monkeypatch.setattr(normed_attention, "AT_ONCE", 1)
    monkeypatch.setattr(normed_attention, "PIECE", 5)


def again(network: Any) -> Any:
    for block in network.blocks:
        recompute(block, None, None)
    return network


def found(network: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    paths = [path for path in layers_of(network) if path.startswith(("blocks.", "condition_embedder"))]
    return learned(network, adapted(network, paths), inputs, dtype)


@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_velocities_and_gradients_are_diffusers_own_in_fp32(kind: str, items: int, in_crumbs: None):
    """With adapters on the embedder of times too: gradients of modulation are sums over pieces."""
    networks = [wan(**KINDS[kind]) for _ in range(2)]
    make_lean(networks[1])
    truth, own = (found(each, question(each, items)) for each in (networks[0], again(networks[1])))
    assert max(errors(own, truth)) < FP32


def test_in_pieces_frames_may_have_times_of_their_own(in_crumbs: None):
    networks = [wan(**KINDS["text to video"]) for _ in range(2)]
    for network in networks:
        make_lean(network)
    known = torch.tensor([[True, False, False], [True, False, True]])
    truth, own = (found(each, {**question(each), "given": known}) for each in (networks[0], again(networks[1])))
    assert max(errors(own, truth)) < FP32


def test_in_pieces_half_precision_is_no_further_from_fp32(in_crumbs: None):
    exact = prepared(HALF, lean=True).float()
    inputs = question(exact)
    truth = found(exact, inputs)
    whole = errors(found(prepared(HALF, lean=True), inputs, HALF), truth)
    own = errors(found(again(prepared(HALF, lean=True)), inputs, HALF), truth)
    assert all(mine < 1.1 * theirs for mine, theirs in zip(own, whole, strict=True)), (own, whole)


class OneBlock(nn.Module):
    """A block of Wan 14B."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([WanTransformerBlock(5120, 13_824, 40, cross_attn_norm=True)])
        lean_blocks(self.blocks)


def peak_of(tokens: int) -> float:
    """Tensors (N, d) that are there at most in a recomputed block's forward and backward pass, beside its input."""
    with FakeTensorMode():
        with default_dtype(HALF):
            network = OneBlock().requires_grad_(False)
        widen(network, keeps_fp32)
        adapters = Lora(rank=32, backend="native").attach(network, list(layers_of(network)), ["default"], 0)
        again(network)
        x = torch.empty(1, tokens, 5120, dtype=HALF, requires_grad=True)
        given = torch.empty(1, 512, 5120, dtype=HALF), torch.empty(1, 1, 6, 5120), torch.empty(2, tokens, 1, 128)
        parameters = adapters.parameters("default").values()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with adapters.use("default"), LiveBytes() as live:
            with torch.autocast("cpu", HALF):
                answers = [network.blocks[0](x, *given)]
            Ending.apply(answers.pop()).backward()  # nobody but autograd holds the answer
        return live.peak / (tokens * 5120 * HALF.itemsize)


class Ending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x.shape, x.dtype
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


def test_a_block_of_14b_at_32760_tokens_holds_at_most_11_tensors_of_its_width():
    """q, k, v, the answer, its gradient, theirs, and that of the residual are 9 Nd; the rest are some heads. At once
    they would be 22."""
    assert peak_of(32_760) < 11
