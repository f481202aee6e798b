"""AdamW over flat memory: the same step as torch's, state that anyone can read, and no number read by the host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import thread_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW, Optimizer
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from weft.engines.flat_adamw import FlatAdamW
from weft.engines.gradients import decides_on_device
from weft.engines.single_device import SingleEngine
from weft.run import optimizers as sections

CPU = torch.device("cpu")
SHAPES = {"a.A": (8, 64), "a.B": (48, 8), "b.A": (3, 5), "b.B": (7,), "c.A": (2, 2, 3, 3), "c.B": (64, 2)}
LIMIT = 1.5  # below the gradients' length in some steps and above it in others


def parameters_of(seed: int = 0) -> dict[str, nn.Parameter]:
    chance = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=chance)) for name, shape in SHAPES.items()}


def built(parameters: dict[str, nn.Parameter], flat: bool = True) -> Any:
    """AdamW with a group of each end, of another rate."""
    section = sections.AdamW(lr=1e-2, weight_decay=0.1)
    optimizer = section.build(parameters, lambda name: 16.0 if name.endswith("B") else 1.0)
    assert isinstance(optimizer, FlatAdamW)
    return optimizer if flat else optimizer.apart()


def give(parameters: dict[str, nn.Parameter], step: int, without: Sequence[str] = ()) -> None:
    chance = torch.Generator().manual_seed(1000 + step)
    for name, p in parameters.items():
        gradient = 0.03 * (1 + step % 3) * torch.randn(p.shape, generator=chance)
        p.grad = None if name in without else gradient


def stepped(optimizer: Optimizer, parameters: dict[str, nn.Parameter], steps: range, **given: Any) -> list[Any]:
    on, said = SingleEngine(CPU, "fp32"), []
    for step in steps:
        give(parameters, step, **given)
        said.append(on.step(optimizer, LIMIT))
    return said


def by_torch(optimizer: Optimizer, parameters: dict[str, nn.Parameter], steps: range, **given: Any) -> list[float]:
    """As one writes it by hand; the norms before clipping."""
    norms = []
    for step in steps:
        give(parameters, step, **given)
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), LIMIT)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def state_of(optimizer: Optimizer) -> dict[Any, dict[str, Tensor]]:
    return {key: {k: v.clone() for k, v in entry.items()} for key, entry in optimizer.state_dict()["state"].items()}


# ---- The same step as torch's --------------------------------------------------------------------------------------


def test_fifty_clipped_steps_are_torchs_to_a_millionth():
    ours, theirs = parameters_of(), parameters_of()
    norms = [float(said.norm) for said in stepped(built(ours), ours, range(50))]
    expected = by_torch(built(theirs, flat=False), theirs, range(50))
    assert min(expected) < LIMIT < max(expected)
    assert norms == pytest.approx(expected, rel=1e-6)
    for name, p in theirs.items():
        assert float(((ours[name] - p).norm() / p.norm()).detach()) < 1e-6, name


@pytest.mark.parametrize("flat_first", [True, False])
def test_what_one_began_the_other_goes_on_with(flat_first):
    own, straight = parameters_of(), parameters_of()
    first, second = built(own, flat_first), built(own, not flat_first)
    (stepped if flat_first else by_torch)(first, own, range(3))
    before = state_of(first)
    second.load_state_dict(first.state_dict())
    (by_torch if flat_first else stepped)(second, own, range(3, 6))
    by_torch(built(straight, flat=False), straight, range(6))
    assert {k: list(v) for k, v in before.items()} == {k: list(v) for k, v in state_of(second).items()}
    assert [float(entry["step"]) for entry in state_of(second).values()] == [6.0] * len(SHAPES)
    for name, p in straight.items():
        assert_close(own[name], p, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_is_the_same_to_the_bit():
    whole, again = parameters_of(), parameters_of(1)
    first, second = built(whole), built(again)
    stepped(first, whole, range(3))
    with torch.no_grad():
        for name, p in again.items():
            p.copy_(whole[name])
    second.load_state_dict({**first.state_dict(), "state": state_of(first)})
    stepped(first, whole, range(3, 6))
    stepped(second, again, range(3, 6))
    assert all(torch.equal(p, again[name]) for name, p in whole.items())


@pytest.mark.parametrize("begins", [0, 2])
def test_a_parameter_without_a_gradient_is_left_alone_as_torch_leaves_it(begins):
    """Not decayed, its moments kept, its step not counted; also when it has moved before, and moves again after."""
    ours, theirs = parameters_of(), parameters_of()
    flat, torchs = built(ours), built(theirs, flat=False)
    for steps, without in ((range(begins), ()), (range(begins, 4), ("b.A", "c.B")), (range(4, 6), ())):
        stepped(flat, ours, steps, without=without)
        by_torch(torchs, theirs, steps, without=without)
    for name, p in theirs.items():
        assert_close(ours[name], p, rtol=1e-5, atol=1e-7)
    counts = [[float(entry["step"]) for entry in state_of(each).values()] for each in (flat, torchs)]
    assert sorted(counts[0]) == sorted(counts[1]) and len(set(counts[0])) == 2


def test_a_step_without_any_gradient_changes_nothing_and_the_next_is_flat_again():
    own = parameters_of()
    optimizer = built(own)
    stepped(optimizer, own, range(1))
    before = {name: p.detach().clone() for name, p in own.items()}
    assert float(SingleEngine(CPU, "fp32").step(optimizer, LIMIT).norm) == 0
    assert all(torch.equal(p, before[name]) for name, p in own.items())
    give(own, 1)
    assert optimizer.gather() is not None


def test_a_replaced_tensor_is_what_moves_on():
    own = parameters_of()
    optimizer = built(own)
    stepped(optimizer, own, range(2))
    other = parameters_of(5)
    own["a.A"].data = other["a.A"].detach().clone()
    steady = {name: p.detach().clone() for name, p in own.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    stepped(optimizer, own, range(2, 3))
    assert all(torch.equal(p, steady[name]) for name, p in own.items())
    assert [float(entry["step"]) for entry in state_of(optimizer).values()] == [3.0] * len(SHAPES)


# ---- Memory --------------------------------------------------------------------------------------------------------


def test_weights_and_moments_lie_end_to_end_and_every_tensor_begins_at_256_bytes():
    own = parameters_of()
    optimizer = built(own)
    stepped(optimizer, own, range(1))
    state = [optimizer.state[p] for p in own.values()]
    for kept in (own.values(), [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]):
        kept = list(kept)
        assert len({t.untyped_storage().data_ptr() for t in kept}) == 1
        assert all(t.storage_offset() % 64 == 0 and t.is_contiguous() for t in kept)


def test_a_gathered_gradient_takes_the_place_of_the_parameters_own_and_goes_with_the_step():
    own = parameters_of()
    optimizer = built(own)
    give(own, 0)
    flat = optimizer.gather()
    assert flat is not None and all(p.grad is None for p in own.values())
    optimizer.step()
    assert optimizer.gather() is None


def test_a_step_is_seen_by_whoever_keeps_something_made_of_a_parameter():
    """Casts to half precision are kept by the version of what they were made of."""
    own = parameters_of()
    before = [p._version for p in own.values()]
    stepped(built(own), own, range(1))
    assert all(p._version > was for p, was in zip(own.values(), before, strict=True))


# ---- Gradients that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("max_norm", [0.0, LIMIT])
def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_moments_nor_counts(wrong, max_norm):
    own = parameters_of()
    optimizer = built(own)
    stepped(optimizer, own, range(2))
    weights, state = {name: p.detach().clone() for name, p in own.items()}, state_of(optimizer)
    give(own, 2)
    own["b.B"].grad[3] = wrong  # type: ignore[index]
    said = SingleEngine(CPU, "fp32").step(optimizer, max_norm)
    assert not said.moved and all(p.grad is None for p in own.values())
    assert all(torch.equal(p, weights[name]) for name, p in own.items())
    for key, entry in state_of(optimizer).items():
        assert all(torch.equal(value, state[key][name]) for name, value in entry.items())


def test_a_scaled_step_is_the_step_without_scaling():
    plain, scaled = parameters_of(), parameters_of()
    stepped(built(plain), plain, range(4))
    on, optimizer = SingleEngine(CPU, "fp16"), built(scaled)
    on.scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(4):
        scale = float(on.scaler.scale(torch.ones(())))
        give(scaled, step)
        for p in scaled.values():
            assert p.grad is not None
            p.grad *= scale
        assert on.step(optimizer, LIMIT).moved
    assert on.scaler.get_scale() == 2.0**11
    assert all(torch.equal(p, plain[name]) for name, p in scaled.items())


# ---- The host reads nothing ----------------------------------------------------------------------------------------

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


class Reads(TorchDispatchMode):
    """Notes every operation that hands the host a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        name = func.overloadpacket.__name__
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def on_a_gpu() -> Iterator[torch.device]:
    """Tensors that say they lie on one, and have no numbers: whoever asks for one is refused."""
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones((), device=device) > 0)
        yield device


