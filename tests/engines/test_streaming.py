"""Streamed blocks: the same numbers with fewer weights on the device, whatever happens in between."""

import copy
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.learners import ROLE, Given, batch_of, learner_of, small_config, trained, weights
from tests.small import make_wan
from weft.contracts import Batch, NoState
from weft.engines.residency import Parcel, Residence, Ring, frozen_by_block, streamed_blocks
from weft.engines.single_device import SingleEngine
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError
from weft.run.evaluate import resting
from weft.run.learner import Learner

LAYERS, STREAMED = 6, 4
CPU = torch.device("cpu")
STREAM = {"recompute": True, "stream_blocks": STREAMED}
DROPOUT = {"input_dropout": 0.2, "rank_dropout": 0.3}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("stream") / "model", layers=LAYERS)


def learner_with(root: Path, model: Path, engine: dict[str, Any], **change: Any) -> Learner:
    return learner_of(small_config(root, model, engine=engine, **change))


def stream_of(learner: Learner) -> Any:
    (stream,) = learner.engine.streams  # type: ignore[attr-defined]
    return stream


def gradients(learner: Learner, items: int = 2, seed: int = 4, on: str = "cpu") -> dict[str, Tensor]:
    """Of one backward pass, with dropout drawn from the seed."""
    torch.manual_seed(seed)
    batch = Batch({name: t.to(on) for name, t in batch_of(items).tensors.items()}, batch_of(items).keys)
    with learner.model.adapters.use(ROLE), learner.engine.computing():
        loss = Given().loss("train", learner.model, batch, NoState(), None)  # type: ignore[arg-type]
        learner.engine.backward(loss.total, last=True)
    found = {name: p.grad for name, p in weights(learner).items()}
    for parameter in weights(learner).values():
        parameter.grad = None
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), name
        assert torch.equal(found[name], gradient), name


def device_bytes(learner: Learner) -> int:
    """Memory that the network's frozen tensors and the ring take outside of the parcels' host memory."""
    stream, network = stream_of(learner), learner.model.network
    hosts = {parcel.host.untyped_storage().data_ptr() for parcel in stream.parcels.values()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in frozen_by_block(network, ())[None]}
    storages |= {s.memory.untyped_storage().data_ptr(): s.memory.untyped_storage() for s in stream.ring.slots}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in hosts)


# ---- Which blocks ---------------------------------------------------------------------------------------------------


def test_streamed_blocks_are_evenly_spread():
    assert streamed_blocks(40, 0) == ()
    assert streamed_blocks(40, 1) == (20,)
    assert streamed_blocks(40, 4) == (5, 15, 25, 35)
    assert streamed_blocks(6, 4) == (0, 2, 3, 5)
    assert [len(set(streamed_blocks(30, count))) for count in range(30)] == list(range(30))


def test_a_network_cannot_stream_all_of_its_blocks(deep, tmp_path):
    for count in (LAYERS, LAYERS + 5):
        with pytest.raises(ConfigError, match=rf"{count} is too many for a network of 6 blocks. Write 5 or less"):
            learner_with(tmp_path, deep, {"recompute": True, "stream_blocks": count})


@pytest.mark.parametrize("asked", [{"stream_blocks": 2}, {"offload_inputs": True}])
def test_what_travels_needs_recomputation(asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))} needs recompute: true"):
        Torch(**asked)


# ---- The same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("count", [1, 2, STREAMED, LAYERS - 1])
def test_streaming_changes_no_gradient_under_dropout(deep, tmp_path, backend, count):
    change = {"adapter": {"backend": backend, **DROPOUT}}
    expected = gradients(learner_with(tmp_path, deep, {"recompute": False}, **change))
    streaming = learner_with(tmp_path, deep, {"recompute": True, "stream_blocks": count}, **change)
    for _ in range(2):  # the second pass finds the ring as the first left it
        assert_same(gradients(streaming), expected)


