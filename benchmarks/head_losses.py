"""A language model's loss from hidden states, forward and backward, under a frozen head: memory and time of each way.

    python benchmarks/head_losses.py --json benchmarks/results/head-losses-cpu.json

The ways: the logits of all tokens and torch's cross_entropy; torch's F.linear_cross_entropy, which has come with
torch 2.13, some tokens at a time by its own options; and Weft's. All are asked for the gradient of the hidden states,
and for the sum of the losses; a row `each` gives the loss of every token, which a batch of texts of unequal weight
needs, and Weft's always does. Each round of each way is a process of its own: peak is what its resident memory rose by,
hidden states, weight and labels being there before; one round is enough for it. Times are processor time of one thread,
the least of the rounds.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.math.cross_entropy import Head, head_losses
from weft.run.bench_machine import processor

WIDTH = 1024
CASES = ((151_936, 1024), (32_768, 2048))  # words, tokens
Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, weight, labels -> sum of losses


def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight), labels, reduction="sum")


def weft(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return head_losses(x, labels, Head(weight)).sum()


def weft_256(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return head_losses(x, labels, Head(weight), rows=256).sum()


def torchs(reduction: str, **options: Any) -> Way:
    def way(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)
        return functional.linear_cross_entropy(x, weight, labels, reduction=reduction, options=chosen).sum()

    return way


WAYS: dict[str, Way] = {
    "whole logits": whole,
    "torch, sum": torchs("sum"),
    "torch, sum, 256 tokens at once": torchs("sum", batch_chunk_size=256, chunking_method=None),
    "torch, each": torchs("none"),
    "weft, each": weft,
    "weft, each, 256 tokens at once": weft_256,
}


def asked(words: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(words, WIDTH, generator=chance).mul_(0.05)
    x = torch.randn(tokens, WIDTH, generator=chance).requires_grad_()
    return x, weight, torch.randint(words, (tokens,), generator=chance)


def resident(name: str) -> int:
    """Bytes: VmRSS now, VmHWM at its most since the mark was last set back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(words: int, tokens: int, name: str, answer: Any) -> None:
    torch.set_num_threads(1)
    x, weight, labels = asked(words, tokens)
    (gradient,) = torch.autograd.grad(WAYS[name](x[:8], weight, labels[:8]), x)  # what is made but once
    del gradient
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before, began = resident("VmRSS"), thread_time()
    loss = WAYS[name](x, weight, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    seconds = thread_time() - began
    answer.put({"peak_bytes": resident("VmHWM") - before, "seconds": seconds,
                "loss": float(loss.detach()), "gradient": float(gradient.norm())})  # fmt: skip


def in_a_process(*case: Any) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=measured, args=(*case, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    for words, tokens in CASES:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for _ in range(arguments.rounds):
            for name, found in rounds.items():
                found.append(in_a_process(words, tokens, name))
        truth = rounds["whole logits"][0]
        rows = cases[f"{words} words, {tokens} tokens"] = {}
        for name, found in rounds.items():
            rows[name] = {
                "peak_mib": round(min(each["peak_bytes"] for each in found) / 2**20),
                "seconds": round(min(each["seconds"] for each in found), 2),
                "loss_off": max(abs(each["loss"] / truth["loss"] - 1) for each in found),
                "gradient_off": max(abs(each["gradient"] / truth["gradient"] - 1) for each in found),
            }
            print(f"  {words} words, {tokens} tokens, {name:<32} {rows[name]}", flush=True)
    result = {
        "date": date.today().isoformat(), "processor": processor(), "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch")},
        "case": f"width {WIDTH}, fp32, frozen head, the gradient of the hidden states",
        "logits_mib": {f"{words} words, {tokens} tokens": round(words * tokens * 4 / 2**20) for words, tokens in CASES},
        "rounds": arguments.rounds, "cases": cases,
    }  # fmt: skip
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
