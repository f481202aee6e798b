"""Attention by policy while a run is at work, and the account of which kernels really ran."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from weft.contracts import ModelFamily
from weft.engines.attention_order import chip_of, in_order
from weft.events import Listener, Notice
from weft.families.causal_lm import CausalLM
from weft.families.video_model import VideoModel
from weft.math.joint_attention import Ragged
from weft.math.sdpa import KERNELS
from weft.math.sdpa_policy import Policy, policy_for
from weft.math.tiled import TILED

# Ends of the names that autograd gives the backward passes of attention, and what runs there.
NODES = {
    "ScaledDotProductCudnnAttentionBackward": "cudnn",
    "ScaledDotProductFlashAttentionBackward": "flash",
    "ScaledDotProductFlashAttentionForCpuBackward": "cpu-flash",
    "ScaledDotProductEfficientAttentionBackward": "efficient",
    "ScaledDotProductFusedAttentionOverrideableBackward": "overrideable",
}
COMPILED = "CompiledFunctionBackward"
OURS = (*KERNELS.values(), TILED)


def policy_of(family: ModelFamily, device: torch.device) -> Policy:
    """What `family.attention` comes to on a device. Raises ConfigError for a kernel that is the wrong one there."""
    return policy_for(chip_of(device), choice_of(family))


def choice_of(family: ModelFamily) -> str:
    """What a config says of torch's own attention; auto where it is another library's, or a family of a plug-in."""
    if isinstance(family, VideoModel):
        return family.attention
    if isinstance(family, CausalLM) and family.kernels.attention == "sdpa":
        return "sdpa"
    return "auto"


@contextmanager
def attending(family: ModelFamily, device: torch.device) -> Iterator[Policy]:
    """Inside, torch's attention goes by the policy of this chip and the config. Raises ConfigError."""
    policy = policy_of(family, device)
    with in_order(policy):
        yield policy


class Used:
    """Tells once for each shape of a micro-batch which attention ran, read from the graph that its backward pass will
    follow: no kernel is asked a second time, and nothing is waited for."""

    def __init__(self, tell: Listener, policy: Policy) -> None:
        self._tell, self._policy = tell, policy
        self._seen: set[tuple[int, ...] | None] = set()

    def note(self, shape: tuple[int, ...] | None, loss: Tensor) -> None:
        if shape in self._seen:
            return
        self._seen.add(shape)
        found = kernels_in(loss)
        if not found:
            return
        counts = ", ".join(f"{name} in {count} calls" for name, count in sorted(found.items()))
        order = f"; order {', '.join(self._policy.order)}" if self._policy.order else ""
        said = f"Attention on micro-batches {list(shape or ())}: {counts} ({self._policy.because}{order})."
        self._tell(Notice(text=said))


def kernels_in(loss: Tensor) -> dict[str, int]:
    """How often each fused attention will be asked for its gradient; of compiled blocks how many there are, for they do
    not say what is in them."""
    found: dict[str, int] = {}
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [above for above, _ in node.next_functions]
        name = kernel_at(node)
        if name is not None:
            found[name] = found.get(name, 0) + 1
    return found


def kernel_at(node: Any) -> str | None:
    """The attention behind a node of autograd's graph: torch's own, or that of a function of ours which names it."""
    name = str(node.name())
    own = name.rstrip("0123456789")
    if own in NODES:
        version = torch.nn.attention.current_flash_attention_impl() if NODES[own] == "flash" else None
        return NODES[own] if version is None else f"{NODES[own]} ({version})"
    if own == COMPILED:
        return "compiled blocks"
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return None
    held = [vars(node).get("kernel"), *(vars(node).get("kernels") or ())]
    inner = [kernel.kernel if isinstance(kernel, Ragged) else kernel for kernel in held]
    return next((kernel.name for kernel in inner for known in OURS if kernel is known), None)
