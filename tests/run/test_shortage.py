"""Running out of memory for real: a process whose address space ends, and what it says then."""

import ctypes
import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learners import ROLE, Given, learner_of, small_config
from tests.multi import RankFailed, spawn
from tests.small import config_of, make_clips
from weft.contracts import Batch, NoState, Rng
from weft.data.buckets import Bucket
from weft.errors import RunError
from weft.events import Event, PhaseStarted
from weft.families.memory import returned_at_once
from weft.run.checks import check
from weft.run.ladder import remedies
from weft.run.shortage import OutOfMemory, explained, is_shortage, naming
from weft.run.start import fill_cache, train_run

CPU = torch.device("cpu")


def limit_memory(room: int) -> None:
    """Let this process have so many bytes of address space more, and none beyond."""
    import resource  # which Windows has not

    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_short(root: Path, model: Path, doing: str, room: int) -> None:
    """A forward and a backward pass, of which one gets too little."""
    config = small_config(root, model, engine={"precision": "fp32"})
    learner = learner_of(config)
    remedies(config, Bucket(9, 64, 64, 48), 1)  # what torch imports when it is first asked must not count
    shape = (8, 16, 5, 30, 52)
    batch = Batch({"latents": torch.randn(shape), "text": torch.randn(8, 5, 128), "noise": torch.randn(shape),
                   "t": torch.rand(8)}, tuple("abcdefgh"))  # fmt: skip
    # What earlier tensors left free in the heap would serve as room.
    with returned_at_once(), explained(config), learner.model.adapters.use(ROLE):
        if doing == "forward":
            limit_memory(room)
        with naming("forward", CPU, shape):
            rng = Rng(torch.Generator(), torch.Generator(), config.seed, draw=0, done=0)
            loss = Given().loss("train", learner.model, batch, NoState(), rng).total
        limit_memory(room)
        with naming("backward", CPU, shape):
            learner.engine.backward(loss, last=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process so")
@pytest.mark.parametrize(("doing", "room"), [("forward", 20 << 20), ("backward", 2 << 20)])
def test_a_real_shortage_ends_with_bucket_phase_peak_and_three_remedies(world, tmp_path, doing, room):
    """15600 tokens of width 24 keep more of a small network than the process gets, and so does going back."""
    with pytest.raises(RankFailed) as failed:
        spawn(1, run_short, tmp_path, world / "model", doing, room, timeout=300)
    said = str(failed.value)
    assert "weft.errors.RunError" in said, said
    assert f"out of memory on cpu in {doing}, bucket 17x240x416 at batch 8" in said
    assert "can't allocate memory" in said
    assert "At its peak it held" in said and "GiB of" in said
    assert "1. engine.recompute=selective  (" in said
    assert "2. engine.recompute=true  (" in said
    assert "3. data.batch_size=1 schedule.accumulate=" in said
    assert "During handling" not in said


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:131] . DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 1000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1000 bytes."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
])  # fmt: skip
def test_every_allocator_is_understood(error):
    assert is_shortage(error)
    with pytest.raises(OutOfMemory) as caught, naming("forward", CPU, (1, 16, 3, 8, 8)):
        raise error
    assert (caught.value.doing, caught.value.shape) == ("forward", (1, 16, 3, 8, 8))
    assert caught.value.__cause__ is None and caught.value.peak


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), RunError("the disk is full"), ValueError("x")])
def test_other_errors_pass_as_they_are(world, tmp_path, error):
    config = small_config(tmp_path, world / "model")
    with pytest.raises(type(error)) as caught, explained(config), naming("forward", CPU):
        raise error
    assert caught.value is error


def test_the_innermost_name_stays():
    with pytest.raises(OutOfMemory) as caught, naming("sampling", CPU), naming("validation", CPU):
        raise MemoryError
    assert caught.value.doing == "validation"


def text_of(config, doing: str, shape: tuple[int, ...] | None = None) -> str:
    with pytest.raises(RunError) as caught, explained(config), naming(doing, CPU, shape):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert not isinstance(caught.value, OutOfMemory)
    return str(caught.value)


def test_a_shortage_while_caching_asks_for_less_of_the_autoencoder(world, tmp_path):
    said = text_of(small_config(tmp_path, world / "model"), "caching", (1, 16, 3, 8, 8))
    assert "in caching, bucket 9x64x64 at batch 1" in said
    assert "1. family.vae_tiling=true" in said
    assert "data.buckets" in said


def test_a_shortage_while_sampling_offers_smaller_samples(world, tmp_path):
    config = small_config(tmp_path, world / "model", samples={"frames": 17, "width": 64, "height": 64},
                          family={"vae_tiling": True})  # fmt: skip
    said = text_of(config, "sampling")
    assert "samples.frames=5" in said
    assert "samples.width=32 samples.height=32" in said
    assert "vae_tiling" not in said


def test_tensors_that_filled_the_memory_are_free_when_remedies_are_worked_out(world, tmp_path):
    """The error's own traceback would hold them."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def fill() -> None:
        large = torch.zeros(1000)
        alive.append(weakref.ref(large))
        raise MemoryError

    config = small_config(tmp_path, world / "model")
    with pytest.raises(RunError), explained(config), naming("forward", CPU, (1, 16, 3, 8, 8)):
        fill()
    gc.collect()
    assert alive[0]() is None


def train_short(plain: dict[str, Any]) -> None:
    """A whole run that gets too little from its first step on."""
    config = config_of(plain)
    remedies(config, Bucket(9, 64, 64, 48), 1)  # what torch imports when it is first asked must not count

    def shrink(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "training":
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # or what loading left free would serve
            limit_memory(10 << 20)

    train_run(config, shrink)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process so")
def test_a_whole_run_that_runs_out_of_memory_says_so_in_its_log_and_goes_on_when_it_has_room(world, plain, tmp_path):
    make_clips(tmp_path / "large", count=3, frames=33, side=128)
    plain["data"] |= {
        "sources": [{"path": str(tmp_path / "large"), "repeats": 8}], "batch_size": 24, "validation_items": 0,
        "buckets": {"sizes": [[128, 128]], "frames": [33]},
    }  # fmt: skip
    plain["schedule"], plain["validation"] = {"steps": 2, "warmup": 0}, {"every": 0}
    config = config_of(plain)
    fill_cache(config, check(config), lambda event: None)  # in the process that is to fail, it would leave room behind
    said = "out of memory on cpu in forward, bucket 33x128x128 at batch 24"
    with pytest.raises(RankFailed, match=said) as failed:
        spawn(1, train_short, plain, timeout=300)
    assert "  1. engine.recompute=selective  (" in str(failed.value)
    log = (tmp_path / "runs" / "run" / "events.rank0.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    assert (last["event"], last["outcome"]) == ("run_ended", "failed") and said in last["reason"]
    result = train_run(config, lambda event: None)
    assert result.finished and result.step == 2
