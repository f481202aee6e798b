"""Two networks that take turns on the device: right answers, one of them there, and nothing copied back."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from weft.engines.residency import PARCEL, Residence, frozen_by_block, parcelled, together
from weft.engines.single_device import SingleEngine
from weft.engines.streaming import Turns

CPU = torch.device("cpu")
ROWS = 16


class Residual(nn.Module):
    """A frozen block with a trained bias, which stands for an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(ROWS, ROWS).requires_grad_(False)
        self.adapter = nn.Parameter(torch.randn(ROWS))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) * self.adapter)


def network(seed: int, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(ROWS, ROWS).requires_grad_(False), *[Residual() for _ in range(layers)])


def placed(engine: SingleEngine) -> tuple[dict[str, nn.Module], Callable[[str], None]]:
    """Two experts, read into their berths and placed."""
    networks: dict[str, nn.Module] = {}
    for number, name in enumerate(("high", "low")):
        made, put = network(number), engine.berth(number).put
        blocks = list(made)[1:]
        for block, tensors in frozen_by_block(made, blocks).items():
            for tensor in tensors:
                tensor.data = put(tensor.data, block, len(blocks))
        networks[name] = engine.place(made, blocks)
    return networks, engine.alternate(networks)


def answers(networks: dict[str, nn.Module], ready: Callable[[str], None]) -> list[Tensor]:
    """Outputs and gradients of several questions to either."""
    x = torch.linspace(-1, 1, 3 * ROWS).view(3, ROWS)
    found = []
    for name in ("high", "low", "low", "high", "low"):
        ready(name)
        output = networks[name](x)
        output.square().sum().backward()
        found += [output.detach(), *[p.grad.clone() for p in networks[name].parameters() if p.grad is not None]]
    return found


@pytest.mark.parametrize("residence", [
    Residence(experts="one"),
    Residence(experts="one", recompute=True),
    Residence(experts="one", recompute=True, stream_blocks=3, offload_inputs=True),
    Residence(experts="together", recompute=True, stream_blocks=3),
    Residence(experts="auto"),
])  # fmt: skip
def test_experts_answer_the_same_wherever_they_wait(residence):
    expected = answers({"high": network(0), "low": network(1)}, lambda name: None)
    found = answers(*placed(SingleEngine(CPU, "fp32", residence)))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_of_one_the_device_holds_the_weights_of_the_expert_that_was_asked_last():
    networks, ready = placed(SingleEngine(CPU, "fp32", Residence(experts="one")))
    assert isinstance(ready, Turns)
    hosts = {p.host.untyped_storage().data_ptr() for own in ready.parcels.values() for p in own}
    for name, other in (("high", "low"), ("low", "high")):
        ready(name)
        on_device = {
            n: [t.untyped_storage().data_ptr() not in hosts for t in frozen_by_block(m, ())[None]]
            for n, m in networks.items()
        }
        assert all(on_device[name]) and not any(on_device[other])


def test_a_turn_copies_one_network_to_the_device_and_nothing_back():
    _, ready = placed(SingleEngine(CPU, "fp32", Residence(experts="one")))
    assert isinstance(ready, Turns)
    one = sum(p.bytes for p in ready.parcels["high"])
    hosts = [parcel.host.clone() for own in ready.parcels.values() for parcel in own]

    def copied() -> int:
        return sum(ring.copied for ring in ready.rings)

    seen = [copied()]
    for name in ("high", "low", "low", "high"):
        ready(name)
        seen.append(copied())
    assert [after - before for before, after in pairwise(seen)] == [0, one, 0, one]
    assert all(torch.equal(p.host, h) for p, h in zip(
        (p for own in ready.parcels.values() for p in own), hosts, strict=True))  # fmt: skip


def test_what_is_trained_stays_where_it_is_when_turns_change():
    networks, ready = placed(SingleEngine(CPU, "fp32", Residence(experts="one")))
    trained = [p for m in networks.values() for p in m.parameters() if p.requires_grad]
    before = [p.data_ptr() for p in trained]
    answers(networks, ready)
    assert [p.data_ptr() for p in trained] == before


def test_a_gradient_that_waits_for_an_expert_that_left_is_refused_not_wrong():
    networks, ready = placed(SingleEngine(CPU, "fp32", Residence(experts="one")))
    ready("high")
    waiting = networks["high"](torch.ones(1, ROWS)).sum()
    ready("low")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.backward()


def test_a_network_stays_whole_when_the_one_that_it_shared_turns_with_is_gone():
    """Samples bring a second expert for a while; afterwards training goes on with the first alone."""
    networks, ready = placed(SingleEngine(CPU, "fp32", Residence(experts="one")))
    expected = network(0)(torch.ones(1, ROWS))
    ready("low")
    ready("high")
    high = networks["high"]
    networks.clear()
    del ready
    assert torch.equal(high(torch.ones(1, ROWS)), expected)


def test_auto_keeps_experts_together_while_they_leave_half_of_the_device_to_the_rest():
    gib = 2**30
    assert together("auto", 20 * gib, 40 * gib)
    assert not together("auto", 20 * gib + 1, 40 * gib)
    assert together("auto", 20 * gib, None)
    assert together("together", 90 * gib, 40 * gib) and not together("one", 1, 40 * gib)


def test_networks_are_packed_in_parcels_that_hold_everything_once(monkeypatch):
    monkeypatch.setattr("weft.engines.residency.PARCEL", 3 * ROWS * ROWS * 4)
    assert PARCEL == 2**28
    made = network(0, layers=6)
    tensors = frozen_by_block(made, ())[None]
    wanted = [t.clone() for t in tensors]
    parcels = parcelled(tensors, pinned=False)
    assert len(parcels) == 3
    assert [id(t) for p in parcels for t in p.tensors] == [id(t) for t in tensors]
    assert all(torch.equal(t, w) for t, w in zip(tensors, wanted, strict=True))
