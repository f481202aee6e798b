"""Parcels of frozen weights and the ring of slots that they pass through, by themselves."""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from weft.engines import transfer
from weft.engines.residency import Parcel, Ring, frozen_by_block

CPU = torch.device("cpu")


class Codes(nn.Module):
    """A frozen layer of several small types, as quantized layers are."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 5), value, dtype=torch.int8), requires_grad=False)
        self.register_buffer("codes", torch.full((7, 3), value / 8).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.full((2,), float(value)))
        self.scalar = nn.Parameter(torch.tensor(value, dtype=torch.bfloat16), requires_grad=False)


def parcels_of(modules: Sequence[nn.Module]) -> Iterator[Parcel]:
    for module in modules:
        yield Parcel(frozen_by_block(module, ())[None], pinned=False)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_codes_scales_and_scalars_of_any_type_travel_bit_by_bit():
    modules = [Codes(value) for value in (1, 2, 3)]
    wanted = [copy.deepcopy(module.state_dict()) for module in modules]
    parcels = list(parcels_of(modules))
    ring = Ring(CPU, 2)
    ring.make_room(parcels)
    for parcel, following in ((0, 1), (1, 2), (2, 0), (0, None), (2, None)):
        ring.enter(parcels[parcel], None if following is None else parcels[following])
        inside = {slot.memory.untyped_storage().data_ptr() for slot in ring.slots}
        assert all(t.untyped_storage().data_ptr() in inside for t in parcels[parcel].tensors)
        for module, state in zip(modules, wanted, strict=True):
            for name, tensor in module.state_dict().items():
                assert tensor.dtype == state[name].dtype
                assert torch.equal(bits(tensor), bits(state[name])), name


def test_autograd_finds_out_that_a_weight_it_kept_has_left_the_ring():
    layers = [nn.Linear(3, 3).requires_grad_(False) for _ in range(2)]
    parcels = list(parcels_of(layers))
    ring = Ring(CPU, 1)
    ring.make_room(parcels)
    ring.enter(parcels[0])
    answer = layers[0](torch.randn(2, 3, requires_grad=True))
    ring.enter(parcels[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("seed", range(4))
def test_no_delay_of_either_stream_gives_a_block_the_weights_of_another(seed):
    """Whoever does not wait for a stream that is kept busy for milliseconds reads what was in the slot before."""
    device, chance = torch.device("cuda"), torch.Generator().manual_seed(seed)
    layers = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(5)]
    wanted = [layer.weight.to(device).sum() for layer in layers]
    parcels = [Parcel([layer.weight], pinned=True) for layer in layers]
    ring = Ring(device, 2)
    ring.make_room(parcels)
    found = []
    for turn in range(20):
        number = turn % 5
        with torch.cuda.stream(ring._side if seed % 2 else torch.cuda.current_stream()):
            torch.cuda._sleep(int(torch.randint(1, 10_000_000, (1,), generator=chance)))
        ring.enter(parcels[number], parcels[(number + 1) % 5])
        found.append(layers[number].weight.sum())
    assert all(torch.equal(total, wanted[turn % 5]) for turn, total in enumerate(found))


def test_verified_streaming_finds_and_mends_a_wrong_copy(monkeypatch):
    elsewhere = torch.device("cpu", 0)  # to torch another device than the cpu, so that a copy is made
    layers = [nn.Linear(64, 64).requires_grad_(False) for _ in range(3)]
    wanted = [layer.weight.clone() for layer in layers]
    routes = (transfer.Route("zeros", lambda t, d: torch.zeros_like(t)), *transfer.routes())
    monkeypatch.setattr(transfer, "routes", lambda: routes)
    parcels = list(parcels_of(layers))
    ring = Ring(elsewhere, 2, verified=True)
    ring.make_room(parcels)
    with pytest.warns(UserWarning, match="by zeros"):
        for parcel, layer, weight in zip(parcels, layers, wanted, strict=True):
            ring.enter(parcel)
            assert torch.equal(layer.weight, weight)
