"""The order of attention kernels holds while a run is at work, and not after."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from weft.engines.attention_order import chip_of, in_order, is_installed
from weft.math.sdpa import backend_of
from weft.math.sdpa_policy import Chip, Policy


def test_inside_torch_goes_by_the_policy_on_every_thread_and_outside_by_its_own() -> None:
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    before = torch._C._get_sdp_priority_order()
    with in_order(Policy(("math",), "asked for")):
        assert backend_of(q, q, q) == "math"
        heard = []
        # Autograd's threads recompute blocks: the order must be theirs too.
        y = scaled_dot_product_attention(q, q, q)
        y.register_hook(lambda grad: heard.append(backend_of(q, q, q)))
        y.sum().backward()
        assert heard == ["math"]
    assert backend_of(q, q, q) == "cpu-flash"
    with in_order(Policy(("cudnn", "flash", "efficient", "math"), "Hopper")):
        assert torch._C._get_sdp_priority_order()[:4] == [3, 1, 2, 0]
    assert torch._C._get_sdp_priority_order() == before


def test_a_policy_without_an_order_changes_nothing() -> None:
    before = torch._C._get_sdp_priority_order()
    with in_order(Policy((), "torch's own choice")):
        assert torch._C._get_sdp_priority_order() == before and torch.backends.cuda.flash_sdp_enabled()


def test_a_chip_without_cuda_is_its_kind() -> None:
    assert chip_of(torch.device("cpu")) == Chip("cpu")
    assert is_installed("torch.nn") and not is_installed("no_such_package.inside")
