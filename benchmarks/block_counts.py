"""One block of Wan 2.1 1.3B with LoRA on all linear layers: what it keeps, starts and moves, against diffusers + PEFT.

    python benchmarks/block_counts.py --json benchmarks/results/block-counts.json

Exact counts, on real tensors at real widths: kernels do not depend on the number of tokens, and bytes are the slope
between two numbers of tokens, in Nd: one tensor of N tokens and width d in the dtype that is computed in.
"""

import argparse
import json
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.families.lean_wan import lean_blocks
from weft.families.precision import widen
from weft.families.wan_network import keeps_fp32
from weft.run.bench_machine import processor
from weft.run.counting import Pass, counted_pass, in_units

WIDTH, FFN, HEADS, RANK, TEXT = 1536, 8960, 12, 32, 8
FEW, MANY = 16, 32
TARGETS = r".*(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"
DTYPES = {"fp32": torch.float32, "bf16 autocast, fp32 adapters": torch.bfloat16}


class OneBlock(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([WanTransformerBlock(WIDTH, FFN, HEADS, cross_attn_norm=True).to(dtype)])
        widen(self.requires_grad_(False), keeps_fp32)

    def forward(self, *args: Any) -> Tensor:
        return self.blocks[0](*args)


def diffusers_peft(dtype: torch.dtype, adapters: torch.dtype | None) -> OneBlock:
    """adapters: their dtype; None: no adapters."""
    network = OneBlock(dtype)
    if adapters is not None:
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), network)
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapters)
    return network


def lean(dtype: torch.dtype, backend: Any, for_good: ExitStack) -> OneBlock:
    network = OneBlock(dtype)
    lean_blocks(network.blocks)
    adapters = Lora(rank=RANK, backend=backend).attach(network, list(layers_of(network)), ["default"], 0)
    adapters.initialize()
    for_good.enter_context(adapters.use("default"))
    return network


def one_pass(network: OneBlock, count: int, dtype: torch.dtype, is_lean: bool) -> Pass:
    x = torch.randn(1, count, WIDTH).to(dtype).requires_grad_()
    text = torch.randn(1, TEXT, WIDTH).to(dtype)
    if is_lean:
        rest: tuple[Any, ...] = (torch.randn(1, 1, 6, WIDTH), torch.randn(2, count, 1, WIDTH // HEADS))
    else:
        turn = torch.randn(1, count, 1, WIDTH // HEADS)
        rest = (torch.randn(1, 6, WIDTH), (turn, turn))

    def forward(module: nn.Module = network.blocks[0]) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return module(x, text, *rest)

    forward(network)  # adapters are copied in half precision once for a whole network, and so before
    for parameter in network.parameters():
        parameter.grad = None
    kept_anyway = [t for t in rest if isinstance(t, Tensor)]
    return counted_pass(forward, [text, *network.parameters(), *kept_anyway])


def figures(network: OneBlock, dtype: torch.dtype, is_lean: bool) -> dict[str, Any]:
    few, many = (one_pass(network, count, dtype, is_lean) for count in (FEW, MANY))
    unit = (MANY - FEW) * WIDTH * dtype.itemsize
    return in_units(few, many, unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        rows[f"diffusers alone, {name}"] = figures(diffusers_peft(dtype, None), dtype, False)
        rows[f"diffusers + PEFT, {name}"] = figures(diffusers_peft(dtype, torch.float32), dtype, False)
        for backend in ("native", "peft"):
            with ExitStack() as stack:
                rows[f"weft lean, {backend}, {name}"] = figures(lean(dtype, backend, stack), dtype, True)
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": {name: version(name) for name in ("weft", "torch", "diffusers", "peft")},
        "case": f"Wan block d={WIDTH} f={FFN}, rank {RANK} on all linear layers, one item, CPU flash attention",
        "bars": {"saved_nd": 15, "operations": [70, 110], "pointwise_nd": [100, 170]},
        "rows": rows,
    }
    for name, row in rows.items():
        told = (row["forward"], row["backward"])
        moved = " / ".join(f"{each['operations']} ops, {each['pointwise_nd']} Nd" for each in told)
        print(f"  {name:<52} keeps {row['saved_nd']:6.2f} Nd   {moved}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
