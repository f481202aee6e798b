"""Time and memory of merging adapters into a base of the widths of Wan 14B, whatever its number of blocks.

    python benchmarks/merge.py --blocks 1 4 --rounds 3 --json benchmarks/results/merge-cpu.json
    python benchmarks/merge.py --blocks 40 --rounds 1 --holes

The base is one file in bf16 with random numbers; the adapters are LoRAs of rank 32 on attention and ffn. Each merge is
the command `weft merge` in a forked process of one thread, into which Python and the libraries come loaded: what they
take is told beside the peak. Disk: twice the base, with --dtype fp32 three times. With --holes the base is all zeros
that take no room on the disk, one LoRA alone is merged, and what is written is as large as ever.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from io import StringIO
from pathlib import Path
from shutil import rmtree
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from weft.cli.main import main
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.run import merged_base, merging

RANK = 32
WIDE = {"num_attention_heads": 40, "ffn_dim": 13824}  # of Wan 2.1 and 2.2 14B
MIB = 1 << 20
LOADED = (merged_base, merging)  # by the command only when it runs; here before the fork


@dataclass(frozen=True)
class Case:
    """What is merged: how many LoRAs, or one DoRA; dtype: of the result."""

    name: str
    adapters: int = 1
    dora: bool = False
    dtype: str = "as-stored"


CASES = (
    Case("one LoRA"),
    Case("two LoRAs", adapters=2),
    Case("a DoRA", dora=True),
    Case("one LoRA, to fp32", dtype="fp32"),
)


def network_of(blocks: int, sizes: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return WanTransformer3DModel(num_layers=blocks, **sizes)


def write_base(path: Path, network: nn.Module, holes: bool) -> int:
    """A file of random numbers of about 0.02, written tensor by tensor, or of holes; returns its bytes."""
    header, start, chance = {}, 0, torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, shape in shapes.items():
        end = start + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    some = (0.02 * torch.randn(1 << 24, generator=chance)).bfloat16().view(torch.uint8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if holes:
            file.truncate(8 + len(text) + start)
            return 8 + len(text) + start
        for shape in shapes.values():
            left = 2 * shape.numel()
            while left:
                left -= file.write(some[:left].numpy().data)
    return path.stat().st_size


def write_adapter(folder: Path, network: nn.Module, seed: int, dora: bool) -> Path:
    chance, tensors = torch.Generator().manual_seed(seed), {}
    for path, layer in network.named_modules():
        if path.startswith("blocks.") and isinstance(layer, nn.Linear):
            tensors[f"{path}.lora_A.weight"] = 0.02 * torch.randn(RANK, layer.in_features, generator=chance)
            tensors[f"{path}.lora_B.weight"] = 0.02 * torch.randn(layer.out_features, RANK, generator=chance)
            if dora:
                tensors[f"{path}.lora_magnitude_vector"] = torch.ones(layer.out_features)
    return PeftFolder().write(folder, SavedAdapter(tensors, RANK, float(RANK), dora=dora))


def measured(words: Sequence[str]) -> dict[str, float]:
    """Seconds by the clock and of processors, and the peak of resident bytes, of a command in a forked process."""
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    process = context.Process(target=command, args=(list(words), told))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"weft {' '.join(words)} failed")
    return told.get()


def command(words: list[str], told: Any) -> None:
    """Run a verb. Resident memory is the kernel's own mark, begun anew: that of a child begins at its parent's."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")
    before, began, cpu = resident("VmRSS"), perf_counter(), process_time()
    with redirect_stdout(StringIO()):
        code = main(words)
    if code:
        sys.exit(code)
    told.put({"seconds": perf_counter() - began, "cpu": process_time() - cpu, "peak": resident("VmHWM"),
              "before": before})  # fmt: skip


def resident(mark: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(mark)))


def round_of(root: Path, case: Case, adapters: Sequence[Path]) -> dict[str, float]:
    out = root / "out.safetensors"
    words = ["merge", *map(str, adapters), "--into", str(root / "base.safetensors"), "--dtype", case.dtype]
    found = {**measured([*words, "--out", str(out)]), "written": out.stat().st_size}
    out.unlink()
    return found


def record_of(root: Path, case: Case, blocks: int, sizes: dict[str, Any], rounds: int, holes: bool) -> dict[str, Any]:
    network = network_of(blocks, sizes)
    base_bytes = write_base(root / "base.safetensors", network, holes)
    adapters = [write_adapter(root / f"a{n}", network, n, case.dora) for n in range(case.adapters)]
    found = [round_of(root, case, adapters) for _ in range(rounds)]
    held = sum(path.stat().st_size for each in adapters for path in each.glob("*.safetensors"))
    seconds = median(each["seconds"] for each in found)
    return {
        "case": case.name,
        "blocks": blocks,
        "base_gb": base_bytes / 1e9,
        "adapters_gb": held / 1e9,
        "written_gb": found[0]["written"] / 1e9,
        "seconds": seconds,
        "cpu_seconds": median(each["cpu"] for each in found),
        "mb_per_second": found[0]["written"] / 1e6 / seconds,
        "peak_mib": median(each["peak"] for each in found) / MIB,
        "libraries_mib": median(each["before"] for each in found) / MIB,
    }


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--holes", action="store_true", help="a base without numbers, for whole models")
    parser.add_argument("--folder", type=Path, help="where files are written and deleted (default: the system's)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records = []
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        plans = [(CASES[0], blocks) for blocks in arguments.blocks]
        plans += [(case, min(arguments.blocks)) for case in CASES[1:] if not arguments.holes]
        for case, blocks in plans:
            one = record_of(root, case, blocks, WIDE, arguments.rounds, arguments.holes)
            records.append(one)
            print(
                f"{case.name}, {blocks} blocks: {one['base_gb']:.2f} GB in {one['seconds']:.1f} s "
                f"({one['mb_per_second']:.0f} MB/s, {one['cpu_seconds']:.1f} s of processors), "
                f"peak {one['peak_mib']:.0f} MiB, of which libraries {one['libraries_mib']:.0f}"
            )
    finally:
        rmtree(root)
    if arguments.json:
        told = {"date": str(date.today()), "torch": torch.__version__, "cores": os.cpu_count(),
                "load": list(os.getloadavg()), "rounds": arguments.rounds, "rank": RANK,
                "results": records}  # fmt: skip
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    run()
