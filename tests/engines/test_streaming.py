"""Streamed blocks: the same numbers with fewer weights on the device, whatever happens in between."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.learners import ROLE, Given, NoMilestones, batch_of, learner_of, small_config, trained, weights
from tests.small import make_wan
from weft.contracts import Batch, NoState
from weft.engines.parallel import Layout
from weft.engines.residency import Residence, frozen_by_block, streamed_blocks
from weft.engines.single_device import SingleEngine
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError
from weft.run.evaluate import resting
from weft.run.learner import Learner

LAYERS, STREAMED = 6, 4
CPU = torch.device("cpu")
STREAM = {"recompute": True, "stream_blocks": STREAMED}
ONCE = {"stream_blocks": STREAMED}
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
    assert [len(set(streamed_blocks(30, count))) for count in range(31)] == list(range(31))


def test_a_network_cannot_stream_more_blocks_than_it_has(deep, tmp_path):
    with pytest.raises(ConfigError, match=r"7 is too many for a network of 6 blocks. Write 6 or less"):
        learner_with(tmp_path, deep, {"recompute": True, "stream_blocks": LAYERS + 1})


def test_inputs_travel_with_recomputation_and_activations_without():
    with pytest.raises(ValueError, match="offload_inputs needs recompute: true"):
        Torch(offload_inputs=True)
    with pytest.raises(ValueError, match="offload_activations is for blocks that run once"):
        Torch(offload_activations=True, recompute=True)


def test_what_autograd_keeps_elsewhere_goes_with_no_fast_weights():
    for asked in ({"stream_blocks": 2}, {"offload_activations": True}):
        section = Torch(device="cpu", **asked)
        assert section.can(Layout()) == section.open().can == {"roles"}


# ---- The same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize(("count", "twice"), [(1, True), (2, False), (STREAMED, True), (STREAMED, False),
                                              (LAYERS, True), (LAYERS, False)])  # fmt: skip
def test_streaming_changes_no_gradient_under_dropout(deep, tmp_path, backend, count, twice):
    """With blocks that run twice, and with blocks whose saved weights are looked up in the ring again."""
    change = {"adapter": {"backend": backend, **DROPOUT}}
    expected = gradients(learner_with(tmp_path, deep, {"recompute": False}, **change))
    streaming = learner_with(tmp_path, deep, {"recompute": twice, "stream_blocks": count}, **change)
    for _ in range(2):  # the second pass finds the ring as the first left it
        assert_same(gradients(streaming), expected)


@pytest.mark.parametrize("adapter", [
    {"dora": True}, {"backend": "peft", "dora": True}, {"init": "pissa"}, {"backend": "peft", "init": "pissa"},
])  # fmt: skip
def test_adapters_that_look_at_the_base_weights_find_them(deep, tmp_path, adapter):
    expected = gradients(learner_with(tmp_path, deep, {}, adapter=adapter))
    for engine in (STREAM, ONCE):
        streaming = learner_with(tmp_path, deep, engine, adapter=adapter)
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
    for engine in ({}, STREAM, {**STREAM, "offload_inputs": True}, {**ONCE, "offload_activations": True}):
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

    expected = both(learner_with(tmp_path, deep, {"recompute": True}))
    for engine in (STREAM, ONCE, {**ONCE, "offload_activations": True}):
        assert_same(both(learner_with(tmp_path, deep, engine)), expected)


def test_a_network_whose_adapters_begin_high_up_streams_right(deep, tmp_path):
    """Blocks below the lowest adapter have no backward pass at all."""
    change = {"adapter": {"targets": [r"blocks\.[45]\.attn1\.to_q"]}}
    expected = gradients(learner_with(tmp_path, deep, {}, **change))
    for engine in (STREAM, ONCE):
        streaming = learner_with(tmp_path, deep, engine, **change)
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

    in_forward = block.ffn.net[0].proj.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        gradients(learner)
    in_forward.remove()
    assert_same(gradients(learner), expected)

    calls: list[int] = []
    inner = block.ffn.net[0].proj  # a layer with a hook is called, whoever computes the block
    in_backward = inner.register_forward_pre_hook(lambda *_: calls.append(0) or (len(calls) > 1 and stop()) or None)
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
        block.attn1.to_q.register_forward_pre_hook(look)
    gradients(learner)
    assert len(seen) == 2 * LAYERS
    assert max(seen) == 2


def test_a_forward_pass_without_recomputation_leaves_two_blocks_weights_on_the_device(deep, tmp_path):
    """While the graph waits for its backward pass."""
    learner = learner_with(tmp_path, deep, ONCE)
    stream = stream_of(learner)
    with learner.model.adapters.use(ROLE):
        loss = Given().loss("train", learner.model, batch_of(2), NoState(), None).total  # type: ignore[arg-type]
    resident = [t for t in frozen_by_block(learner.model.network, ())[None] if id(t) not in stream.tensors]
    ring = 2 * max(parcel.bytes for parcel in stream.parcels.values())
    assert device_bytes(learner) == sum(t.nbytes for t in resident) + ring
    assert loss.grad_fn is not None


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
    """The optimizer lays them end to end at its first step; from then on they stay there."""
    config = small_config(tmp_path, deep, engine=STREAM, adapter={"backend": backend}, schedule={"steps": 3})
    learner = learner_of(config)
    taken, places = stream_of(learner).tensors, []

    class Noted(NoMilestones):
        def is_due(self, learner: Learner) -> bool:
            return True

        def after_step(self, learner: Learner) -> None:
            states = next(iter(learner.optimizers.values())).state
            moments = [state[name].data_ptr() for state in states.values() for name in ("exp_avg", "exp_avg_sq")]
            places.append(([(id(p), p.data_ptr()) for p in weights(learner).values()], moments))

    assert not taken & {id(p) for p in weights(learner).values()}
    trained(learner, config, [batch_of(1)], Noted())
    assert len(places) == 3 and places[0] == places[1] == places[2]


def test_a_state_dict_is_right_wherever_the_weights_are(deep, tmp_path):
    learner = learner_with(tmp_path, deep, STREAM)
    plain = learner_with(tmp_path, deep, {})
    gradients(learner)
    expected = plain.model.network.state_dict()
    found = learner.model.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_weights_are_read_to_where_they_live():
    """A streamed block's tensors and a later expert's stay with the host; the rest is brought to the device."""
    elsewhere = torch.device("cpu", 0)
    on = SingleEngine(elsewhere, "fp32", Residence(recompute=True, stream_blocks=2, experts="one"))
    first, second = on.berth(0).put, on.berth(1).put
    tensor = torch.zeros(3)
    moved = [first(tensor, block, 4).data_ptr() != tensor.data_ptr() for block in (None, 0, 1, 2, 3)]
    assert moved == [True, True, False, True, False]
    assert all(second(tensor, block, 4).data_ptr() == tensor.data_ptr() for block in (None, 0, 1, 2, 3))