def unread_step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], on: SingleEngine) -> None:
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        said = on.step(optimizer, 1.0)
        assert said.norm.device.type == said.moved.device.type == "cuda"


BUILDS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "flat": lambda own: sections.AdamW().build({str(i): p for i, p in enumerate(own)}, lambda name: 1.0 + int(name)),
    "fused": lambda own: AdamW(own, fused=True),
}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_on_a_gpu_reads_no_number(kind, precision):
    with on_a_gpu() as device:
        own = [nn.Parameter(torch.zeros(3, 5, device=device)) for _ in range(3)]
        optimizer, on = BUILDS[kind](own), SingleEngine(device, "fp32")
        on.scaler = GradScaler("cpu", enabled=precision == "fp16")  # one for cuda is off where there is no GPU
        assert isinstance(optimizer, FlatAdamW) == (kind == "flat")
        unread_step(optimizer, own, on)


def test_a_step_with_parameters_that_have_no_gradient_reads_no_number():
    with on_a_gpu() as device:
        own = [nn.Parameter(torch.zeros(3, 5, device=device)) for _ in range(3)]
        unread_step(BUILDS["flat"](own), own, on := SingleEngine(device, "fp32"))
        unread_step(BUILDS["flat"](own), own[1:], on)


def test_only_an_optimizer_that_cannot_decide_for_itself_makes_the_host_read():
    reads = {}
    for name, kind in {"flat": BUILDS["flat"], "custom": lambda own: torch.optim.SGD(own, lr=0.1)}.items():
        own = [nn.Parameter(torch.zeros(3, 5)) for _ in range(3)]
        optimizer, on = kind(own), SingleEngine(CPU, "fp32")
        assert decides_on_device(optimizer) == (name == "flat")
        for p in own:
            p.grad = torch.ones_like(p)
        with Reads() as seen:
            on.step(optimizer, 1.0)
        reads[name] = seen.found
    assert reads == {"flat": [], "custom": ["_local_scalar_dense"]}


# ---- Time ----------------------------------------------------------------------------------------------------------


def test_600_tensors_are_moved_in_less_than_half_of_torchs_time():
    """What is still done for each tensor is little: its gradient is gathered and dropped."""
    torch.set_num_threads(1)
    own = {str(i): nn.Parameter(torch.zeros(16, 32)) for i in range(600)}
    gradients, on = [torch.full_like(p, 1e-3) for p in own.values()], SingleEngine(CPU, "fp32")
    flat = sections.AdamW().build(own, lambda name: 1.0)
    other = {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}
    theirs = AdamW(list(other.values()), fused=True)

    def ours() -> None:
        on.step(flat, 1.0)

    def torchs() -> None:
        nn.utils.clip_grad_norm_(other.values(), 1.0)
        theirs.step()
        theirs.zero_grad()

    seconds: dict[str, list[float]] = {"ours": [], "torchs": []}
    for _ in range(8):
        for name, work, moved in (("ours", ours, own), ("torchs", torchs, other)):
            for p, gradient in zip(moved.values(), gradients, strict=True):
                p.grad = gradient
            began = thread_time()
            work()
            seconds[name].append(thread_time() - began)
    assert min(seconds["ours"][1:]) < min(seconds["torchs"][1:]) / 2
