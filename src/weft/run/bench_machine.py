"""The machine under a bench: its names and versions, and what it reaches in products, attention and copies at best."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from weft.contracts import Engine
from weft.math.chance import generator
from weft.math.flops import Rates
from weft.run.provenance import PACKAGE, source_commit

HEAD = 128  # width of a head of attention, as in all models of the suites
MOST = 2e9  # FLOP of one call of attention that is timed on a cpu


def waiter(device: torch.device) -> Callable[[], None] | None:
    """On a GPU the host must wait before it reads its clock; a cpu never runs ahead."""
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    return waits.get(device.type)


def clock_of(device: torch.device) -> Callable[[], float]:
    """The processor's time on a cpu with one thread, which other work on the machine does not stretch; else the host's
    clock."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return process_time if alone else perf_counter


def hardware(engine: Engine) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": str(engine.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if engine.device.type == "cuda":
        card = torch.cuda.get_device_properties(engine.device)
        facts |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def software(library: str) -> dict[str, Any]:
    """Versions. commit: of Weft's own code, where it is known."""
    versions = {name: version(name) for name in ("weft", "torch", library, "peft")}
    return {"python": platform.python_version(), **versions, "commit": source_commit(PACKAGE)}


def processor() -> str:
    """The cpu's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# ---- Ceilings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of products and attention, bytes/s of copies on the device (read and written) and from pinned memory.

    queries: tokens at which attention was timed; on a cpu fewer than a model has.
    """

    products: float
    attention_forward: float
    attention_backward: float
    copies: float
    from_host: float | None
    queries: int

    @property
    def rates(self) -> Rates:
        return Rates(self.products, self.attention_forward, self.attention_backward, self.copies)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Ceilings":
        """From the JSON."""
        names = ("products_flops", "attention_forward_flops", "attention_backward_flops", "copy_bytes_per_second",
                 "from_host_bytes_per_second", "attention_queries")  # fmt: skip
        return cls(*(plain[name] for name in names))

    def plain(self) -> dict[str, float | int | None]:
        """By the names of the JSON."""
        return {
            "products_flops": self.products,
            "attention_forward_flops": self.attention_forward,
            "attention_backward_flops": self.attention_backward,
            "copy_bytes_per_second": self.copies,
            "from_host_bytes_per_second": self.from_host,
            "attention_queries": self.queries,
        }


def ceilings(engine: Engine, tokens: int, width: int, causal: bool = False) -> Ceilings:
    """Measured now, on random numbers in the engine's precision. width: of all heads of attention together."""
    forward, backward, queries = attention_peak(engine, tokens, width, causal)
    return Ceilings(matmul_peak(engine), forward, backward, copy_peak(engine), host_peak(engine), queries)


def precision_of(engine: Engine) -> torch.dtype:
    """In which the engine multiplies."""
    with engine.computing():
        kind = engine.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def fastest(call: Callable[[], object], device: torch.device, rounds: int, middle: bool = False) -> float:
    """Seconds of the best of several calls, or of the one in the middle; the first is not counted."""
    wait, clock = waiter(device) or (lambda: None), clock_of(device)
    taken = []
    for _ in range(rounds + 1):
        wait()
        began = clock()
        call()
        wait()
        taken.append(clock() - began)
    return median(taken[1:]) if middle else min(taken[1:])


def matmul_peak(engine: Engine) -> float:
    """FLOP/s of large matrix products: the median on a GPU, which slows down as it warms, the best on a shared cpu."""
    on_cpu = engine.device.type == "cpu"
    side, rounds = (1024, 8) if on_cpu else (8192, 20)
    dtype = precision_of(engine)
    a, b = (
        torch.randn(side, side, device=engine.device, generator=generator(engine.device, "peak", i)).to(dtype)
        for i in (0, 1)
    )
    return 2 * side**3 / fastest(lambda: torch.matmul(a, b), engine.device, rounds, middle=not on_cpu)


def copy_peak(engine: Engine) -> float:
    """Bytes read and written a second by copies on the device."""
    size = 1 << (26 if engine.device.type == "cpu" else 30)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=engine.device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), engine.device, 8)


def host_peak(engine: Engine) -> float | None:
    """Bytes a second from pinned memory to a GPU; None elsewhere."""
    if engine.device.type != "cuda":
        return None
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 28, dtype=torch.uint8, device=engine.device)
    return len(source) / fastest(lambda: target.copy_(source, non_blocking=True), engine.device, 8)


def attention_peak(engine: Engine, tokens: int, width: int, causal: bool) -> tuple[float, float, int]:
    """FLOP/s of self-attention forward and backward, and at how many tokens. FLOP are 4 N^2 d forward and 10 N^2 d
    backward, half of each where it is causal."""
    heads, share = max(1, width // HEAD), 0.5 if causal else 1.0
    if engine.device.type == "cpu":
        tokens = min(tokens, int((MOST / (4 * heads * HEAD * share)) ** 0.5))
    shape = (1, heads, tokens, HEAD)
    q, k, v = (
        torch.randn(shape, device=engine.device, generator=generator(engine.device, "attention", i))
        .to(precision_of(engine))
        .requires_grad_()
        for i in range(3)
    )

    def attend() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    out = attend()
    grad = torch.randn_like(out)
    with torch.no_grad():
        forward = fastest(attend, engine.device, 5)
    backward = fastest(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), engine.device, 5)
    flops = share * tokens * tokens * heads * HEAD
    return 4 * flops / forward, 10 * flops / backward, tokens
