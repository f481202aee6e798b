"""How DeepSpeed is asked for: its processes, its config, and nothing compiled."""

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from weft.engines.parallel import Layout
from weft.engines.processes import BACKENDS, Place, Together, join
from weft.errors import ConfigError

BUCKET = 1 << 26  # numbers of gradient that are summed at once at most: 256 MiB
COMMON = {
    "train_micro_batch_size_per_gpu": 1,  # the loop knows what is summed, and divides by itself
    "gradient_accumulation_steps": 1,
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


@dataclass(frozen=True)
class Zero:
    """What ZeRO spreads over all processes (stage 2: gradients and moments, 3: weights too), and what of it waits in
    host memory."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    pinned: bool = True

    def config(self, sizes: list[int], device: torch.device) -> dict[str, Any]:
        """DeepSpeed's config of an optimizer of parameters of these sizes, whose gradients and moments it spreads. It
        computes in fp32 as far as it knows: adapters are fp32, and autocast stands around the forward pass."""
        bucket = max(max(sizes), min(sum(sizes), BUCKET))
        spread: dict[str, Any] = {
            "stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": False,
        }  # fmt: skip
        if self.offload_optimizer:
            spread["offload_optimizer"] = self._host(device)
        return {**COMMON, "zero_optimization": spread}

    def weights_config(self, device: torch.device) -> dict[str, Any]:
        """DeepSpeed's config of a base whose weights it spreads."""
        spread: dict[str, Any] = {"stage": 3, "overlap_comm": False}
        if self.offload_parameters:
            spread["offload_param"] = self._host(device)
        return {**COMMON, "zero_optimization": spread}

    def _host(self, device: torch.device) -> dict[str, Any]:
        return {"device": "cpu", "pin_memory": self.pinned and device.type == "cuda"}


def library(device: torch.device) -> Any:
    """The package deepspeed, for a kind of device. Raises ConfigError when it is not installed."""
    os.environ["DS_ACCELERATOR"] = device.type  # else it takes the first kind that it finds on the machine
    try:
        deepspeed: Any = import_module("deepspeed")
    except ImportError as missing:
        raise ConfigError(
            "engine.kind: 'deepspeed' needs deepspeed, which is not installed. "
            "Run: DS_BUILD_OPS=0 pip install 'weft[deepspeed]', or write engine.kind=torch."
        ) from missing
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch has new names for these, and would say so in every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def meet(place: Place, layout: Layout, device: torch.device, timeout: float) -> Together:
    """Join the other processes, and tell DeepSpeed that they have met. Raises ConfigError."""
    deepspeed = library(device)
    if place.world == 1:
        alone(device)
    else:
        join(place, device, timeout)
    if device.type == "cpu":
        # It would compile a kernel of its own for sums in shared memory, which takes a minute and a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(BACKENDS[device.type], timeout=timedelta(minutes=timeout), verbose=False)
    return Together(layout, device)


def alone(device: torch.device) -> None:
    """A group of one process, which DeepSpeed wants as well."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[device.type], store=dist.HashStore(), rank=0, world_size=1)
