"""The engine of one process: placement, autocast, loss scaling, recomputation, clipping, and the guard of each step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from weft.contracts import Batch, Stepped
from weft.engines.transfer import verified_copy
from weft.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SingleEngine:
    """One device. `can` names what objectives may need: 'functional' goes when blocks are recomputed, because
    recomputation inside fast weights gives wrong gradients without an error."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device, precision: str, recompute: bool, verify: bool) -> None:
        self.device = device
        self.precision = precision
        self.recompute = recompute
        self.verify = verify
        self.can = frozenset({"roles"} | (set() if recompute else {"functional"}))
        self.scaler = GradScaler(device.type, enabled=precision == "fp16")

    @classmethod
    def open(cls, device: str, precision: str, recompute: bool, verify: bool) -> "SingleEngine":
        """Raises ConfigError when the device is not there."""
        chosen = torch.device(best_device() if device == "auto" else device)
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"engine.device: '{device}' was asked for, but torch sees no GPU. Run: weft doctor.")
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"engine.device: '{device}' is not there; {torch.cuda.device_count()} GPUs are visible.")
        if chosen.type == "mps" and not torch.backends.mps.is_available():
            raise ConfigError("engine.device: 'mps' was asked for, but this is no Mac with Metal. Use auto or cpu.")
        return cls(chosen, best_precision(chosen) if precision == "auto" else precision, recompute, verify)

    def carry(self, module: nn.Module) -> nn.Module:
        if self.verify:
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.data = verified_copy(tensor.data, self.device)
        return module.to(self.device)

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Carry a network to the device; wrap its blocks for recomputation where that was asked for."""
        network = self.carry(network)
        if self.recompute:
            for block in blocks:
                # Not reentrant: a frozen base gives inputs without gradients, and reentrant recomputation would then
                # return no gradient to the adapters, silently.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        return network

    def put(self, batch: Batch) -> Batch:
        if self.verify:
            return Batch({name: verified_copy(t, self.device) for name, t in batch.tensors.items()}, batch.keys)
        # Only pinned memory may be copied without waiting: from pageable memory mps returns garbage.
        return Batch(
            {n: t.to(self.device, non_blocking=self.device.type == "cuda") for n, t in batch.tensors.items()},
            batch.keys,
        )

    def computing(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def total(self, value: Tensor) -> Tensor:
        return value

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, max_norm: float) -> Stepped:
        """Unscale, measure the norm, clip, move, and clear. A gradient that is not finite moves nothing."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(total)
        moved = norm < float("inf")  # False for nan too
        if moved:
            if max_norm and norm > max_norm:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
            self.scaler.step(optimizer)
        overflow = not moved and self.scaler.is_enabled()
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return Stepped(norm=norm, moved=moved, overflow=overflow)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": dict(self.scaler.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["scaler"] or self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state["scaler"]))


def best_device() -> str:
    """cuda (ROCm's GPUs are called so too), else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it, fp16 on older GPUs, fp32 on a cpu, where half precision is emulated."""
    if device.type == "cpu":
        return "fp32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"
