"""Copies to a device that are checked after they are made, and a self-test of a device's copies.

Some GPUs return zeros, NaN or old memory after a copy and report no error: RDNA cards under Windows and ROCm
(ROCm/TheRock #8379, legacy-rocm-build #6123), most often for tensors that lie in memory-mapped files.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.errors import RunError

Copy = Callable[[Tensor, torch.device], Tensor]

CHUNK = 16 << 20  # bytes of one piece of a copy in pieces
PROBE_BYTES = (1 << 20, 16 << 20, 64 << 20)
REPEATS = 3
MATMUL_SIDE = 512


class Fingerprint(NamedTuple):
    """What two equal tensors share: the wrapping sum of their bits as integers, and how many of these are not 0."""

    total: int
    nonzero: int


class Route(NamedTuple):
    """One way to copy, with the name that messages use."""

    name: str
    copy: Copy


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Computed where the tensor lies, so that a copy is checked without copying it back."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().view(integer)
    return Fingerprint(int(bits.sum(dtype=torch.int64)), int(torch.count_nonzero(bits)))


# ---- Routes -------------------------------------------------------------------------------------------------------


def direct(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True)


def through_clone(tensor: Tensor, device: torch.device) -> Tensor:
    """Through fresh contiguous memory: the source may be a view or lie in a mapped file."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format).to(device)
    synchronize(device)
    return copied


