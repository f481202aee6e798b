"""A compiled block of Wan 2.1 1.3B with LoRA on all linear layers: what it keeps, does twice and moves at each budget.

    python benchmarks/compiled_blocks.py --json benchmarks/results/compiled-blocks-cpu.json

Told by torch's partitioner on fake tensors of 81 frames at 480x832. In Nd: one tensor of N tokens and width d in the
dtype that is computed in. What is kept has the block's input in it, 1 Nd that the block before has made. What is moved
is inductor's own account of the kernels that it makes for this processor and of the operators that it calls, products
and attention included; nothing is run, but it needs a C++ compiler.
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import fx
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode

from block_counts import FFN, HEADS, RANK, WIDTH, lean
from weft.engines.compiling import Compiler, Region
from weft.engines.recompute import attends
from weft.run.bench_machine import processor
from weft.run.blocks import BUDGETS
from weft.run.partitions import Accounts
from weft.run.rehearsal import let_be_fake

CLIP, TEXT = 32_760, 512  # tokens
DTYPES = {"bf16 autocast, fp32 adapters": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def step(dtype: torch.dtype, backend: Any, compiler: Compiler, tokens: int, fake: bool = False) -> None:
    """One pass forward and backward of a compiled block whose input wants a gradient."""
    with ExitStack() as stack:
        network = lean(dtype, backend, stack)
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            let_be_fake(network)
        Region(compiler).compile(network.blocks[0])
        x = torch.randn(1, tokens, WIDTH).to(dtype).requires_grad_()
        text = torch.randn(1, TEXT, WIDTH).to(dtype)
        rest = (torch.randn(1, 1, 6, WIDTH), torch.randn(2, tokens, 1, WIDTH // HEADS))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = network.blocks[0](x, text, *rest)
        out.sum().backward()


# ---- What is kept ---------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """Operators of a graph that cost much. large: products of two matrices that both exceed the rank."""

    large: int = 0
    thin: int = 0
    attention: Counter[int] = field(default_factory=Counter)  # by number of keys


def work_of(graph: fx.Graph) -> Work:
    work = Work()
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.name() in PRODUCTS:
            sizes = [size for arg in node.args if isinstance(arg, fx.Node) for size in arg.meta["val"].shape]
            work.thin += min(sizes) <= 3 * RANK
            work.large += min(sizes) > 3 * RANK
        elif attends(node.target):
            work.attention[int(node.args[1].meta["val"].shape[-2])] += 1
    return work


def kept(dtype: torch.dtype, backend: Any) -> dict[str, Any]:
    """By budget: tensors kept, and what is done in both passes together beyond what each does without recomputation."""
    accounts = Accounts()
    step(dtype, backend, Compiler(backend=accounts), CLIP, fake=True)
    (parted,) = [each for each in accounts.parted if each.joint is not None]
    assert parted.joint is not None
    once = work_of(parted.joint.graph)
    rows: dict[str, Any] = {}
    nd = CLIP * WIDTH * dtype.itemsize
    for budget in BUDGETS:
        parts = parted.parts(budget)
        works = [work_of(part.graph) for part in parts]
        attention = sum((work.attention for work in works), Counter()) - once.attention
        traffic = [moved(part, backward) for backward, part in enumerate(parts)] if dtype is torch.bfloat16 else []
        rows[f"{budget:g}"] = {
            "saved_nd": round(parted.saved(budget) / nd, 2),
            "products_twice": sum(work.large for work in works) - once.large,
            "thin_products_twice": sum(work.thin for work in works) - once.thin,
            "self_attention_twice": attention[CLIP],
            "cross_attention_twice": attention[TEXT],
            "moved_nd": [{kind: round(count / nd, 1) for kind, count in each.items()} for each in traffic],
        }
    return {"products": once.large, "thin_products": once.thin, "budgets": rows}


# ---- What is moved ---------------------------------------------------------------------------------------------------


def moved(part: fx.GraphModule, backward: bool) -> dict[str, int]:
    """Bytes that inductor's kernels and calls for one pass read and write: all, and its own kernels' of these."""
    found: list[dict[str, int]] = []
    make = GraphLowering.compile_to_module

    def counted(graph: GraphLowering) -> Any:
        module = make(graph)
        sizes = {node: node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes}
        own = sum(size for node, size in sizes.items() if not isinstance(node, ExternKernelSchedulerNode))
        found.append({"all": sum(sizes.values()), "own": own})
        return module

    inputs = [node.meta["val"] for node in part.graph.nodes if node.op == "placeholder"]
    GraphLowering.compile_to_module = counted  # type: ignore[method-assign]
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            compile_fx_inner(part, inputs, is_backward=backward)
    finally:
        GraphLowering.compile_to_module = make  # type: ignore[method-assign]
    (total,) = found
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        row = rows[name] = kept(dtype, "native")
        for budget, figures in row["budgets"].items():
            print(f"  {name:<30} budget {budget:<4} {figures}")
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": {name: version(name) for name in ("weft", "torch", "diffusers")},
        "case": f"Wan block d={WIDTH} f={FFN}, rank {RANK} on all linear layers, {CLIP} tokens, {TEXT} of text",
        "bars": {"saved_nd at 0.5": 13.5, "moved_nd": [110, 150]},
        "rows": rows,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
