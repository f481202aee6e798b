"""One device: where tensors go, what a step does with its gradient, and that recomputation changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.learners import ROLE, Given, batch_of, learner_of, small_config, weights
from weft.contracts import Batch, NoState
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError

CPU = torch.device("cpu")
# To torch a device with an index is another device, so that a copy is made on a CPU too.
ELSEWHERE = torch.device("cpu", 0)


def engine(precision: str = "fp32", recompute: bool = False, verify: bool = False) -> SingleEngine:
    return SingleEngine(CPU, precision, Residence(recompute=recompute, verified=verify))


def moved_by(gradient: list[float], max_norm: float, on: SingleEngine | None = None) -> tuple[Tensor, Any]:
    """What one step of plain descent at rate 1 makes of zeros, and what it says."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor(gradient)
    stepped = (on or engine()).step(torch.optim.SGD([parameter], lr=1.0), max_norm)
    assert parameter.grad is None
    return parameter.detach(), stepped


# ---- Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_recomputation_gives_every_adapter_tensor_the_gradient_it_has_without(model, tmp_path, backend):
    """A frozen base hands inputs without gradients to its blocks; reentrant checkpoints would return None for all."""
    gradients: list[dict[str, Tensor]] = []
    for recompute in (False, True, "selective"):
        change = {"engine": {"recompute": recompute}, "adapter": {"backend": backend, "rank_dropout": 0.3}}
        learner, batch = learner_of(small_config(tmp_path, model, **change)), batch_of(2)
        torch.manual_seed(4)
        with learner.model.adapters.use(ROLE):
            learner.engine.backward(Given().loss("train", learner.model, batch, NoState(), None).total, last=True)
        gradients.append({name: p.grad for name, p in weights(learner).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name
        assert torch.equal(gradient, gradients[2][name]), name


def test_selective_recomputation_attends_once_and_full_recomputation_twice(model, tmp_path):
    """Of two blocks each attends to itself and to the text."""
    kernel, ran = "aten::_scaled_dot_product_flash_attention_for_cpu", []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran[-1] += func.name() == kernel
            return func(*args, **(kwargs or {}))

    for recompute in (False, "selective", True):
        learner = learner_of(small_config(tmp_path, model, engine={"recompute": recompute}))
        ran.append(0)
        with learner.model.adapters.use(ROLE), Watch():
            learner.engine.backward(Given().loss("train", learner.model, batch_of(2), NoState(), None).total, last=True)
    assert ran == [4, 4, 8]


def test_recomputed_blocks_keep_only_their_inputs(model, tmp_path):
    kept: list[int] = []
    for recompute in (False, True):
        learner, sizes = learner_of(small_config(tmp_path, model, engine={"recompute": recompute})), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t)
        with learner.model.adapters.use(ROLE), hooks:
            Given().loss("train", learner.model, batch_of(2), NoState(), None)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_an_engine_that_recomputes_does_not_offer_fast_weights():
    assert "functional" in engine().can and "functional" not in engine(recompute=True).can


def test_micro_batches_add_up_in_the_gradient():
    x, on = nn.Parameter(torch.tensor([1.0, 2.0])), engine()
    on.backward((3 * x).sum(), last=False)
    on.backward(x.square().sum(), last=True)
    assert_close(x.grad, torch.tensor([5.0, 7.0]))


# ---- A step --------------------------------------------------------------------------------------------------------


def test_a_long_gradient_is_cut_to_the_limit_in_its_own_direction_and_its_length_before_is_told():
    value, stepped = moved_by([3.0, 4.0], max_norm=0.5)
    assert_close(value, torch.tensor([-0.3, -0.4]), rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm
    assert (stepped.norm, stepped.moved, stepped.scaled) == (5.0, True, False)


@pytest.mark.parametrize("max_norm", [0.0, 5.0, 6.0])
def test_a_gradient_within_the_limit_and_any_when_there_is_none_stays_as_it_is(max_norm):
    assert torch.equal(moved_by([3.0, 4.0], max_norm)[0], torch.tensor([-3.0, -4.0]))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(wrong):
    value, stepped = moved_by([1.0, wrong], max_norm=1.0)
    assert torch.equal(value, torch.zeros(2))
    assert (stepped.moved, stepped.scaled) == (False, False)


def test_an_fp16_overflow_is_told_as_such_and_halves_the_scale():
    on = engine("fp16")
    on.scaler = GradScaler("cpu", init_scale=2.0**10)
    on.backward(torch.zeros((), requires_grad=True).sum(), last=True)  # the scaler makes its scale at the first loss
    value, stepped = moved_by([1.0, torch.inf], 1.0, on)
    assert (stepped.moved, stepped.scaled) == (False, True)
    assert on.scaler.get_scale() == 2.0**9
    assert torch.equal(value, torch.zeros(2))


def test_the_loss_scale_is_out_of_the_gradient_before_it_is_measured_and_clipped():
    on = engine("fp16")
    on.scaler = GradScaler("cpu", init_scale=2.0**10)
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    on.backward((parameter * torch.tensor([3.0, 4.0])).sum(), last=True)
    assert parameter.grad is not None and parameter.grad[0] == 3 * 2**10
    assert on.step(optimizer, 0.0).norm == 5.0
    assert torch.equal(parameter.detach(), torch.tensor([-3.0, -4.0]))


def test_the_loss_scale_goes_into_a_checkpoint_and_back():
    first, second = engine("fp16"), engine("fp16")
    first.scaler = GradScaler("cpu", init_scale=8.0)
    first.backward(torch.zeros((), requires_grad=True).sum(), last=True)
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 8.0
    engine("fp32").load_state_dict(engine("fp32").state_dict())


# ---- Places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_a_placed_network_answers_as_before_and_adapters_keep_their_parameters(model, tmp_path, verify):
    learner, batch = learner_of(small_config(tmp_path, model)), batch_of(1)
    ask: Callable[[], Tensor] = lambda: Given().measure(learner.model, batch, "default", 0.5, 0)  # noqa: E731
    expected, parameters = ask(), weights(learner)
    learner.model.network.register_buffer("counter", torch.arange(3))
    network = learner.model.network
    SingleEngine(ELSEWHERE, "fp32", Residence(verified=verify)).place(network, learner.model.family.blocks(network))
    assert torch.equal(ask(), expected)
    assert all(weights(learner)[name] is p for name, p in parameters.items())
    assert torch.equal(network.counter, torch.arange(3))


@pytest.mark.parametrize("verify", [False, True])
def test_a_batch_is_put_on_the_device_with_its_keys(verify):
    batch = Batch({"latents": torch.randn(2, 3), "text_mask": torch.tensor([[True], [False]])}, ("a", "b"))
    put = SingleEngine(ELSEWHERE, "fp32", Residence(verified=verify)).put(batch)
    assert put.keys == ("a", "b")
    assert all(torch.equal(put[name], tensor) for name, tensor in batch.tensors.items())


def test_verified_copies_are_asked_for_every_tensor_when_told_and_for_none_otherwise(monkeypatch):
    copied: list[int] = []
    monkeypatch.setattr("weft.engines.single_device.verified_copy", lambda t, device: copied.append(t.numel()) or t)
    network, batch = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), Batch({"latents": torch.zeros(7)}, ("a",))
    engine().place(network, [])
    engine().put(batch)
    assert copied == []
    engine(verify=True).place(network, [])
    engine(verify=True).put(batch)
    assert sorted(copied) == sorted([6, 3, 3, 3, 3, 3, 1, 7])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused_with_what_to_run(device):
    with pytest.raises(ConfigError, match=rf"'{device}' was asked for, but torch sees no GPU. Run: weft doctor"):
        Torch(device=device).open()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac")
def test_mps_away_from_a_mac_is_refused():
    with pytest.raises(ConfigError, match="no Mac with Metal"):
        Torch(device="mps").open()


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert Torch(device="cpu").open().precision == "fp32"
    half = Torch(device="cpu", precision="bf16").open()
    with half.computing():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16


def test_one_process_sums_over_itself_and_agrees_with_itself():
    value, on = torch.tensor(3.0), engine()
    assert (on.rank, on.world, on.data_rank, on.data_world, on.sequence) == (0, 1, 0, 1, None)
    assert float(on.total(value)) == 3.0
    assert on.agreed({"step": 4}) == {"step": 4}
    on.barrier()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    assert on.own(nn.Linear(1, 1), optimizers) is optimizers
    on.close()
