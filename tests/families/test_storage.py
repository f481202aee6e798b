"""Frozen linear layers in 8 and 4 bits: how near they are, what they keep for the backward pass, who can use them."""

import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.families import networks
from weft.adapters.lora import Lora
from weft.adapters.modules import linears_of
from weft.errors import ModelError
from weft.families.storage import (
    PACKINGS,
    Float8,
    Packed,
    PackedLinear,
    check_storage,
    encoded,
    packable,
    storage_of,
)

STORAGES = ["fp8", "int8", "nf4"]
# The sixteen levels of NF4: arXiv:2305.14314, appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def weight(out: int = 48, fan_in: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(out, fan_in, generator=torch.Generator().manual_seed(seed))


def packed(storage: str, w: Tensor, bias: bool = True, dtype: torch.dtype = torch.float32) -> PackedLinear:
    codes, scale = encoded(PACKINGS[storage], w)
    b = torch.linspace(-1, 1, len(w)) if bias else None
    return PackedLinear(Packed(codes, scale, (w.shape[0], w.shape[1]), PACKINGS[storage]), b, dtype)


def peaks(w: Tensor) -> Tensor:
    """The largest magnitude of each block of 64, for each number."""
    return w.view(len(w), -1, 64).abs().amax(2, keepdim=True).expand(len(w), -1, 64).reshape(w.shape)


def test_fp8_is_off_by_half_a_unit_of_its_last_place():
    """e4m3 has 3 bits behind the point: 2^-4 of the number; and below 2^-6, where places end, 2^-10, in units of the
    scale, which is the block's largest number / 448."""
    w = weight()
    scale = peaks(w) / 448
    error = (packed("fp8", w).weight - w).abs()
    assert (error <= torch.maximum(w.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()
    assert error.max() > 0


def test_int8_is_off_by_half_a_step():
    w = weight()
    assert ((packed("int8", w).weight - w).abs() <= peaks(w) / 127 / 2 * (1 + 1e-5)).all()


def test_nf4_takes_the_nearest_of_its_sixteen_levels():
    """The second way: level by level, without the package's kernels."""
    w = weight()
    levels = (w / peaks(w)).unsqueeze(-1) - NF4
    nearest = NF4[levels.abs().argmin(-1)] * peaks(w)
    assert_close(packed("nf4", w).weight, nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fan_in", [32, 96, 100])
def test_blocks_of_nf4_run_over_the_ends_of_rows(fan_in):
    w = weight(fan_in=fan_in)
    flat = w.flatten()
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 64)]).view(-1, 64)
    peak = flat.abs().amax(1, keepdim=True)
    nearest = NF4[((flat / peak).unsqueeze(-1) - NF4).abs().argmin(-1)] * peak
    assert_close(packed("nf4", w).weight, nearest.flatten()[: w.numel()].view(w.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_row_that_64_does_not_divide_has_one_scale(storage):
    w = weight(fan_in=100)
    layer = packed(storage, w)
    assert layer.scale.shape == (48, 1)
    top = {"fp8": 448.0, "int8": 127.0}[storage]
    assert_close(layer.scale, w.abs().amax(1, keepdim=True) / top)


@pytest.mark.parametrize("storage", STORAGES)
def test_zeros_stay_zeros(storage):
    w = weight()
    w[3:5] = 0
    assert torch.equal(packed(storage, w).weight[3:5], torch.zeros(2, 128))


def test_a_large_weight_is_encoded_some_rows_at_a_time_with_the_same_result(monkeypatch):
    w = weight(out=50)
    for storage in STORAGES:
        whole = encoded(PACKINGS[storage], w)
        monkeypatch.setattr("weft.families.storage.CHUNK", 128 * 7)
        in_parts = encoded(PACKINGS[storage], w)
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(whole, in_parts, strict=True)), storage


@pytest.mark.parametrize("storage", STORAGES)
def test_the_layer_and_its_gradient_are_those_of_its_decoded_weight(storage):
    layer = packed(storage, weight())
    plain = nn.Linear(128, 48)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(3, 5, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert_close(layer(x), plain(x))
    assert_close(gradient, wanted)


@pytest.mark.parametrize("storage", STORAGES)
def test_autograd_keeps_the_codes_and_never_the_decoded_weight(storage):
    layer = packed(storage, weight(out=96))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 128, requires_grad=True)).sum()
    own = {layer.codes.untyped_storage().data_ptr(), layer.scale.untyped_storage().data_ptr()}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_own_dtype(storage, dtype):
    layer = packed(storage, weight())
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == torch.float32
    wanted = layer.decode(dtype).float().sum(0).expand(4, -1)
    assert_close(x.grad, wanted, rtol=0.02, atol=0.1)  # sums of 48 numbers in half precision


