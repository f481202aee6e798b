"""DeepSpeed's ZeRO behind the engine's contract: one network, one optimizer, gradients summed over all processes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from weft.contracts import Berth, Stepped
from weft.engines.processes import Together
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.engines.zero_optimizer import Shares2, Shares3, ZeroOptimizer
from weft.engines.zero_setup import Zero, library
from weft.engines.zero_weights import Cut, Whole, refuse_until_owned, spread
from weft.errors import ConfigError


class ZeroEngine(SingleEngine):
    """ZeRO-2 or ZeRO-3. DeepSpeed has the backward pass's sums, the clipping and the optimizer's step; precision, loss
    scaling and the guard of each step are as on one device. Private names of DeepSpeed are those of 0.19.
    """

    processes: Together

    def __init__(
        self, device: torch.device, precision: str, residence: Residence, processes: Together, zero: Zero
    ) -> None:
        super().__init__(device, precision, residence, processes)
        self.can = frozenset()
        self.zero = zero
        self.cut = Cut(self.rank, self.world, device)
        self.deepspeed: Any = None  # its engine, once it owns the optimizer
        self.whole: Whole | None = None
        self._outside: list[nn.Parameter] = []  # frozen, of no block
        self._let_in: Callable[[], None] = lambda: None
        # What torch's loss scaler looks at in place of the gradients, which lie in DeepSpeed's own buffers.
        self.witness = SGD([nn.Parameter(torch.zeros(1, device=device))], lr=0.0)

    # ---- Weights ---------------------------------------------------------------------------------------------------

    def berth(self, number: int) -> Berth:
        if number:
            raise ConfigError(
                "engine.kind: 'deepspeed' trains one network, and this model has several. Write "
                "family.expert to train one of them, or engine.kind=torch."
            )
        return Berth(self.cut.take) if self.zero.stage == 3 else super().berth(number)

    def place(self, network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        if self.zero.stage == 3:
            spread(network, self.cut, self.zero)
            inside = {id(p) for block in blocks for p in block.parameters()}
            self._outside = [p for p in network.parameters() if not p.requires_grad and id(p) not in inside]
            self._let_in = refuse_until_owned(network)
        return super().place(network, blocks)

    def alternate(self, networks: Mapping[str, nn.Module]) -> Callable[[str], None]:
        raise AssertionError("a second network was refused at its berth")

    def own(self, network: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Optimizer]:
        """Raises ConfigError for several optimizers, or one that ZeRO would change."""
        if len(optimizers) != 1:
            raise ConfigError(
                f"engine.kind: 'deepspeed' moves one optimizer, and this objective has {len(optimizers)}: "
                f"{', '.join(optimizers)}. Write engine.kind=torch."
            )
        ((name, given),) = optimizers.items()
        optimizer = ZeroOptimizer(given)
        parameters = optimizer.parameters
        self._let_in()
        # Of a replicated base it is not told: it would send the whole of it from rank 0 to the others.
        trained = network if self.zero.stage == 3 else nn.ParameterList(parameters)
        deepspeed = library(self.device)
        self.deepspeed, *_ = deepspeed.initialize(
            model=trained, optimizer=given, dist_init_required=False,
            config=self.zero.config([p.numel() for p in parameters], self.device),
        )  # fmt: skip
        inside = self.deepspeed.optimizer
        if self.zero.stage == 3:
            self.whole = Whole(parameters)
            for parameter in self._outside:
                # There through the whole forward pass: a head's weight may be read without asking the head.
                deepspeed.zero.register_external_parameter(network, parameter)
        optimizer.shares = Shares3(inside) if self.zero.stage == 3 else Shares2(inside)
        return {name: optimizer}

    # ---- A step ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The gradients' mean over processes is formed at once; `step` makes a sum of it."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.optimizer.clear_backward_seen_flag()  # these two are what its own forward would do
        self.deepspeed._backward_prologue()
        self.deepspeed.backward(self.scaler.scale(loss), scale_wrt_gas=False)

    def step(self, optimizer: Optimizer, max_norm: float) -> Stepped:
        assert isinstance(optimizer, ZeroOptimizer)
        inside = self.deepspeed.optimizer
        self.adopt()
        optimizer.hand_on()
        inside.clip_grad = max_norm
        # It divides by its loss scale: by ours, and by 1 / world, for a sum in place of its mean.
        inside.loss_scaler.cur_scale = self.scaler.get_scale() / self.world
        self.deepspeed.step()
        inside.loss_scaler.cur_scale = 1.0
        if self.whole is not None:
            self.whole.gather()
        moved = not inside.overflow
        norm = float(self.deepspeed.get_global_grad_norm())
        overflow = not moved and self.scaler.is_enabled()
        self._note(moved)
        return Stepped(norm=norm, moved=moved, overflow=overflow)

    def adopt(self) -> None:
        """Let ZeRO's own fp32 copies be what the adapters now are: they may have been loaded, or shrunk meanwhile."""
        if self.whole is not None:
            self.whole.adopt()
        self.deepspeed.optimizer.refresh_fp32_params()

    def _note(self, finite: bool) -> None:
        """Tell the loss scaler whether the gradient was finite."""
        (parameter,) = self.witness.param_groups[0]["params"]
        parameter.grad = torch.full_like(parameter, 0.0 if finite else float("inf"))
        self.scaler.unscale_(self.witness)
        self.scaler.update()

    def close(self) -> None:
        if self.deepspeed is not None:
            self.deepspeed.destroy()
        super().close()