@pytest.mark.parametrize("adapter", [
    {"dora": True}, {"backend": "peft", "dora": True}, {"init": "pissa"}, {"backend": "peft", "init": "pissa"},
])  # fmt: skip
def test_adapters_that_look_at_the_base_weights_find_them(deep, tmp_path, adapter):
    expected = gradients(learner_with(tmp_path, deep, {}, adapter=adapter))
    streaming = learner_with(tmp_path, deep, STREAM, adapter=adapter)
    for _ in range(2):
        assert_same(gradients(streaming), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_learns_the_same_from_what_travels(deep, tmp_path, precision, pinned):
    """Kernels of the backward pass add in another order from call to call, hence the tolerance."""
    plain = {"device": "cuda", "precision": precision}
    expected = gradients(learner_with(tmp_path, deep, plain), on="cuda")
    travel = {**plain, **STREAM, "offload_inputs": True, "pinned": pinned}
    learner = learner_with(tmp_path, deep, travel)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for _ in range(3):
        found = gradients(learner, on="cuda")
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))
    assert all(p.host.is_pinned() == pinned for p in stream_of(learner).parcels.values())


def test_streaming_changes_no_gradient_in_bf16(deep, tmp_path):
    expected = gradients(learner_with(tmp_path, deep, {"precision": "bf16"}))
    assert_same(gradients(learner_with(tmp_path, deep, {"precision": "bf16", **STREAM})), expected)


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_ten_steps_of_streaming_learn_what_ten_steps_without_learn(deep, tmp_path, backend):
    ends = []
    for engine in ({}, STREAM, {**STREAM, "offload_inputs": True}):
        config = small_config(tmp_path, deep, engine=engine, adapter={"backend": backend}, schedule={"steps": 10})
        learner = learner_of(config)
        trained(learner, config, [batch_of(2), batch_of(1, seed=1)])
        ends.append({name: p.detach().clone() for name, p in weights(learner).items()})
    for end in ends[1:]:
        assert all(torch.equal(end[name], value) for name, value in ends[0].items())


def test_a_sum_of_two_questions_gets_the_gradient_of_both(deep, tmp_path):
    """The second question's graph goes backward first, and then the ring must turn back to the first one's end."""

    def both(learner: Learner) -> dict[str, Tensor]:
        with learner.model.adapters.use(ROLE):
            losses = [Given().loss("train", learner.model, batch_of(1, s), NoState(), None).total for s in (0, 1)]  # type: ignore[arg-type]
            learner.engine.backward(losses[0] + 3 * losses[1], last=True)
        return {name: p.grad for name, p in weights(learner).items()}

    assert_same(both(learner_with(tmp_path, deep, STREAM)), both(learner_with(tmp_path, deep, {"recompute": True})))


def test_a_network_whose_adapters_begin_high_up_streams_right(deep, tmp_path):
    """Blocks below the lowest adapter have no backward pass at all."""
    change = {"adapter": {"targets": [r"blocks\.[45]\.attn1\.to_q"]}}
    expected = gradients(learner_with(tmp_path, deep, {}, **change))
    streaming = learner_with(tmp_path, deep, STREAM, **change)
    for _ in range(2):
        assert_same(gradients(streaming), expected)


def test_measuring_between_steps_neither_changes_nor_is_changed(deep, tmp_path):
    plain, streaming = (learner_with(tmp_path, deep, engine) for engine in ({}, STREAM))
    expected = gradients(plain)
    for role in (ROLE, None, ROLE):
        answers = []
        for learner in (plain, streaming):
            with resting(learner.model.network), torch.no_grad(), learner.model.adapters.use(role):
                answers.append(Given().measure(learner.model, batch_of(2), "default", 0.5, 0))
        assert torch.equal(*answers)
        assert_same(gradients(streaming), expected)


