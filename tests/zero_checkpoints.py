"""Real DeepSpeed checkpoints, written by real processes, for what reads them."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.multi import spawn


class SmallNetwork(nn.Module):
    """A frozen layer between trained ones, two parameter groups, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 3)
        self.last = nn.Linear(3, 11)
        self.frozen.requires_grad_(False)
        self.register_buffer("table", torch.arange(6.0).view(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def write_zero_checkpoint(
    folder: Path, stage: int, world: int = 2, precision: str = "fp32", steps: int = 3, without_frozen: bool = False
) -> dict[str, Tensor]:
    """Train a SmallNetwork under ZeRO on `world` processes, write `folder`/TAG by DeepSpeed's own save_checkpoint (and
    `folder`/latest), and return the network's whole parameters and buffers in fp32: the masters that DeepSpeed has.

    precision: fp32, or bf16 (weights and frozen weights in bf16, masters in fp32). without_frozen: frozen parameters
    are left out, as exclude_frozen_parameters=True does.
    """
    return spawn(world, _written, str(folder), stage, precision, steps, without_frozen)[0]


def _written(folder: str, stage: int, precision: str, steps: int, without_frozen: bool) -> dict[str, Tensor]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__ = {}  # no kernel for sums in shared memory, which it would compile for a minute
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network = SmallNetwork()
    groups = [
        {"params": list(network.first.parameters()), "lr": 1e-2},
        {"params": list(network.last.parameters()), "lr": 1e-3},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=torch.optim.AdamW(groups), config=config, dist_init_required=False
    )
    dtype = next(iter(network.frozen.parameters())).dtype
    for step in range(steps):
        chance = torch.Generator().manual_seed(10 * step + dist.get_rank())
        engine.backward(engine(torch.randn(4, 5, generator=chance).to(dtype)).float().square().mean())
        engine.step()
    engine.save_checkpoint(folder, tag="global_step3", exclude_frozen_parameters=without_frozen)
    whole = dict(network.named_buffers())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            whole[name] = safe_get_full_fp32_param(parameter)
        else:
            with deepspeed.zero.GatheredParameters(parameter):
                whole[name] = parameter.detach()
    whole = {name: tensor.detach().float().clone() for name, tensor in whole.items()}
    dist.barrier()
    dist.destroy_process_group()
    return whole
