"""Extraction at the widths of Wan 14B: one layer against the exact decomposition, and whole blocks in memory and time.

The layer is 5120 x 13824: a change of falling singular values under noise as of rounding. The blocks are files in bf16
with random weights, read by `weft extract` in a fresh process. Usage: python benchmarks/extract.py [--json FILE]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.math.low_rank_of import nearest

OUT, INNER = 5120, 13824
WIDTHS = {
    **{f"{kind}_attn.{name}": (OUT, OUT) for kind in ("self", "cross") for name in "qkvo"},
    "ffn.0": (INNER, OUT),
    "ffn.2": (OUT, INNER),
}
AROUND = {
    "patch_embedding.weight": (OUT, 16, 1, 2, 2),
    "head.head.weight": (64, OUT),
    "time_embedding.0.weight": (OUT, 256),
}
# Run in a process of its own, so that the peak is this verb's alone: VmHWM, for getrusage's begins with the parent's.
VERB = """\
import re, sys, time
from weft.cli.main import main
begin, spent = time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print("measured", code, time.perf_counter() - begin, time.process_time() - spent, peak)
"""


def change_of_layer(chance: torch.Generator) -> Tensor:
    """(5120, 13824): 200 directions of which each is 4 % less than the one before it, and noise in all."""
    left, right = (torch.linalg.qr(torch.randn(size, 200, generator=chance))[0] for size in (OUT, INNER))
    return (left * 0.96 ** torch.arange(200.0)) @ right.mT + 1e-5 * torch.randn(OUT, INNER, generator=chance)


def one_layer(rank: int) -> dict[str, Any]:
    """What the sampled decomposition misses beyond the exact one, whose squared values are eigenvalues of D D'."""
    matrix = change_of_layer(torch.Generator().manual_seed(0))
    spent = process_time()
    found = nearest(matrix, rank, torch.Generator().manual_seed(1))
    sampled = process_time() - spent
    spent = process_time()
    wide = matrix.double()
    squares = torch.linalg.eigvalsh(wide @ wide.mT).flip(0)
    exact = process_time() - spent
    least = float(squares[rank:].sum())
    return {
        "size": [OUT, INNER],
        "rank": rank,
        "sampled_cpu_s": sampled,
        "exact_values_cpu_s": exact,
        "captured": found.captured,
        "captured_at_most": 1 - least / float(squares.sum()),
        "missed_norm_beyond_least": (found.missed / least) ** 0.5 - 1,
        "largest_error_of_a_value": float((found.values / squares[:rank].sqrt() - 1).abs().max()),
    }


def whole_blocks(blocks: int, rank: int) -> dict[str, Any]:
    """Peak of the process and seconds of `weft extract` on so many blocks of Wan 14B."""
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = Path(folder) / "base.safetensors", Path(folder) / "tuned.safetensors"
        write_pair(base, tuned, blocks)
        asked = ["extract", str(base), str(tuned), "--out", f"{folder}/adapter", "--rank", str(rank)]
        begin = perf_counter()
        done = subprocess.run([sys.executable, "-c", VERB, *asked], capture_output=True, text=True, check=True)
        process = perf_counter() - begin
        line = next(line for line in done.stdout.splitlines() if line.startswith("measured"))
        _, code, seconds, spent, peak = line.split()
        assert code == "0", done.stdout + done.stderr
        return {
            "blocks": blocks,
            "rank": rank,
            "file_bytes": base.stat().st_size,
            "adapter_bytes": sum(path.stat().st_size for path in (Path(folder) / "adapter").iterdir()),
            "peak_rss_bytes": int(peak) * 1024,
            "wall_s": float(seconds),
            "cpu_s": float(spent),
            "process_wall_s": process,
            "said": done.stdout.splitlines()[0],
        }


def write_pair(base: Path, tuned: Path, blocks: int) -> None:
    """Two files in bf16: random weights, and the same with a LoRA of rank 16 merged into every layer."""
    chance = torch.Generator().manual_seed(0)
    names = {f"blocks.{n}.{name}.weight": shape for n in range(blocks) for name, shape in WIDTHS.items()} | AROUND
    weights = {name: (0.02 * torch.randn(shape, generator=chance)).bfloat16() for name, shape in names.items()}
    save_file(weights, base)
    for name in [name for name in names if name.startswith("blocks")]:
        out, inner = names[name]
        change = torch.randn(out, 16, generator=chance) @ torch.randn(16, inner, generator=chance)
        weights[name] = (weights[name].float() + 1e-3 * change).bfloat16()
    save_file(weights, tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layer = one_layer(arguments.rank)
    print(json.dumps(layer, indent=1))
    rows = [whole_blocks(blocks, arguments.rank) for blocks in arguments.blocks]
    print(json.dumps(rows, indent=1))
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "load": os.getloadavg(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "layer": layer, "blocks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
