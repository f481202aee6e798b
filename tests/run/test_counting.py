"""Counts of kernels and bytes, against sums done by hand."""

import torch
from torch import Tensor

from weft.run.counting import counted, counted_pass


def test_a_sum_reads_both_and_writes_one_and_what_is_broadcast_counts_once():
    x, row = torch.randn(8, 4), torch.randn(4)
    traffic = counted(lambda: x + row.expand(8, 4))
    assert (traffic.operations, traffic.views, traffic.pointwise) == (1, 1, 4 * (32 + 4 + 32))


def test_what_is_written_into_is_not_read_and_what_is_changed_in_place_is():
    x, out = torch.randn(8), torch.empty(8)
    assert counted(lambda: torch.mul(x, x, out=out)).pointwise == 4 * 24
    assert counted(lambda: x.mul_(2.0)).pointwise == 4 * 16


def test_products_and_waits_for_the_host_are_counted_apart():
    x = torch.randn(8, 8)
    traffic = counted(lambda: (x @ x).sum().item())
    assert (traffic.products, traffic.syncs) == (4 * 64 * 3, 1)
    assert traffic.names["mm"] == 1


def test_memory_that_is_kept_counts_once_and_weights_do_not():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward() -> Tensor:
        h = x @ weight  # keeps x and the weight
        return h * h.view(4, 8).view(8, 4)  # keeps h, twice

    found = counted_pass(forward, [weight])
    assert found.saved == 4 * (32 + 32)
    assert found.backward.names["mm"] == 2