def in_chunks(tensor: Tensor, device: torch.device) -> Tensor:
    """In pieces of 16 MiB, waiting for each."""
    source = tensor.detach().contiguous().view(-1)
    target = torch.empty_like(source, device=device)
    step = max(1, CHUNK // source.element_size())
    for start in range(0, len(source), step):
        target[start : start + step].copy_(source[start : start + step], non_blocking=False)
        synchronize(device)
    return target.view(tensor.shape)


def routes() -> tuple[Route, ...]:
    """The ways to copy, the fastest first. ROCm never copies straight from a mapped file: there it hangs or lies."""
    alternatives = (Route("a contiguous clone", through_clone), Route("pieces", in_chunks))
    return alternatives if torch.version.hip else (Route("a direct copy", direct), *alternatives)


def synchronize(device: torch.device) -> None:
    """Wait until the device is done, so that a late copy is not mistaken for a wrong one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- Copying ------------------------------------------------------------------------------------------------------


def verified_copy(
    tensor: Tensor,
    device: torch.device,
    attempts: int = 3,
    ways: Sequence[Route] | None = None,
    tell: Callable[[str], None] = warnings.warn,
) -> Tensor:
    """The tensor on the device with every bit in place. A wrong copy is told, and made again by another way.

    Raises RunError when no attempt was right.
    """
    device = torch.device(device)
    if tensor.device == device or tensor.numel() == 0 or device.type == "meta":
        return tensor.to(device)
    wanted, wrong = fingerprint(tensor), []
    ways = routes() if ways is None else ways
    for attempt in range(attempts):
        route = ways[attempt % len(ways)]
        copied = route.copy(tensor, device)
        synchronize(device)
        found = fingerprint(copied)
        if copied.shape == tensor.shape and copied.dtype == tensor.dtype and found == wanted:
            if wrong:
                tell(f"copying to {device} went wrong by {', '.join(wrong)}; {route.name} was right.")
            return copied
        wrong.append(f"{route.name} ({_fault(wanted, found)})")
    raise RunError(
        f"{device}: a tensor {tuple(tensor.shape)} of {tensor.dtype} arrived wrong {attempts} times, by "
        f"{', '.join(wrong)}. The driver or the card is at fault: run 'weft doctor', update the driver, "
        "or train with engine.device: cpu."
    )


def _fault(wanted: Fingerprint, found: Fingerprint) -> str:
    if found.nonzero == 0 and wanted.nonzero:
        return "all zeros"
    return (
        f"{abs(wanted.nonzero - found.nonzero)} more or fewer zeros"
        if found.nonzero != wanted.nonzero
        else "other bits"
    )


# ---- Self-test ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One thing that a device was asked to do, several times over."""

    name: str
    device: str
    passed: bool
    detail: str
    seconds: float


def self_test(device: torch.device, copy: Copy = direct, sizes: Sequence[int] = PROBE_BYTES) -> list[Probe]:
    """Round trips of random bytes, zero_ and a matmul, each three times; about a second on a healthy GPU."""
    device = torch.device(device)
    probes = [
        _probe(f"round trip {size >> 20} MiB", device, lambda turn, size=size: _round_trip(device, copy, size, turn))
        for size in sizes
    ]
    if device.type == "cuda":
        probes += [
            _probe(f"pinned {size >> 20} MiB", device, lambda turn, size=size: _round_trip_pinned(device, size, turn))
            for size in sizes
        ]
    probes.append(_probe("mapped safetensors", device, lambda turn: _from_mapped_file(device, copy, sizes[-1], turn)))
    probes.append(_probe("zero_", device, lambda turn: _zeroed(device, turn)))
    probes.append(_probe("matmul", device, lambda turn: _matmul(device, turn)))
    return probes


def _probe(name: str, device: torch.device, attempt: Callable[[int], str]) -> Probe:
    """attempt(turn) says what was wrong, or nothing."""
    began, faults = time.perf_counter(), []
    for turn in range(REPEATS):
        try:
            fault = attempt(turn)
        except (RuntimeError, NotImplementedError) as error:
            fault = (str(error).splitlines() or [type(error).__name__])[0]
        if fault:
            faults.append(fault)
    seconds = time.perf_counter() - began
    detail = f"{len(faults)} of {REPEATS} wrong: {faults[0]}" if faults else f"{REPEATS} of {REPEATS} right"
    return Probe(name, str(device), not faults, detail, seconds)


def _random(size: int, turn: int) -> Tensor:
    """So many random bytes, as integers of 8."""
    return torch.empty(size // 8, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(size + turn))


def _compared(source: Tensor, there: Tensor, back: Tensor) -> str:
    if fingerprint(there) != (wanted := fingerprint(source)):
        return f"the copy on the device differs: {_fault(wanted, fingerprint(there))}"
    return "" if torch.equal(source, back) else "the copy that came back differs"


def _round_trip(device: torch.device, copy: Copy, size: int, turn: int) -> str:
    source = _random(size, turn)
    there = copy(source, device)
    return _compared(source, there, direct(there, torch.device("cpu")))


def _round_trip_pinned(device: torch.device, size: int, turn: int) -> str:
    source = _random(size, turn).pin_memory()
    there = source.to(device, non_blocking=True)
    back = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    back.copy_(there, non_blocking=True)
    synchronize(device)
    return _compared(source, there, back)


def _from_mapped_file(device: torch.device, copy: Copy, size: int, turn: int) -> str:
    source = _random(size, turn)
    # Windows cannot delete a file that is still mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "probe.safetensors"
        save_file({"random": source}, path)
        mapped = load_file(path)["random"]
        there = copy(mapped, device)
        return _compared(source, there, direct(there, torch.device("cpu")))


def _zeroed(device: torch.device, turn: int) -> str:
    tensor = torch.full((1 << 20,), float(turn + 1), device=device)
    tensor.zero_()
    left = int(torch.count_nonzero(tensor))
    return f"{left} numbers are not zero after zero_" if left else ""


def _matmul(device: torch.device, turn: int) -> str:
    """Small whole numbers: every product and sum is exact in fp32 and in TF32, so the result must be equal."""
    generator = torch.Generator().manual_seed(turn)
    left, right = (torch.randint(-4, 5, (MATMUL_SIDE, MATMUL_SIDE), generator=generator).float() for _ in range(2))
    found = (left.to(device) @ right.to(device)).cpu()
    return (
        "" if torch.equal(found, (left.double() @ right.double()).float()) else "the product of two matrices is wrong"
    )
