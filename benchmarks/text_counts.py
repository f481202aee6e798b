"""One decoder layer of Qwen3-0.6B with LoRA on all linear layers: what it keeps and starts, against transformers.

    python benchmarks/text_counts.py --json benchmarks/results/text-counts.json

Exact counts, on real tensors at real widths: bytes are the slope between two numbers of tokens, in Nd: one tensor of N
tokens and width d in the dtype that is computed in.
"""

import argparse
import json
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from weft.adapters.lora import Lora
from weft.families.kernels import Kernels
from weft.families.text_network import prepared
from weft.families.text_packed import PACKING, Packing
from weft.run.bench_machine import processor
from weft.run.counting import Pass, counted_pass, in_units

RANK, FEW, MANY = 32, 16, 32
WIDTH, HEADS, GROUPS, HEAD, GATE = 1024, 16, 8, 128, 3072
FLOOR = (2 * WIDTH + 2 * HEADS * HEAD + 2 * GROUPS * HEAD + 2 * GATE) / WIDTH  # x, x1; q, answer; k, v; gate, up
ALONE = Kernels(layer="eager", attention="sdpa", rms_norm="eager", mlp="eager", rotary="eager")
DTYPES = {"fp32": torch.float32, "bf16 autocast, fp32 adapters": torch.bfloat16}


def network_of(kernels: Kernels, dtype: torch.dtype) -> Any:
    config = Qwen3Config(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=GATE, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    return prepared(Qwen3ForCausalLM(config).to(dtype), kernels)


def one_pass(network: Any, count: int, dtype: torch.dtype, packed: bool) -> Pass:
    positions = torch.arange(count)[None]
    x = torch.randn(1, count, WIDTH).to(dtype).requires_grad_()
    turn = network.model.rotary_emb(x, positions)
    asked: dict[str, Any] = {"attention_mask": None, "position_ids": positions, "position_embeddings": turn}
    if packed:
        asked[PACKING] = Packing(((count,),), positions)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return network.model.layers[0](x, **asked)

    forward()
    for parameter in network.parameters():
        parameter.grad = None
    return counted_pass(forward, [*network.parameters(), *turn])


def figures(kernels: Kernels, backend: Any, dtype: torch.dtype, packed: bool) -> dict[str, Any]:
    network = network_of(kernels, dtype)
    paths = [path for path, m in network.named_modules() if path.endswith("_proj") and isinstance(m, nn.Linear)]
    with ExitStack() as stack:
        adapters = Lora(rank=RANK, backend=backend).attach(network, paths, ["default"], 0)
        adapters.initialize()
        stack.enter_context(adapters.use("default"))
        few, many = (one_pass(network, count, dtype, packed) for count in (FEW, MANY))
    unit = (MANY - FEW) * WIDTH * dtype.itemsize
    return in_units(few, many, unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        rows[f"transformers + PEFT, {name}"] = figures(ALONE, "peft", dtype, False)
        for backend in ("native", "peft"):
            rows[f"weft lean, {backend}, {name}"] = figures(Kernels(), backend, dtype, True)
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": {name: version(name) for name in ("weft", "torch", "transformers", "peft")},
        "case": f"Qwen3 layer d={WIDTH}, gate {GATE}, {HEADS} heads of {HEAD}, {GROUPS} of keys, rank {RANK} on all "
        "linear layers, one text, CPU flash attention",
        "floor_nd": FLOOR,
        "rows": rows,
    }
    for name, row in rows.items():
        moved = " / ".join(f"{row[p]['operations']} ops, {row[p]['pointwise_nd']} Nd" for p in ("forward", "backward"))
        print(f"  {name:<55} keeps {row['saved_nd']:6.2f} Nd of {FLOOR}   {moved}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
