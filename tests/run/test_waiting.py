"""What a step asks of the device: nothing. Every number that the host reads of it would stop both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.learners import NoMilestones, batch_of, learner_of, small_config
from tests.small import config_of, make_qwen3
from weft.contracts import Batch
from weft.data.chat_loader import collated
from weft.data.tokens import Text
from weft.run.learner import Learner
from weft.run.rehearsal import leaves
from weft.run.stopwatch import Stopwatch
from weft.run.train import Course, run_phase

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")  # operators that must know numbers
METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
TO_DEVICE = (torch.tensor, torch.as_tensor)  # with a device they copy, and wait for the copy


class OfDevice(TorchDispatchMode):
    """Follows what would lie on a device: what is named, and all that is computed of it. Keeps each read of it."""

    def __init__(self, there: Iterator[Tensor]) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._alive: list[Any] = []  # so that no address is given twice
        self._there: set[int] = set()
        for tensor in there:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._there.add(storage._cdata)

    def has(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        of_device = any(self.has(leaf) for leaf in leaves((args, options)))
        if of_device and any(name in str(func).split(".")[1] for name in READS):
            self.reads.append(str(func))
        out = func(*args, **options)
        if of_device:
            for leaf in leaves(out if isinstance(out, tuple | list) else [out]):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return out


class OfHost(TorchFunctionMode):
    """Sees the reads that are no operators, and copies that wait."""

    def __init__(self, device: OfDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and args and self.device.has(args[0]):
            self.device.reads.append(f"Tensor.{name}")
        if func in TO_DEVICE and (kwargs or {}).get("device") is not None:
            self.device.reads.append(f"torch.{name} to a device")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(learner: Learner) -> Iterator[OfDevice]:
    network, engine = learner.model.network, learner.engine
    device = OfDevice(iter([*network.parameters(), *network.buffers()]))
    put: Callable[[Batch], Batch] = engine.put

    def seen(batch: Batch) -> Batch:
        copies = {name: tensor.clone() for name, tensor in put(batch).tensors.items()}
        for tensor in copies.values():
            device.add(tensor)
        return replace(batch, tensors=copies)

    engine.put = seen  # type: ignore[method-assign]
    with OfHost(device), device:
        yield device


def reads_of(learner: Learner, config: Any, batches: list[Batch]) -> list[str]:
    """What the host reads of the device in a step after the first, which lays memory and builds states."""
    found: list[str] = []
    for step in range(2):
        with watched(learner) as device:
            feed = learner.engine.feeding(iter(batches), learner.objective.count)
            for phase in learner.objective.phases(learner.step, learner.experts):
                run_phase(phase, learner, feed, Course(config.schedule, NoMilestones(), print), Stopwatch())
        learner.step += 1
        found = device.reads if step else []
    return found


@pytest.mark.parametrize("change", [
    {},
    {"ema": {"decay": 0.9}, "adapter": {"lora_plus": 4, "max_norm": 1.0}, "schedule": {"accumulate": 2}},
    {"adapter": {"backend": "peft", "input_dropout": 0.1}, "objective": {"strata": 4}},
    {"engine": {"precision": "bf16"}},
])  # fmt: skip
def test_a_step_of_a_video_model_reads_no_number_of_the_device(world, tmp_path, change):
    config = small_config(tmp_path, world / "model", **change)
    plain = [batch_of(2, i) for i in range(4)]
    batches = [Batch({n: t for n, t in b.tensors.items() if n in ("latents", "text")}, b.keys) for b in plain]
    assert reads_of(learner_of(config), config, batches) == []


def test_a_step_of_a_language_model_reads_no_number_of_the_device(tmp_path):
    """Where texts begin and which tokens are learned is known on the host when a batch is laid."""
    config = config_of({
        "name": "chat", "output": str(tmp_path),
        "family": {"kind": "causal-lm", "source": str(make_qwen3(tmp_path / "model"))},
        "adapter": {"kind": "lora", "rank": 4, "targets": "all"}, "objective": {"kind": "next-token"},
        "optimizer": {"kind": "adamw", "lr": 1e-2}, "engine": {"device": "cpu"}, "schedule": {"steps": 4, "warmup": 1},
        "data": {"kind": "chat", "sources": [{"path": "no chats.jsonl"}], "length": 256},
    })  # fmt: skip
    chance = numpy.random.default_rng(0)
    texts = [Text(str(n), "", chance.integers(300, size=n, dtype=numpy.int32), chance.random(n) < 0.7) for n in (7, 9)]
    batches = [collated([texts, texts[:1]], None, 0)] * 2
    assert reads_of(learner_of(config, shaken=False), config, batches) == []


def test_the_watch_sees_each_kind_of_read():
    device = OfDevice(iter([there := torch.arange(4.0)]))
    with OfHost(device), device:
        made = (there * 2).sum()
        _ = (float(made), made.item(), bool(made > 1), made.tolist(), there.nonzero(), there[there > 1])
        torch.tensor([1.0], device="cpu")
        host = torch.ones(3)
        _ = (host.sum().item(), host.tolist(), torch.tensor([2.0]))
    assert {"Tensor.item", "Tensor.tolist", "Tensor.__bool__", "torch.tensor to a device"} <= set(device.reads)
    assert sum("nonzero" in read for read in device.reads) == 1
    assert device.reads.count("Tensor.item") == device.reads.count("Tensor.tolist") == 1  # the host's own are no reads
