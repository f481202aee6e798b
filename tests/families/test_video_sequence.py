"""A video transformer whose tokens are parted among ranks: velocities and gradients are those of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.families.networks import hunyuan, hunyuan_inputs, wan, wan_inputs
from tests.multi import spawn
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.engines.recompute import recompute
from weft.engines.ring import Method, sequence_ranks
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.lean_hunyuan import make_lean
from weft.families.lean_wan import make_lean as make_lean_wan
from weft.families.wan import Wan

# Relative, of the velocity and of all gradients together: fp32 rounds at 6e-8, and sums are taken in another order.
BOUND = 2e-6

FOUR_HEADS = {"num_attention_heads": 4, "attention_head_dim": 12, "ffn_dim": 96}
Question = tuple[nn.Module, dict[str, Any]]


def text_to_video(**change: Any) -> Question:
    """18 tokens, which four ranks do not part evenly."""
    network = wan(**{**FOUR_HEADS, **change})
    return network, wan_inputs(network)


def lean_text_to_video() -> Question:
    """The same by Weft's own forward."""
    network, inputs = text_to_video()
    make_lean_wan(network)
    return network, inputs


def single_times() -> Question:
    """TI2V: the first of three frames is given, and its tokens' times are 0."""
    network, inputs = text_to_video()
    times = torch.tensor([[0.0, 700.0, 700.0], [0.0, 300.0, 300.0]]).repeat_interleave(6, 1)
    return network, {**inputs, "timestep": times}


def first_frame() -> Question:
    """Wan 2.1 I2V: further channels, and the picture's own tokens beside 512 of text."""
    network = wan(channels=36, clip=True, **FOUR_HEADS, added_kv_proj_dim=48)
    return network, {**wan_inputs(network), "encoder_hidden_states": torch.randn(2, 512, 32)}


def joint(**change: Any) -> Question:
    """HunyuanVideo: eight tokens of video and five of text, of which the second item's last two are padding."""
    network = hunyuan(**{"num_attention_heads": 4, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6), **change})
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return network, {**hunyuan_inputs(network, 2), "encoder_attention_mask": mask}


def lean_joint(mask: bool = True, **change: Any) -> Question:
    """The same by Weft's own forward; without a mask where all of the text is text."""
    network, inputs = joint(**change)
    make_lean(network)
    return network, inputs if mask else {**inputs, "encoder_attention_mask": None}


# question, backend of the adapters, method, blocks recomputed
CASES: dict[str, tuple[Callable[[], Question], str, Method, bool]] = {
    "text to video": (text_to_video, "native", "ulysses", False),
    "recomputed, PEFT": (text_to_video, "peft", "ulysses", True),
    "text to video, lean, recomputed": (lean_text_to_video, "native", "ulysses", True),
    "times of single tokens": (single_times, "native", "ulysses", True),
    "a first frame": (first_frame, "peft", "ulysses", False),
    "three heads, keys gathered": (lambda: text_to_video(num_attention_heads=3), "native", "ulysses", False),
    "three heads, a ring": (lambda: text_to_video(num_attention_heads=3), "native", "auto", True),
    "four heads, a ring": (text_to_video, "native", "ring", False),
    "joint attention": (joint, "native", "ulysses", False),
    "joint attention, recomputed, PEFT": (joint, "peft", "ulysses", True),
    "joint attention, no double blocks": (lambda: joint(num_layers=0), "native", "ulysses", False),
    "joint attention, three heads": (lambda: joint(num_attention_heads=3), "native", "auto", False),
    "joint attention, a ring": (joint, "peft", "ring", True),
    "joint attention, lean": (lean_joint, "native", "ulysses", False),
    "joint attention, lean, recomputed": (lean_joint, "native", "ulysses", True),
    "joint attention, lean, no mask, a ring": (lambda: lean_joint(mask=False), "native", "ring", True),
    "joint attention, lean, three heads": (lambda: lean_joint(num_attention_heads=3), "peft", "auto", False),
    "joint attention, lean, no double blocks": (lambda: lean_joint(num_layers=0), "native", "ulysses", False),
}


def answered(name: str, parted: bool) -> tuple[Tensor, Tensor]:
    """Velocity, and the gradient of every adapter on every linear layer and convolution, laid end to end."""
    question, backend, method, recomputed = CASES[name]
    torch.manual_seed(0)
    network, inputs = question()
    paths = list(layers_of(network))
    adapters = Lora(rank=2, conv_rank=2, backend=backend).attach(network, paths, ["default"], 0)  # type: ignore[arg-type]
    adapters.initialize()
    parameters = adapters.parameters("default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    family = HunyuanVideo(source="none") if "joint" in name else Wan(source="none")
    if parted:
        family.divide(network, group_of(method))
    if recomputed:
        for block in family.blocks(network):
            recompute(block, None, None)
    with adapters.use("default"):
        velocity = network(**inputs)[0]
        weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
        (velocity * weights).sum().backward()
    empty = [key for key, parameter in parameters.items() if parameter.grad is None]
    assert not empty, f"no gradient for {empty}"
    return velocity.detach(), torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])


def group_of(method: Method) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    return sequence_ranks(dist.group.WORLD, method)


def all_answers() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: answered(name, parted=True) for name in CASES}


@pytest.fixture(scope="module")
def truth() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: answered(name, parted=False) for name in CASES}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_part_the_tokens_answer_and_learn_as_one_process(world: int, truth: dict[str, Any]):
    results = spawn(world, all_answers)
    errors = {}
    for name, (velocity, gradient) in truth.items():
        of_velocity = max(float((each[name][0] - velocity).norm() / velocity.norm()) for each in results)
        summed = torch.stack([each[name][1] for each in results]).sum(0)
        errors[name] = of_velocity, float((summed - gradient).norm() / gradient.norm())
    assert max(max(pair) for pair in errors.values()) < BOUND, errors


def test_a_processor_keeps_the_backend_that_was_chosen_before_or_after():
    network: Any = text_to_video()[0]
    network.set_attention_backend("_native_math")
    Wan(source="none").divide(network, _Two())  # type: ignore[arg-type]  # nobody is asked
    processor = network.get_submodule("blocks.0.attn1").processor
    assert processor._attention_backend == "_native_math"
    network.set_attention_backend("native")
    assert processor._attention_backend == "native"


class _Two:
    """The first of two ranks, for what can be seen without the other."""

    rank, size = 0, 2
