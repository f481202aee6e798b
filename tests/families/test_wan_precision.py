"""Half precision where it is enough, fp32 where it is not: times, modulation, norms, and the residual under fp16."""

from copy import deepcopy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.testing import assert_close

from weft.contracts import Denoise
from weft.families.precision import keep_fp32
from weft.families.wan import Wan
from weft.families.wan_network import keeps_fp32
from weft.families.weights import HERE
from weft.math.flow import network_timestep


@pytest.fixture
def question() -> Denoise:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 2, 4, 4, generator=chance)
    return Denoise(x, torch.tensor([0.8333, 0.1]), {"text": torch.randn(2, 5, 128, generator=chance)})


@pytest.fixture
def plain_network(folder) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / "transformer")


@torch.no_grad()
def answered(family: Wan, network: nn.Module, question: Denoise, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return family.forward(network, question).float()


@torch.no_grad()
def test_the_time_embedding_stays_fp32_under_bf16_autocast(wan, plain_network):
    """In bf16 T = 833.3 and 833.9 are one number; the small steps between them are learned from."""
    timestep, text = torch.tensor([833.3]), torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0))
    exact = plain_network.condition_embedder(timestep, text)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        ours = wan.load("bf16", "default", HERE).condition_embedder(timestep, text.bfloat16())[:2]
        without = plain_network.to(torch.bfloat16).condition_embedder(timestep.bfloat16(), text.bfloat16())[:2]
    for kept, expected, lost in zip(ours, exact, without, strict=True):  # the embedding, and its projection
        assert kept.dtype == torch.float32
        assert torch.equal(kept, expected)
        assert (lost.float() - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_module_kept_in_fp32_takes_half_precision_and_answers_as_in_fp32():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(4, 16).bfloat16()
    exact = layer(x.float())
    keep_fp32(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        assert torch.equal(layer(input=x), exact)
        copied = deepcopy(layer)
        copied.bias.zero_()
        assert_close(copied(x), exact - layer.bias)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_diffusers_keeps_in_fp32_is_kept_and_linears_in_blocks_are_not(wan, folder, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    ours = dict(wan.load(precision, "default", HERE).named_parameters())
    wide = {name for name, parameter in ours.items() if parameter.dtype == torch.float32}
    assert {name for name, parameter in theirs.named_parameters() if parameter.dtype == torch.float32} <= wide
    assert wide == {name for name in ours if keeps_fp32(name)}
    assert {name.split(".")[2] for name in ours if name.startswith("blocks.") and name not in wide} == {
        "attn1", "attn2", "ffn",
    }  # fmt: skip


def test_sigma_and_time_are_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert network_timestep(torch.tensor([0.8333])).dtype == torch.float32


@pytest.fixture
def overflowing(own, plain_network) -> str:
    """A model whose residual reaches 80,000 in its first block, by two summands of 40,000: fp16 ends at 65,504."""
    with torch.no_grad():
        channels = torch.linspace(-40_000, 40_000, 24)
        plain_network.patch_embedding.bias.copy_(channels)
        plain_network.patch_embedding.weight.mul_(5_000)  # so that tokens differ
        block = plain_network.blocks[0]
        block.ffn.net[2].bias.copy_(channels)
        block.scale_shift_table[:, 5] = 1.0  # gate of the ffn, beside what the time adds
        plain_network.condition_embedder.time_proj.weight.zero_()
        plain_network.condition_embedder.time_proj.bias.zero_()
    plain_network.save_pretrained(own / "transformer")
    return str(own)


def test_a_residual_beyond_fp16_stays_finite_and_equals_fp32(overflowing, question):
    family = Wan(source=overflowing)
    exact = answered(family, family.load("fp32", "default", HERE), question, torch.float32)
    ours = answered(family, family.load("fp16", "default", HERE), question, torch.float16)
    assert ours.isfinite().all()
    # Embeddings are rounded to a part in 2^11, of what is then normed and multiplied in fp16.
    assert_close(ours, exact, rtol=0, atol=0.01 * float(exact.abs().max()))
    plain = WanTransformer3DModel.from_pretrained(f"{overflowing}/transformer", torch_dtype=torch.float16)
    assert not answered(family, plain, question, torch.float16).isfinite().all()


@pytest.mark.parametrize(("dtype", "residual"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_residual_is_fp32_under_fp16_and_half_as_large_under_bf16(wan, question, dtype, residual):
    network = wan.load({torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype], "default", HERE)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    answered(wan, network, question, dtype)
    assert seen == [residual] * 2


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [
    ("bf16", torch.bfloat16, 0.03), ("fp16", torch.float16, 0.005),
])  # fmt: skip
def test_half_precision_answers_as_fp32_to_its_own_rounding(wan, question, precision, dtype, tolerance):
    exact = answered(wan, wan.load("fp32", "default", HERE), question, torch.float32)
    ours = answered(wan, wan.load(precision, "default", HERE), question, dtype)
    assert (ours - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_packed_weights_answer_nearly_as_they_were(folder, question, storage):
    """A block of 64 numbers loses at most a part in 2^4 (fp8) or 2 * 127 (int8) of its largest."""
    plain = Wan(source=str(folder))
    exact = answered(plain, plain.load("fp32", "default", HERE), question, torch.float32)
    family = Wan(source=str(folder), dtype=storage)
    assert family.weight_dtype("fp32") == "fp32"
    network = family.load("fp32", "default", HERE)
    packed = answered(family, network, question, torch.float32)
    difference = (packed - exact).abs().max() / exact.abs().max()
    assert 0 < difference < 0.1
    assert sum(family.weight_bytes("fp32").values()) == sum(
        t.nbytes for t in [*network.parameters(), *network.buffers()]
    )


def test_gradients_reach_the_input_of_the_network_through_the_fp32_parts(wan, question):
    """Under recomputation and under fp16, an adapter in the first block learns from what the last one says."""
    network = wan.load("fp16", "default", HERE)
    x = question.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        wan.forward(network, Denoise(x, question.t, question.cond)).float().square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0
