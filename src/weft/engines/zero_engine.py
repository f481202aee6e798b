"""DeepSpeed's ZeRO behind the engine's contract: one network, gradients summed over all processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.contracts import Berth, Stepped
from weft.engines.processes import Together
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.engines.zero_optimizer import ZeroOptimizer
from weft.engines.zero_setup import Zero, library
from weft.engines.zero_weights import Cut, Gathering, refuse_until_owned, spread
from weft.errors import ConfigError


class ZeroEngine(SingleEngine):
    """ZeRO-2 or ZeRO-3. DeepSpeed has the backward pass's sums, the clipping and the optimizers' steps; precision, loss
    scaling and the guard of each step are as on one device. Private names of DeepSpeed are those of 0.19.

    Each optimizer has an engine of DeepSpeed's for itself, which knows of its own parameters alone (ZeRO-2); under
    ZeRO-3 the base has DeepSpeed's gathering of weights besides. DeepSpeed's own ZeRO-3 optimizer would have all
    adapters in one: there a step of one role is a step of all, with zeros for gradients.
    """

    processes: Together

    def __init__(
        self, device: torch.device, precision: str, residence: Residence, processes: Together, zero: Zero
    ) -> None:
        super().__init__(device, precision, residence, processes)
        self.can = frozenset({"roles"})
        self.zero = zero
        self.cut = Cut(self.rank, self.world, device)
        self.owned: dict[str, ZeroOptimizer] = {}  # each moved by an engine of DeepSpeed's
        self.gathering: Gathering | None = None
        self._outside: list[nn.Parameter] = []  # frozen, of no block
        self._let_in: Callable[[], None] = lambda: None

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
        """Raises ConfigError for an optimizer that ZeRO would change."""
        self.owned = {name: ZeroOptimizer(given) for name, given in optimizers.items()}
        self._let_in()
        if self.zero.stage == 3:
            self.gathering = Gathering(network, self._outside, self.zero, self.device)
        deepspeed = library(self.device)
        for optimizer in self.owned.values():
            # Of the base it is not told: it would send the whole of it from rank 0 to the others.
            engine, *_ = deepspeed.initialize(
                model=nn.ParameterList(optimizer.parameters), optimizer=optimizer.inner, dist_init_required=False,
                config=self.zero.config([p.numel() for p in optimizer.parameters], self.device),
            )  # fmt: skip
            optimizer.taken_over(engine)
        return dict(self.owned)

    # ---- A step ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool, optimizers: Sequence[str] = ()) -> None:
        """The gradients' mean over processes is formed at once; `step` makes a sum of it."""
        with ExitStack() as stack:
            for name in optimizers or self.owned:
                stack.enter_context(reducing(self.owned[name].deepspeed, last))
            self.scaler.scale(loss).backward()
        if self.gathering is not None:
            self.gathering.after_backward()

    def step(self, optimizer: Optimizer, max_norm: float) -> Stepped:
        assert isinstance(optimizer, ZeroOptimizer)
        engine = optimizer.deepspeed
        inside = engine.optimizer
        # ZeRO's own fp32 copies become what the adapters now are: they may have been loaded, or shrunk meanwhile.
        inside.refresh_fp32_params()
        optimizer.hand_on()
        inside.clip_grad = max_norm
        # It divides by its loss scale: by ours, and by 1 / world, for a sum in place of its mean.
        inside.loss_scaler.cur_scale = self.scaler.get_scale() / self.world
        engine.step()
        inside.loss_scaler.cur_scale = 1.0
        if self.gathering is not None:
            self.gathering.after_step()
        moved = not inside.overflow
        stepped = Stepped(
            torch.tensor(float(engine.get_global_grad_norm()), device=self.device),
            torch.tensor(moved, device=self.device), self.scaler.is_enabled(),
        )  # fmt: skip
        self.note(stepped.moved)
        return stepped

    def close(self) -> None:
        for optimizer in self.owned.values():
            if optimizer.deepspeed is not None:  # what failed before it was taken over is to be told, and not this
                optimizer.deepspeed.destroy()
        if self.gathering is not None:
            self.gathering.end()
        super().close()


@contextmanager
def reducing(engine: Any, last: bool) -> Iterator[None]:
    """Let an engine of DeepSpeed's spread the gradients of the backward pass inside; last: of a step."""
    engine.set_gradient_accumulation_boundary(last)
    engine.optimizer.clear_backward_seen_flag()  # these two are what its own forward would do
    engine._backward_prologue()
    engine._running_engine_backward = True  # else a hook would end it as well
    try:
        yield
        engine._backward_epilogue()
    finally:
        engine._running_engine_backward = False
