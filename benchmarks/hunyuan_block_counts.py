"""A double and a single block of HunyuanVideo with LoRA on attention and ffn: what they keep, start and move.

    python benchmarks/hunyuan_block_counts.py --json benchmarks/results/block-counts-hunyuan.json

As block_counts.py, on fake tensors of the real shapes: exact counts, in Nd of the video's tokens, against diffusers +
PEFT under the mask that diffusers always makes, of a text of 256 tokens without padding.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.families.lean_hunyuan import lean_blocks
from weft.run.bench_machine import processor
from weft.run.counting import Pass, counted_pass, in_units
from weft.run.rehearsal import default_dtype, let_be_fake

WIDTH, HEADS, RANK, TEXT = 3072, 24, 32, 256
FEW, MANY = 4096, 32_760  # an image of 1024 x 1024, 81 frames at 480 x 832
DTYPES = {"fp32": torch.float32, "bf16 autocast, fp32 adapters": torch.bfloat16}
TARGETS = r".*(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
KINDS: Mapping[str, Any] = {"double": HunyuanVideoTransformerBlock, "single": HunyuanVideoSingleTransformerBlock}
RIVALS = {"diffusers + PEFT": None, "weft lean, native": "native", "weft lean, peft": "peft"}
FLOORS = {"double": 10, "single": 9}


class OneBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([KINDS[kind](HEADS, WIDTH // HEADS, mlp_ratio=4.0)])

    def forward(self, *args: Any) -> Tensor:
        answer = self.blocks[0](*args)
        return answer if isinstance(answer, Tensor) else torch.cat(answer, 1)


def one_pass(kind: str, backend: Any, tokens: int, dtype: torch.dtype) -> Pass:
    """backend: of lean blocks' adapters; None: diffusers' own code with PEFT's."""
    with default_dtype(dtype), torch.device("meta"):
        network = OneBlock(kind).requires_grad_(False)
    adapters = None
    if backend is None:
        options = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
        inject_adapter_in_model(options, network, low_cpu_mem_usage=True)
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    else:
        lean_blocks(*((network.blocks, []) if kind == "double" else ([], network.blocks)))
        paths = [path for path in layers_of(network) if "norm" not in path]
        adapters = Lora(rank=RANK, backend=backend).attach(network, paths, ["default"], 0)
    with FakeTensorMode():
        let_be_fake(network)
        x = torch.empty(1, tokens, WIDTH, dtype=dtype, requires_grad=True)
        text = torch.empty(1, TEXT, WIDTH, dtype=dtype, requires_grad=True)
        temb, turn = torch.empty(1, WIDTH), torch.empty(2, tokens + TEXT, 1, WIDTH // HEADS)
        cos, sin = turn[:, :tokens, 0].unbind()
        if backend is None:
            mask = torch.ones(1, 1, 1, tokens + TEXT, dtype=torch.bool)
            args: tuple[Any, ...] = (x, text, temb, mask, (cos, sin))
        else:
            args = (x, text, temb, None, turn)
            if kind == "single":
                x = torch.empty(1, tokens + TEXT, WIDTH, dtype=dtype, requires_grad=True)
                args = (x, temb, None, turn)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return network(*args)

        with nullcontext() if adapters is None else adapters.use("default"):
            return counted_pass(forward, [temb, turn, *network.parameters()])


def figures(kind: str, backend: Any, dtype: torch.dtype) -> dict[str, Any]:
    few, many = (one_pass(kind, backend, tokens, dtype) for tokens in (FEW, MANY))
    unit = (MANY - FEW) * WIDTH * dtype.itemsize
    return in_units(few, many, unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        for kind in KINDS:
            for who, backend in (
                ("diffusers + PEFT", None),
                ("weft lean, native", "native"),
                ("weft lean, peft", "peft"),
            ):
                rows[f"{kind}, {who}, {name}"] = figures(kind, backend, dtype)
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": {name: version(name) for name in ("weft", "torch", "diffusers", "peft")},
        "case": f"HunyuanVideo blocks d={WIDTH} f={4 * WIDTH}, rank {RANK} on attention and ffn, one item, {TEXT} text "
        f"tokens, {FEW} and {MANY} of video, CPU flash attention, fake tensors",
        "bars": {"saved_nd": {kind: floor + 0.5 for kind, floor in FLOORS.items()}, "pointwise_nd": [100, 170]},
        "rows": rows,
    }
    for name, row in rows.items():
        told = (row["forward"], row["backward"])
        moved = " / ".join(f"{each['operations']} ops, {each['pointwise_nd']} Nd" for each in told)
        print(f"  {name:<62} keeps {row['saved_nd']:6.2f} Nd   {moved}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