def test_an_exception_in_the_middle_of_a_pass_leaves_the_weights_in_order(deep, tmp_path):
    expected = gradients(learner_with(tmp_path, deep, {}))
    learner = learner_with(tmp_path, deep, STREAM)
    block = learner.model.family.blocks(learner.model.network)[3]

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    in_forward = block.ffn.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        gradients(learner)
    in_forward.remove()
    assert_same(gradients(learner), expected)

    calls: list[int] = []
    in_backward = block.ffn.register_forward_pre_hook(lambda *_: calls.append(0) or (len(calls) > 1 and stop()) or None)
    with pytest.raises(Stop):
        gradients(learner)
    in_backward.remove()
    for parameter in weights(learner).values():
        parameter.grad = None
    assert not stream_of(learner).backwards
    assert_same(gradients(learner), expected)


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_outside_of_the_ring_no_copy_of_a_streamed_weight_is_left(deep, tmp_path):
    learner = learner_with(tmp_path, deep, STREAM)
    stream, network = stream_of(learner), learner.model.network
    resident = sum(t.nbytes for t in frozen_by_block(network, ())[None] if id(t) not in stream.tensors)
    ring = 2 * max(parcel.bytes for parcel in stream.parcels.values())
    for happening in (lambda: None, lambda: gradients(learner)):
        happening()
        gc.collect()
        assert device_bytes(learner) == resident + ring


def test_while_a_block_runs_only_the_ring_holds_streamed_weights(deep, tmp_path):
    """At every block, first and again: at most two parcels point to the device, all others to their host memory."""
    learner = learner_with(tmp_path, deep, STREAM)
    stream, seen = stream_of(learner), []

    def look(*_: object) -> None:
        hosts = [p.tensors[0].untyped_storage().data_ptr() == p.host.untyped_storage().data_ptr()
                 for p in stream.parcels.values()]  # fmt: skip
        seen.append(hosts.count(False))

    for block in learner.model.family.blocks(learner.model.network):
        block.attn1.register_forward_pre_hook(look)
    gradients(learner)
    assert len(seen) == 2 * LAYERS
    assert max(seen) == 2


def test_weights_are_never_copied_back_and_each_pass_copies_what_it_must(deep, tmp_path):
    """Of four streamed blocks a forward pass copies all but the two that are there, a backward pass the first two."""
    learner = learner_with(tmp_path, deep, STREAM)
    stream = stream_of(learner)
    hosts = [parcel.host.clone() for parcel in stream.parcels.values()]
    size = {number: parcel.bytes for number, parcel in stream.parcels.items()}
    gradients(learner)
    assert stream.ring.copied == sum(size.values()) + size[0] + size[2]
    gradients(learner)
    assert stream.ring.copied == sum(size.values()) + 2 * (size[0] + size[2]) + size[3] + size[5]
    assert all(torch.equal(p.host, host) for p, host in zip(stream.parcels.values(), hosts, strict=True))


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_adapters_and_their_moments_never_move(deep, tmp_path, backend):
    config = small_config(tmp_path, deep, engine=STREAM, adapter={"backend": backend}, schedule={"steps": 2})
    learner = learner_of(config)
    taken = stream_of(learner).tensors
    before = {name: (id(p), p.data_ptr()) for name, p in weights(learner).items()}
    assert not taken & {identity for identity, _ in before.values()}
    trained(learner, config, [batch_of(1)])
    assert before == {name: (id(p), p.data_ptr()) for name, p in weights(learner).items()}


def test_a_state_dict_is_right_wherever_the_weights_are(deep, tmp_path):
    learner = learner_with(tmp_path, deep, STREAM)
    plain = learner_with(tmp_path, deep, {})
    gradients(learner)
    expected = plain.model.network.state_dict()
    found = learner.model.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- A ring by itself -----------------------------------------------------------------------------------------------


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


def test_verified_streaming_finds_and_mends_a_wrong_copy(deep, tmp_path, monkeypatch):
    from weft.engines import transfer

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


def test_weights_are_read_to_where_they_live():
    """A streamed block's tensors and a later expert's stay with the host; the rest is brought to the device."""
    elsewhere = torch.device("cpu", 0)
    on = SingleEngine(elsewhere, "fp32", Residence(recompute=True, stream_blocks=2, experts="one"))
    first, second = on.berth(0).put, on.berth(1).put
    tensor = torch.zeros(3)
    moved = [first(tensor, block, 4).data_ptr() != tensor.data_ptr() for block in (None, 0, 1, 2, 3)]
    assert moved == [True, True, False, True, False]
    assert all(second(tensor, block, 4).data_ptr() == tensor.data_ptr() for block in (None, 0, 1, 2, 3))
