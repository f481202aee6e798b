"""Running out of memory: what was being done, how much was held, and what to change, as lines of the config."""

import errno
import gc
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from weft.engines.residency import memory_of
from weft.errors import RunError
from weft.run.config import RunConfig
from weft.run.estimate import device_of
from weft.run.ladder import changed_config, device_memory, remedies, room_in, spelled
from weft.run.questions import Row, Shape, shape_at, shapes_of
from weft.run.surveyed import surveyed

if sys.platform != "win32":
    import resource

# What allocators say, in lower case: torch's on the cpu under Linux and Windows, CUDA's, Metal's.
SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
# Remedies where no gradient is involved, in order; those that the config already has are passed over.
ENCODING: Mapping[str, Any] = {"family.vae_tiling": True, "data.encoder_batch": 1, "data.workers": 1}
SAMPLING: Mapping[str, Any] = {"family.vae_tiling": True, "family.dtype": "fp8"}


class OutOfMemory(RunError):
    """A shortage that knows where it happened. doing: forward, backward, optimizer, caching, sampling, ...

    shape: of the latents (B, C, f, h, w) at hand, where there were any. peak: bytes held at most.
    """

    def __init__(self, doing: str, shape: tuple[int, ...] | None, peak: int | None, reason: str) -> None:
        self.doing, self.shape, self.peak, self.reason = doing, shape, peak, reason
        super().__init__(f"out of memory in {doing}: {reason}")


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):  # of files that are mapped
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS)


@contextmanager
def naming(doing: str, device: torch.device, shape: tuple[int, ...] | None = None) -> Iterator[None]:
    """Turn a shortage inside into OutOfMemory, which says what was being done. What is named already stays so."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_shortage(error):
            raise
        short = OutOfMemory(doing, shape, peak_of(device), str(error).splitlines()[0] if str(error) else "")
        # The frames below hold the tensors that fill the memory; what follows needs some.
        traceback.clear_frames(error.__traceback__)
    else:
        return
    raise short from None


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Around a whole run: a shortage inside ends as a RunError that names bucket, phase, peak and remedies."""
    shortage: OutOfMemory | None = None
    try:
        with naming("starting", device_of(config)):
            yield
    except OutOfMemory as short:
        traceback.clear_frames(short.__traceback__)
        shortage = short.with_traceback(None)
    if shortage is None:
        return
    free()
    try:
        lines = advice(config, shortage)
    except Exception as error:
        if not is_shortage(error):
            raise
        lines = ["run 'weft plan' with this config: it lists them (here not even the memory to do so was left)"]
    raise RunError(account(config, shortage, lines)) from None


def account(config: RunConfig, short: OutOfMemory, lines: Sequence[str]) -> str:
    """The sentences of the error. lines: the remedies."""
    limit, at = limit_of(config), said_of(shape_of(config, short), short)
    said = f" ({short.reason.rstrip('.')})" if short.reason else ""
    head = f"{config.folder}: out of memory on {device_of(config)} in {short.doing}{at}{said}."
    of = "" if limit is None else f" of {gib(limit)}"
    memory = "" if short.peak is None else f" At its peak it held {gib(short.peak)}{of}."
    if not lines:
        less = "shorter rows" if config.family.medium == "text" else "smaller or shorter clips"
        return f"{head}{memory} No option of Weft would save more: take {less}, or a larger device."
    ranked = "\n".join(f"  {i}. {line}" for i, line in enumerate(lines, start=1))
    return f"{head}{memory}\nWhat helps, the cheapest first, each on top of the last:\n{ranked}"


def said_of(shape: Shape | None, short: OutOfMemory) -> str:
    """Where in the data it was."""
    if shape is None or short.shape is None:
        return ""
    if isinstance(shape, Row):
        return f", {short.shape[0]} {'row' if short.shape[0] == 1 else 'rows'} of {shape.tokens:,} tokens"
    return f", bucket {shape} at batch {short.shape[0]}"


def advice(config: RunConfig, short: OutOfMemory) -> list[str]:
    """Three changes of the config, ranked."""
    if short.doing == "caching":
        smaller = "data.buckets with fewer frames or smaller sizes  (the autoencoder holds a whole clip)"
        return [*untried(config, ENCODING), smaller][:3]
    if short.doing == "sampling":
        if config.family.medium == "text":
            fewer = f"samples.tokens={max(1, config.samples.tokens // 2)}  (shorter replies)"
            return [*untried(config, {"family.dtype": "fp8"}), fewer]
        samples, geometry = config.samples, config.family.geometry()
        frames = geometry.longest_clip(max(1, samples.frames // 2))
        smaller = f"samples.frames={frames}  (a shorter sample)"
        width, height = (max(1, side // 2 // geometry.side_multiple) * geometry.side_multiple
                         for side in (samples.width, samples.height))  # fmt: skip
        half = f"samples.width={width} samples.height={height}  (a smaller one)"
        return [*untried(config, SAMPLING), smaller, half][:3]
    shape = shape_of(config, short) or largest_shape(config)
    if shape is None:
        return []
    limit = limit_of(config) or short.peak or 0
    return [rung.line() for rung in remedies(config, shape, room_in(limit))]


def untried(config: RunConfig, changes: Mapping[str, Any]) -> list[str]:
    """Lines for the changes that the config takes and does not have yet."""
    plain, lines = config.resolved(), []
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if plain[section].get(name, value) != value and changed_config(config, {key: value}) is not None:
            lines.append(f"{key}={spelled(value)}")
    return lines


def shape_of(config: RunConfig, short: OutOfMemory) -> Shape | None:
    """The shape of the latents or ids at hand."""
    return None if short.shape is None else shape_at(config, short.shape)


def largest_shape(config: RunConfig) -> Shape | None:
    """Of the shapes that the run's data has."""
    return max(shapes_of(config, surveyed(config)), key=lambda shape: shape.tokens, default=None)


def peak_of(device: torch.device) -> int | None:
    """Bytes that were held at most: by torch on a GPU, else by the process, where the system counts that."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_of(config: RunConfig) -> int | None:
    """Bytes that there are: of the device, or what the system lets this process have."""
    total = device_memory(config)
    if sys.platform == "win32" or memory_of(device_of(config)) is not None:
        return total
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return soft if soft != resource.RLIM_INFINITY and (total is None or soft < total) else total


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