@pytest.mark.parametrize("storage", STORAGES)
def test_recomputation_gives_the_same_gradient(storage):
    layer = packed(storage, weight())
    x = torch.randn(4, 128, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_a_gradient_of_a_gradient_goes_through():
    layer = packed("int8", weight())
    x = torch.randn(4, 128, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    w, y = layer.weight, layer(x)
    assert_close(second, (6 * y * (torch.ones(4, 128) @ w.T)) @ w, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("storage", STORAGES)
def test_shapes_alone_go_through_it(storage):
    with FakeTensorMode():
        layer = packed(storage, torch.empty(48, 128))
        x = torch.empty(2, 128, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.shape == (2, 48) and y.dtype == torch.bfloat16 and x.grad is not None


@pytest.mark.parametrize("storage", STORAGES)
def test_it_survives_a_move_a_cast_and_a_state_dict(storage):
    layer = packed(storage, weight(), dtype=torch.bfloat16)
    codes = layer.codes.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, codes) and not any(p.requires_grad for p in layer.parameters())
    other = packed(storage, weight(seed=1), dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight) and other.weight.dtype == torch.bfloat16


def small(storage: str) -> WanTransformer3DModel:
    """A transformer whose blocks' linear layers are packed in place."""
    network = networks.wan()
    for path, linear in packable(network, list(network.blocks)).items():
        parent, _, child = path.rpartition(".")
        layer = packed(storage, linear.weight)
        layer.bias = linear.bias
        setattr(network.get_submodule(parent), child, layer)
    return network


def test_only_linear_layers_inside_blocks_are_packed_and_no_modulation():
    wan = networks.wan(channels=36, clip=True)
    paths = set(packable(wan, list(wan.blocks)))
    assert len(paths) == 12 * 2
    assert not any(word in path for path in paths for word in ("embed", "norm", "proj_out", "time_proj"))
    hunyuan = networks.hunyuan()
    blocks = [*hunyuan.transformer_blocks, *hunyuan.single_transformer_blocks]
    # 12 in each double block: 8 of attention, 4 of two MLPs; 5 in each single block. Modulation: norm*.linear.
    assert len(packable(hunyuan, blocks)) == 2 * 12 + 2 * 5
    assert not any("norm" in path or "context_embedder" in path for path in packable(hunyuan, blocks))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", ["native", "peft"])
def test_adapters_learn_on_packed_layers_as_on_their_decoded_weights(storage, backend):
    gradients = []
    for decode in (False, True):
        network = small(storage)
        if decode:
            plain = networks.wan()
            for path, layer in network.named_modules():
                if isinstance(layer, PackedLinear):
                    plain.get_submodule(path).weight.data.copy_(layer.weight)
            network = plain
        paths = [path for path in linears_of(network) if path.startswith("blocks.")]
        assert len(paths) == 20
        adapters = Lora(rank=4, backend=backend).attach(network, paths, ["default"], seed=3)
        adapters.initialize()
        parameters = adapters.parameters("default")
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        with adapters.use("default"):
            network(**networks.wan_inputs(network))[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 20
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_scales_of_a_file_are_kept_as_they_are():
    """One scale for the whole tensor: ComfyUI's scaled fp8. One for each row is another program's."""
    w = weight()
    for scale in (torch.tensor([[0.5]]), torch.full((48, 1), 0.25)):
        codes = (w / scale).to(torch.float8_e4m3fn)
        layer = PackedLinear(Packed(codes.view(torch.uint8), scale, (48, 128), Float8()), None, torch.float32)
        assert torch.equal(layer.weight, codes.float() * scale)
    codes = w.to(torch.float8_e5m2)
    e5m2 = Packed(codes.view(torch.uint8), torch.ones(1, 1), (48, 128), Float8(torch.float8_e5m2))
    layer = PackedLinear(e5m2, None, torch.float32)
    assert torch.equal(layer.weight, codes.float())


def test_auto_keeps_an_fp8_file_in_fp8_and_else_takes_the_engines_precision():
    assert storage_of("auto", "bf16", "fp8 scaled") == ("bf16", "fp8")
    assert storage_of("auto", "fp16", "bf16") == ("fp16", "plain")
    assert storage_of("nf4", "bf16", "fp32") == ("bf16", "nf4")
    assert storage_of("bf16", "bf16", "fp8") == ("bf16", "plain")


def test_nf4_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("weft.families.storage.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"nf4 needs the package bitsandbytes.*weft\[quantized\].*dtype=fp8"):
        check_storage("nf4")
