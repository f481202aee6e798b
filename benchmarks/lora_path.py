"""A LoRA on one linear layer against the bare frozen layer, PEFT's own forward and unfused hooks: times and operators.

    python benchmarks/lora_path.py --rounds 15 --json benchmarks/results/lora-path-cpu.json

Times are processor time of one thread, forward and backward, variants in turns within a round; each figure is the ratio
of smallest times. Beside them stand the two ways to add the low-rank part that are not in use: after the large product
(addmm), and as K = in + r columns of one product (kext), its inputs copied into place or, as if their producers had
written there, given.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import thread_time
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from weft.adapters.lora import Lora
from weft.run.bench_machine import processor

SHAPES = ((1536, 1536), (1536, 8960))
RANKS = (32, 64)
Run = Callable[[], None]


def adapted(layer: nn.Linear, rank: int, backend: Literal["peft", "native"], fused: bool) -> nn.Module:
    """A network of one layer that answers under a LoRA with a changed B."""
    network = nn.Sequential(nn.Linear(layer.in_features, layer.out_features))
    network.load_state_dict({f"0.{key}": tensor for key, tensor in layer.state_dict().items()})
    adapters = Lora(rank=rank, backend=backend, fused=fused).attach(network, ("0",), ("student",), 0)
    adapters.initialize()
    with torch.no_grad():
        for parameter in adapters.parameters("student").values():
            parameter.add_(0.01)
    for carrier in adapters.carriers:
        carrier.answer("student")
    return network


def asked(network: nn.Module, x: Tensor, grad: Tensor) -> Run:
    """Forward and backward of a network; gradients of the layer before and of the adapter are made, not kept."""
    wanted = [x, *(p for p in network.parameters() if p.requires_grad)]

    def run() -> None:
        torch.autograd.grad(network(x), wanted, grad)

    return run


def by_hand(layer: nn.Linear, x: Tensor, dy: Tensor, rank: int) -> dict[str, Run]:
    """The multiplications alone of three ways to add the low-rank part, without autograd."""
    (out, width), n = layer.weight.shape, len(x)
    w, bias, x = layer.weight.detach(), layer.bias.detach(), x.detach()
    a, b = torch.randn(rank, width) / 64, torch.randn(out, rank) / 64
    beside, below = torch.cat([w, b], 1), torch.cat([w, a])
    x_ext, dy_ext = torch.cat([x, x[:, :rank]], 1), torch.cat([dy, dy[:, :rank]], 1)

    def addmm() -> None:
        y, u = torch.addmm(bias, x, w.mT), x @ a.mT
        y.addmm_(u, b.mT)
        v, dx = dy @ b, dy @ w
        dx.addmm_(v, a)
        _ = v.mT @ x, dy.mT @ u

    def bare() -> None:
        _ = torch.addmm(bias, x, w.mT), dy @ w

    def low_rank_first() -> None:
        u = x @ a.mT
        torch.addmm(bias, u, b.mT).addmm_(x, w.mT)
        v = dy @ b
        (v @ a).addmm_(dy, w)
        _ = v.mT @ x, dy.mT @ u

    def kext(x_ext: Tensor, dy_ext: Tensor) -> None:
        u = torch.mm(x, a.mT, out=x_ext[:, width:])
        torch.addmm(bias, x_ext, beside.mT)
        v = torch.mm(dy, b, out=dy_ext[:, out:])
        _ = dy_ext @ below, v.mT @ x, dy.mT @ u

    def copied() -> None:
        there, back = x.new_empty(n, width + rank), dy.new_empty(n, out + rank)
        there[:, :width].copy_(x)
        back[:, :out].copy_(dy)
        kext(there, back)

    return {
        "addmm": addmm,
        "low-rank part first": low_rank_first,
        "kext, copied": copied,
        "kext, given": lambda: kext(x_ext, dy_ext),
        "bare, by hand": bare,
    }


def variants(width: int, out: int, rank: int, tokens: int) -> dict[str, Run]:
    torch.manual_seed(0)
    layer = nn.Linear(width, out).requires_grad_(False)
    x, dy = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, out)
    found = {"bare": asked(layer, x, dy)}
    for backend in ("peft", "native"):
        for fused in (True, False):
            found[f"{backend}, {'fused' if fused else 'its own'}"] = asked(adapted(layer, rank, backend, fused), x, dy)
    return found | by_hand(layer, x, dy, rank)


class Counted(TorchDispatchMode):
    """Operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operators(run: Run) -> int:
    with Counted() as counted:
        run()
    return counted.count


def measure(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Smallest seconds of each variant; the order turns from round to round."""
    best = dict.fromkeys(runs, float("inf"))
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = thread_time()
            runs[name]()
            if number:
                best[name] = min(best[name], thread_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for width, out in SHAPES:
        for rank in RANKS:
            runs = variants(width, out, rank, arguments.tokens)
            seconds = measure(runs, arguments.rounds)
            hand = seconds["bare, by hand"]
            rows = {}
            for name, value in seconds.items():
                base = hand if name in by_hand_names(runs) else seconds["bare"]
                rows[name] = {"seconds": value, "ratio": value / base, "operators": operators(runs[name])}
            least = 1 + 1.5 * rank * (1 / width + 1 / out)
            cases[f"{width} -> {out}, rank {rank}"] = {"least_by_flops": least, "variants": rows}
            print(f"{width} -> {out}, rank {rank}: at least {least:.3f}")
            for name, row in rows.items():
                print(
                    f"  {name:<22} {1000 * row['seconds']:8.1f} ms  x{row['ratio']:.3f}  {row['operators']} operators"
                )
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "peft")},
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "cases": cases,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def by_hand_names(runs: dict[str, Run]) -> set[str]:
    """Those without autograd, which are compared with the bare layer by hand."""
    names = list(runs)
    return set(names[names.index("addmm") :])


if __name__ == "__main__":
    main()
