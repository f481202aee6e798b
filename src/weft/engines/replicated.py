"""Data parallelism with a whole copy of the weights in each process: gradients are summed before a step."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.contracts import Berth
from weft.engines.gradients import sum_over_processes
from weft.engines.processes import Together
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine


class ReplicatedEngine(SingleEngine):
    """A device of its own in each process. No module is wrapped: adapters are small beside their base, so that one flat
    all-reduce of their gradients in each step costs less than buckets and hooks would.

    broadcast: rank 0 reads the weights and sends them to the others.
    """

    processes: Together

    def __init__(
        self, device: torch.device, precision: str, residence: Residence, processes: Together, broadcast: bool = False
    ) -> None:
        super().__init__(device, precision, residence, processes)
        self.broadcast = broadcast
        self.sent = 0  # bytes of gradients so far

    def berth(self, number: int) -> Berth:
        berth = super().berth(number)
        return Berth(berth.put, self.processes.read_by_first) if self.broadcast else berth

    def gradient(self, optimizer: Optimizer) -> tuple[list[Tensor], Tensor]:
        # All that follows is computed from the same bits in every process, and comes out the same.
        self.sent += sum_over_processes(optimizer)
        return super().gradient(optimizer)
