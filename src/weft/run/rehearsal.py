"""One forward pass of a run's network and adapters on fake tensors: shapes and autograd are real, storage is not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.contracts import Denoise, Model
from weft.data.buckets import Bucket
from weft.run.assemble import target_report
from weft.run.config import RunConfig


@dataclass(frozen=True)
class Rehearsal:
    """A fake network under its first role. loss(): the squared velocity of one micro-batch, with its graph."""

    network: nn.Module
    blocks: tuple[nn.Module, ...]
    loss: Callable[[], Tensor]


@contextmanager
def rehearsed(config: RunConfig, bucket: Bucket, weights: torch.dtype) -> Iterator[Rehearsal]:
    """Inside, tensors are fake. The native backend stands in for either: both make the same matrix products."""
    family, role, items = config.family, config.objective.roles[0], config.data.batch_size
    with FakeTensorMode():
        with default_dtype(weights):
            network = family.skeleton("cpu").requires_grad_(False)
        native = config.adapter.model_copy(update={"backend": "native"})
        adapters = native.attach(network, target_report(config, network).paths, (role,), 0)
        x = torch.randn(items, *family.geometry().latent_shape(bucket.frames, bucket.height, bucket.width))
        question = Denoise(x, torch.rand(items), family.conditions(items))
        with adapters.use(role):
            yield Rehearsal(
                network,
                tuple(family.blocks(network)),
                lambda: Model(network, family, adapters).velocity(question).float().square().sum(),
            )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors in this dtype, for the time of the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
