"""What a compiled block of Wan 2.1 1.3B keeps and does twice under each memory budget, at its true widths."""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.engines.compiling import Compiler, Region
from weft.engines.recompute import attends
from weft.families.lean_wan import lean_blocks
from weft.run.blocks import BUDGETS
from weft.run.partitions import Accounts, Parted, operations_of
from weft.run.rehearsal import let_be_fake

WIDTH, FFN, HEADS, RANK = 1536, 8960, 12, 32
TOKENS, TEXT = 4096, 512  # a picture of 1024x1024
PRODUCTS = ("mm", "addmm", "bmm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def block() -> Parted:
    """Of bf16 under autocast, with fp32 adapters on all linear layers; its input wants a gradient."""
    torch._dynamo.reset()  # blocks that were compiled before, with other numbers of tokens, would make those symbols
    network, accounts = nn.Module(), Accounts()
    with ExitStack() as stack:
        network.blocks = nn.ModuleList([WanTransformerBlock(WIDTH, FFN, HEADS, cross_attn_norm=True).bfloat16()])
        lean_blocks(network.requires_grad_(False).blocks)
        adapters = Lora(rank=RANK).attach(network, list(layers_of(network)), ["default"], 0)
        stack.enter_context(adapters.use("default"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        let_be_fake(network)
        Region(Compiler(backend=accounts)).compile(network.blocks[0])
        x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16).requires_grad_()
        text = torch.randn(1, TEXT, WIDTH, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            network.blocks[0](x, text, torch.randn(1, 1, 6, WIDTH), torch.randn(2, TOKENS, 1, WIDTH // HEADS))
    (parted,) = accounts.parted
    return parted


def work_of(graph: fx.Graph) -> Counter[str | int]:
    """Products of two large matrices, and attention by its number of keys."""
    work: Counter[str | int] = Counter()
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        sizes = [size for arg in node.args if isinstance(arg, fx.Node) for size in arg.meta["val"].shape]
        if node.target._opname in PRODUCTS and min(sizes) > 3 * RANK:
            work["products"] += 1
        elif attends(node.target):
            work[node.args[1].meta["val"].shape[-2]] += 1
    return work


def twice(block: Parted, budget: float) -> Counter[str | int]:
    assert block.joint is not None
    both = sum((work_of(part.graph) for part in block.parts(budget)), Counter[str | int]())
    return both - work_of(block.joint.graph)


def nd(block: Parted, budget: float) -> float:
    return block.saved(budget) / (TOKENS * WIDTH * 2)


def test_at_a_budget_of_one_half_nothing_is_done_twice_but_attention_to_the_text(block):
    """x, q, k, v, out of each attention, the stream between, and 5.8 for the feed-forward's inner tensor."""
    assert twice(block, 0.5) == {TEXT: 1}
    assert nd(block, 0.5) < 15
    assert block.more(0.5) < 0.02
    assert not twice(block, 1.0) and block.more(1.0) == 0


def test_a_smaller_budget_never_keeps_more_so_the_largest_that_fits_is_found_by_halves(block):
    kept = [block.saved(budget) for budget in BUDGETS]
    assert kept == sorted(kept, reverse=True)


def test_attention_among_all_tokens_is_done_twice_at_a_budget_of_nothing_alone(block):
    assert twice(block, 0.1)[TOKENS] == 0 and twice(block, 0.1)["products"] >= 4
    assert twice(block, 0.0)[TOKENS] == 1
    assert nd(block, 0.1) < 6
    assert nd(block, 0.0) == pytest.approx(1, abs=0.01)


def test_operations_are_counted_as_on_paper(block):
    """Forward 2 N d (6 d + 2 f) + 4 L d d of the frozen layers, and attention 4 N (N + L) d; back again the same but
    for the text's layers, attention 10/4 of it; each LoRA three times 2 N r (in + out)."""
    frozen = 2 * TOKENS * WIDTH * (6 * WIDTH + 2 * FFN)
    text = 4 * TEXT * WIDTH * WIDTH
    attention = 4 * TOKENS * (TOKENS + TEXT) * WIDTH
    lora = 2 * TOKENS * RANK * (6 * 2 * WIDTH + 2 * (WIDTH + FFN)) + 2 * TEXT * RANK * 4 * WIDTH
    assert block.joint is not None
    assert operations_of(block.joint.graph) == pytest.approx(2 * frozen + text + 3.5 * attention + 3 * lora, rel=0.01)
