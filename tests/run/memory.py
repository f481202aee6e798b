"""What real small steps hold on a cpu, told by autograd, by dispatch and by the allocator."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from tests.learners import learner_of
from weft.contracts import Denoise, Tokens
from weft.data.buckets import Bucket
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.questions import Row, Shape, answered
from weft.run.rehearsal import LiveBytes


def question_of(learner: Learner, config: RunConfig, shape: Shape) -> Denoise | Tokens:
    """Of text all tokens are learned, in rows of two conversations."""
    items = config.data.batch_size
    if isinstance(shape, Row):
        ids = torch.randint(200, (items, shape.tokens))
        first = shape.tokens // 3
        positions = torch.cat([torch.arange(first), torch.arange(shape.tokens - first)]).repeat(items, 1)
        return Tokens(ids, positions, ids.roll(-1, 1))
    assert isinstance(shape, Bucket)
    family = config.family
    latents = family.geometry().latent_shape(shape.frames, shape.height, shape.width)
    given = torch.zeros(items, latents[1], dtype=torch.bool) if family.image == "frames" else None
    conditions, expert = family.conditions(items, *latents[1:]), learner.experts[0].name
    return Denoise(torch.randn(items, *latents), torch.rand(items), conditions, given, expert)


def ready(config: RunConfig, shape: Shape) -> tuple[Learner, Callable[[], Tensor]]:
    """A real learner that has its gradients, and how it is asked."""
    learner = learner_of(config)
    for parameter in learner.model.adapters.parameters(learner.shown[0]).values():
        parameter.grad = torch.zeros_like(parameter)
    asked = question_of(learner, config, shape)

    def loss() -> Tensor:
        with learner.engine.computing():
            return answered(learner.model, asked)

    return learner, loss


def really_kept(config: RunConfig, shape: Shape) -> int:
    """Bytes of the storages that autograd keeps of a real forward pass without recomputation, each once."""
    learner, loss = ready(config, shape)
    network = learner.model.network
    base = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in base:
            seen[storage.data_ptr()] = storage  # the reference holds it at its address
        return tensor

    with learner.model.adapters.use(learner.shown[0]), saved_tensors_hooks(pack, lambda t: t):
        loss()
    return sum(storage.nbytes() for storage in seen.values())


def really_held(config: RunConfig, shape: Shape) -> tuple[int, int]:
    """What a real step's memory is after its forward pass, and at its peak."""
    learner, loss = ready(config, shape)
    with learner.model.adapters.use(learner.shown[0]), LiveBytes() as live:
        for sender in (learner.engine.inputs, learner.engine.activations):
            if sender is not None:
                sender.host_memory = live.ignoring
        total = loss()
        kept = live.now
        total.backward()
    return kept, live.peak


def allocated_at_peak(config: RunConfig, shape: Shape) -> int:
    """The same peak as torch's own allocator reports it to the profiler."""
    learner, loss = ready(config, shape)
    with learner.model.adapters.use(learner.shown[0]):
        loss().backward()  # what is made once and kept, such as rotary tables, is there
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
