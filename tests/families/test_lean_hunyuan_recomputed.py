"""Lean HunyuanVideo blocks that run again in the backward pass: some tokens and heads at a time, exact, in less."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.families.networks import hunyuan
from tests.families.test_lean_hunyuan import (
    FP32,
    HEADS,
    LENGTHS,
    RANK,
    TEXT,
    WIDTH,
    OneBlock,
    paths_of,
    question,
    trimmed,
)
from tests.families.test_lean_wan import adapted, errors, learned
from tests.families.test_lean_wan_recomputed import Ending
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.engines.recompute import recompute
from weft.families.lean_hunyuan import make_lean
from weft.math import by_tokens, normed_attention
from weft.run.rehearsal import LiveBytes, default_dtype

HALF = torch.bfloat16


@pytest.mark.parametrize("lengths", LENGTHS)
def test_heads_that_attend_one_by_one_learn_the_same(lengths: str, monkeypatch: pytest.MonkeyPatch):
    """Each head has norms of its own, so that only the order of nothing changes: under masks too."""
    monkeypatch.setattr(by_tokens, "AT_ONCE", 8)
    monkeypatch.setattr(by_tokens, "ALIGNED", 2)
    monkeypatch.setattr(normed_attention, "AT_ONCE", 1)
    found: list[list[Tensor]] = []
    for recomputed in (False, True):
        network: Any = hunyuan()
        make_lean(network)
        adapters = adapted(network, paths_of(network))
        for block in (*network.transformer_blocks, *network.single_transformer_blocks) if recomputed else ():
            recompute(block, None, None)
        found.append(learned(network, adapters, trimmed(question(network, LENGTHS[lengths]))))
    assert max(errors(found[1], found[0])) < FP32


def peak_of(kind: str, tokens: int) -> float:
    """Tensors (N, d) that are there at most in a recomputed block's forward and backward pass, beside its input."""
    with FakeTensorMode():
        with default_dtype(HALF):
            network = OneBlock(kind).requires_grad_(False)
        paths = [path for path in layers_of(network) if "norm" not in path]
        adapters = Lora(rank=RANK, backend="native").attach(network, paths, ["default"], 0)
        (block,) = network.transformer_blocks
        recompute(block, None, None)
        own = tokens + TEXT if kind == "single" else tokens
        x = torch.empty(1, own, WIDTH, dtype=HALF, requires_grad=True)
        text = torch.empty(1, TEXT, WIDTH, dtype=HALF, requires_grad=True)
        temb, turn = torch.empty(1, WIDTH), torch.empty(2, tokens + TEXT, 1, WIDTH // HEADS)
        args = (x, temb, None, turn) if kind == "single" else (x, text, temb, None, turn)
        for parameter in adapters.parameters("default").values():
            parameter.grad = torch.zeros_like(parameter)
        with adapters.use("default"), LiveBytes() as live:
            with torch.autocast("cpu", HALF):
                answer = block(*args)
                answers = [answer] if isinstance(answer, Tensor) else list(answer)
                del answer
            losses = [Ending.apply(answers.pop()) for _ in range(len(answers))]  # autograd alone holds the answers
            torch.autograd.backward(losses)
        return live.peak / (tokens * WIDTH * HALF.itemsize)


@pytest.mark.parametrize(("kind", "most"), [("double", 12.0), ("single", 11.0)])
def test_a_block_at_32760_tokens_holds_little_beside_what_it_keeps(kind: str, most: float):
    """q, k, v, the answer, its gradient, theirs, and that of the residual are 9 Nd; the rest are some heads."""
    assert peak_of(kind, 32_760) < most
