"""What each way to compute a block gives, alone and with the others: counts, one thread's time, predicted GPU times.

    python benchmarks/ablation.py --json benchmarks/results/ablation-cpu.json

One block of Wan 2.1 1.3B and one layer of Qwen3 0.6B at their real widths, LoRA of rank 32 on all linear layers, from
the libraries' own code under PEFT on. Counts hold on any machine: kernels do not depend on the number of tokens, and
bytes are the slope between two numbers of tokens, in Nd: one tensor of N tokens and width d in the dtype that is
computed in.

`seconds` are processor time of one thread in fp32, forward and backward. A core computes a product slowly and reads
from a cache, so that there the products decide, and what a way saves in bytes and launches hardly shows: they tell that
nothing became slower, and nothing of a GPU. `predicted` is what follows from the counts and the rates of math/flops.py
for an H200: nothing of it was measured.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import thread_time
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW
from transformers import Qwen3Config, Qwen3ForCausalLM

from block_counts import FEW, FFN, MANY, RANK, WIDTH, OneBlock, figures
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.engines.single_device import SingleEngine
from weft.families.kernels import Kernels
from weft.families.lean_wan import lean_blocks
from weft.families.text_network import prepared
from weft.math.flops import H200, Block, decoder_blocks, practical_seconds, wan_blocks, work_of
from weft.run.bench_machine import processor
from weft.run.counting import Pass, Traffic, counted, counted_pass
from weft.run.optimizers import AdamW as Configured
from weft.run.rehearsal import let_be_fake

LAUNCH = 5e-6  # seconds of a host for one operator of eager PyTorch; an assumption
DTYPES = {"bf16 autocast, fp32 adapters": torch.bfloat16, "fp32": torch.float32}
# name: (the family's own fast code, adapters by math/products.py); None: no adapter.
WAYS: dict[str, tuple[bool, bool] | None] = {
    "no adapter": None,
    "library + PEFT": (False, False),
    "fused alone": (False, True),
    "lean alone": (True, False),
    "lean + fused": (True, True),
}
TEXT_WIDTH, TEXT_FFN, TEXT_HEADS = 1024, 3072, (16, 8, 128)
SHALLOW, DEEP = 2, 3  # layers; between them lies one whose input and output want gradients


# ---- The models -----------------------------------------------------------------------------------------------------


def adapted(network: nn.Module, paths: list[str], fused: bool, for_good: ExitStack) -> None:
    adapters = Lora(rank=RANK, backend="peft", fused=fused).attach(network, paths, ["default"], 0)
    adapters.initialize()
    for_good.enter_context(adapters.use("default"))


def wan(way: tuple[bool, bool] | None, dtype: torch.dtype, for_good: ExitStack) -> OneBlock:
    network = OneBlock(dtype)
    if way is not None:
        if way[0]:
            lean_blocks(network.blocks)
        adapted(network, list(layers_of(network)), way[1], for_good)
    return network


def qwen(way: tuple[bool, bool] | None, dtype: torch.dtype, layers: int, for_good: ExitStack) -> Qwen3ForCausalLM:
    """Of few words, so that the head hardly counts; without an adapter its first norm is trained in place of one."""
    queries, keys, own = TEXT_HEADS
    config = Qwen3Config(
        vocab_size=64, hidden_size=TEXT_WIDTH, intermediate_size=TEXT_FFN, num_hidden_layers=layers,
        num_attention_heads=queries, num_key_value_heads=keys, head_dim=own, max_position_embeddings=512,
    )  # fmt: skip
    eager = {name: "eager" for name in Kernels.model_fields if name not in ("attention", "cross_entropy")}
    lean = way is not None and way[0]
    network = prepared(Qwen3ForCausalLM(config).to(dtype), Kernels() if lean else Kernels(**eager))  # type: ignore[arg-type]
    if way is None:
        network.get_submodule("model.layers.0.input_layernorm").requires_grad_()
    else:
        adapted(network, [path for path in layers_of(network) if ".layers." in path], way[1], for_good)
    return network.train()


# ---- Counts ---------------------------------------------------------------------------------------------------------

N = TypeVar("N", bound=nn.Module)


def pretended(network: N, for_good: ExitStack) -> N:
    """The network on fake tensors, whose operators are counted and not computed: a CPU without half precision takes
    minutes for them."""
    for_good.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    let_be_fake(network)
    return network


def text_pass(network: Qwen3ForCausalLM, tokens: int, dtype: torch.dtype, lean: bool) -> Pass:
    """lean: the network is told what a loader knows, that there is one text; the library looks for itself."""
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            known = {"texts": ((tokens,),)} if lean else {}
            return network(ids=ids, positions=positions, labels=ids.roll(-1, 1), learned=torch.arange(tokens), **known)

    forward()
    for parameter in network.parameters():
        parameter.grad = None
    return counted_pass(forward, [ids, positions, *network.parameters(), *network.buffers()])


def text_figures(way: tuple[bool, bool] | None, dtype: torch.dtype) -> dict[str, Any]:
    """Of one layer: that by which three differ from two."""
    found: dict[tuple[int, int], Pass] = {}
    for layers in (SHALLOW, DEEP):
        with ExitStack() as stack:
            # On real tensors: transformers looks at positions, and makes another mask where it cannot.
            network = qwen(way, dtype, layers, stack)
            for tokens in (FEW, MANY):
                found[layers, tokens] = text_pass(network, tokens, dtype, way is not None and way[0])
    unit = (MANY - FEW) * TEXT_WIDTH * dtype.itemsize

    def slope(of: Callable[[Pass], int]) -> float:
        deep, shallow = (of(found[layers, MANY]) - of(found[layers, FEW]) for layers in (DEEP, SHALLOW))
        return round((deep - shallow) / unit, 2)

    def traffic(of: Callable[[Pass], Traffic]) -> dict[str, Any]:
        deep, shallow = of(found[DEEP, MANY]), of(found[SHALLOW, MANY])
        return {
            "operations": deep.operations - shallow.operations, "views": deep.views - shallow.views,
            "allocations": deep.allocations - shallow.allocations,
            "pointwise_nd": slope(lambda each: of(each).pointwise),
            "products_nd": slope(lambda each: of(each).products),
        }  # fmt: skip

    return {
        "saved_nd": slope(lambda each: each.saved),
        "forward": traffic(lambda each: each.forward),
        "backward": traffic(lambda each: each.backward),
    }


def wan_figures(way: tuple[bool, bool] | None, dtype: torch.dtype) -> dict[str, Any]:
    with ExitStack() as stack:
        network = wan(way, dtype, stack)
        return figures(pretended(network, stack), dtype, way is not None and way[0])


def optimizer_figures() -> dict[str, int]:
    """Operators of clipping, moving and clearing 600 tensors."""

    def tensors() -> dict[str, nn.Parameter]:
        made = {str(number): nn.Parameter(torch.randn(8, 8)) for number in range(600)}
        for parameter in made.values():
            parameter.grad = torch.randn_like(parameter)
        return made

    def plain(**options: Any) -> int:
        parameters = list(tensors().values())
        optimizer = AdamW(parameters, **options)

        def step() -> None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return counted(step).operations

    engine, named = SingleEngine.open("cpu", "fp32"), tensors()
    flat = Configured().build(named, lambda name: 1.0)
    engine.step(flat, 1.0)  # lays the memory
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    return {
        "torch, a tensor at a time": plain(foreach=False),
        "torch fused": plain(fused=True),
        "weft, flat": counted(lambda: engine.step(flat, 1.0)).operations,
    }


# ---- One thread -----------------------------------------------------------------------------------------------------


def seconds(tokens: int, rounds: int) -> dict[str, float]:
    """Smallest time of each way of a Wan block, in turns."""
    with ExitStack() as stack:
        networks = {name: wan(way, torch.float32, stack) for name, way in WAYS.items()}
        best = dict.fromkeys(networks, float("inf"))
        for number in range(rounds + 1):
            for name, network in networks.items():
                way = WAYS[name]
                x = torch.randn(1, tokens, WIDTH, requires_grad=True)
                text, turn = torch.randn(1, 64, WIDTH), torch.randn(1, tokens, 1, 128)
                lean = way is not None and way[0]
                rest: tuple[Any, ...] = (torch.randn(1, 6, WIDTH), (turn, turn))
                if lean:
                    rest = (torch.randn(1, 1, 6, WIDTH), torch.stack([turn[0], turn[0]]))
                began = thread_time()
                network(x, text, *rest).sum().backward()
                if number:
                    best[name] = min(best[name], thread_time() - began)
    return best


# ---- What follows for a GPU -----------------------------------------------------------------------------------------


def predicted(rows: dict[str, Any], blocks: list[Block], tokens: int, width: int) -> dict[str, Any]:
    """Of a step in half precision on an H200, each way without recomputation: nothing overlaps, products and attention
    run at their rates, and all bytes beyond a frozen block's products at that of a copy.

    rows: counts of one block. device_ms is for the blocks alone; host_ms what a host needs to launch them one by one;
    the larger is the time of a step.
    """
    work = work_of(blocks, lambda number, name: RANK)
    products = practical_seconds(work, H200) - work.moved / H200.copies
    unit = tokens * width * 2
    frozen = sum(rows["no adapter"][way]["products_nd"] for way in ("forward", "backward"))
    found: dict[str, Any] = {"least_ms": round(1e3 * practical_seconds(work, H200), 2)}
    for name, row in rows.items():
        if name == "no adapter":
            continue
        both = [row["forward"], row["backward"]]
        moved = sum(each["pointwise_nd"] + each["products_nd"] for each in both) - frozen
        device = products + len(blocks) * moved * unit / H200.copies
        host = len(blocks) * sum(each["operations"] for each in both) * LAUNCH
        found[name] = {
            "device_ms": round(1e3 * device, 2),
            "host_ms": round(1e3 * host, 2),
            "kept_gib": round(len(blocks) * row["saved_nd"] * unit / 2**30, 2),
        }
    return found


def predictions(rows: dict[str, Any]) -> dict[str, Any]:
    half = "bf16 autocast, fp32 adapters"
    video, text = rows["Wan 2.1 1.3B block"][half], rows["Qwen3 0.6B layer"][half]
    found = {
        f"Wan 2.1 1.3B, {clip}": predicted(video, wan_blocks(30, WIDTH, FFN, tokens, 512), tokens, WIDTH)
        for clip, tokens in (("1x480x832", 1560), ("81x480x832", 32760), ("81x720x1280", 75600))
    }
    layers = decoder_blocks(28, TEXT_WIDTH, TEXT_FFN, TEXT_HEADS, 16384, 1024)
    found["Qwen3 0.6B, 4 x 4096 packed, without its head"] = predicted(text, layers, 16384, TEXT_WIDTH)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of the blocks that are timed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for model, measured in (("Wan 2.1 1.3B block", wan_figures), ("Qwen3 0.6B layer", text_figures)):
        rows[model] = {dtype: {} for dtype in DTYPES}
        for dtype, kind in DTYPES.items():
            for name, way in WAYS.items():
                row = rows[model][dtype][name] = measured(way, kind)
                told = " / ".join(f"{each['operations']} ops, {each['pointwise_nd']} Nd"
                                  for each in (row["forward"], row["backward"]))  # fmt: skip
                print(f"  {model}, {dtype:<29} {name:<15} keeps {row['saved_nd']:6.2f} Nd   {told}", flush=True)
    optimizer = optimizer_figures()
    print(f"  optimizer, operators: {optimizer}")
    timed = seconds(arguments.tokens, arguments.rounds)
    print("  " + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in timed.items()))
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("weft", "torch", "diffusers", "transformers", "peft")},
        "case": f"rank {RANK} on all linear layers of a block, backend peft",
        "rows": rows,
        "optimizer_operations": optimizer,
        "seconds": {"tokens": arguments.tokens, "rounds": arguments.rounds, "wan block, fp32": timed},
        "predicted": {"for": "H200, not measured", "launch_seconds": LAUNCH, "cases": predictions(rows)},
    }
    for case, found in result["predicted"]["cases"].items():
        print(f"  [predicted] {case}: {found}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
