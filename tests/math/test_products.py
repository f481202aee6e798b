"""Products of frozen layers and low-rank changes against autograd through the formula, in what is kept and computed."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weft.adapters.fused import NarrowCopies, Strength, told
from weft.families.storage import PACKINGS, Packed, PackedLinear, encoded
from weft.math.products import plain_products, products, stacked
from weft.projection import PLAIN, LowRank, Projection, projection

IN, RANK = 48, 4


class Halved:
    """A producer: h = x / 2."""

    tensors: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        return x / 2

    def backward(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
        return (grad / 2).to(x.dtype)


def factors(out: int, scale: float, dtype: torch.dtype = torch.float32) -> LowRank:
    a = nn.Parameter(torch.randn(RANK, IN, dtype=dtype) / 8)
    return LowRank(a, nn.Parameter(torch.randn(out, RANK, dtype=dtype) / 8), scale)


def layers(outs: Sequence[int], scales: Sequence[float | None], dtype: torch.dtype = torch.float32) -> list[Projection]:
    """Frozen layers, every second one without a bias, and a change for each scale."""
    torch.manual_seed(0)
    found = []
    for number, (out, scale) in enumerate(zip(outs, scales, strict=True)):
        layer = nn.Linear(IN, out, bias=number % 2 == 0, dtype=dtype).requires_grad_(False)
        known = projection(layer)
        change = None if scale is None else factors(out, scale, dtype)
        found.append(Projection(layer, known.kernel, known.tensors, change))
    return found


def formula(x: Tensor, projections: Sequence[Projection], halved: bool) -> list[Tensor]:
    """W x + b + scale B A x by autograd."""
    h = x / 2 if halved else x
    answers = []
    for each in projections:
        y = each.module(h)
        if each.change is not None:
            low = functional.linear(h, each.change.a)
            y = y + each.change.scale * functional.linear(low, each.change.b)
        answers.append(y)
    return answers


def trained(projections: Sequence[Projection]) -> list[Tensor]:
    return [t for each in projections if each.change is not None for t in (each.change.a, each.change.b)]


def gradients(answers: Sequence[Tensor], wanted: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
    loss = torch.stack([y.double().sin().sum() * (number + 1) for number, y in enumerate(answers)]).sum()
    return torch.autograd.grad(loss, wanted, **options)


CASES = {
    "one": ([40], [1.0]),
    "one, scaled": ([40], [0.3]),
    "q, k, v": ([48, 48, 48], [2.0, 2.0, 2.0]),
    "of other scales": ([48, 24, 40], [0.5, None, 3.0]),
    "bare": ([40], [None]),
}


@pytest.mark.parametrize("halved", [False, True], ids=["", "produced"])
@pytest.mark.parametrize("case", CASES)
def test_answers_and_gradients_are_those_of_the_formula(case, halved):
    projections = layers(*CASES[case], torch.float64)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    found = products(x, projections, Halved() if halved else None)
    expected = formula(x, projections, halved)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-13, atol=1e-13)
    wanted = [x, *trained(projections)]
    for one, other in zip(gradients(found, wanted), gradients(expected, wanted), strict=True):
        assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_in_fp32_they_agree_to_a_millionth_and_plain_products_are_the_same():
    projections = layers([48, 48, 96], [2.0, 2.0, 2.0])
    x = torch.randn(64, IN, requires_grad=True)
    wanted = [x, *trained(projections)]
    for answers in (products(x, projections), plain_products(x, projections)):
        expected = formula(x, projections, halved=False)
        for one, other in zip(answers, expected, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
        for one, other in zip(gradients(answers, wanted), gradients(expected, wanted), strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half base"])
def test_in_half_precision_gradients_of_the_factors_point_where_fp32_points(dtype, autocast):
    projections = layers([48, 48, 96], [2.0, 2.0, 2.0])
    x = torch.randn(256, IN)
    if not autocast:  # the frozen weights in half precision, the factors in fp32
        projections = [
            Projection(p.module.to(dtype), p.kernel, (p.module.weight, p.module.bias), p.change) for p in projections
        ]
        x = x.to(dtype)
    wanted = trained(projections)
    with torch.autocast("cpu", dtype, enabled=autocast):
        answers = products(x, projections)
    assert all(y.dtype == dtype for y in answers)
    twins = [
        Projection(double(p.module), None, (), LowRank(p.change.a.double(), p.change.b.double(), p.change.scale))
        for p in projections
        if p.change is not None
    ]
    for one, other in zip(
        gradients(answers, wanted), gradients(formula(x.double(), twins, False), wanted), strict=True
    ):
        assert one.dtype == torch.float32
        assert functional.cosine_similarity(one.double().flatten(), other.double().flatten(), 0) >= 0.9999


def double(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    return twin.requires_grad_(False)


def kept(run) -> list[Tensor]:
    found: list[Tensor] = []
    with saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        run()
    return found


@pytest.mark.parametrize(("outs", "shapes"), [([48, 48, 48], [(7, IN)]), ([40], [(7, RANK), (7, IN)])])
def test_the_input_of_q_k_and_v_is_kept_once_and_nothing_beside_it(outs, shapes):
    projections = layers(outs, [2.0] * len(outs))
    x = torch.randn(7, IN, requires_grad=True)
    there = {t.data_ptr() for p in projections for t in (*p.tensors, p.change.a, p.change.b) if t is not None}
    fresh = {t.data_ptr(): t for t in kept(lambda: products(x, projections)) if t.data_ptr() not in there}
    assert sorted(tuple(t.shape) for t in fresh.values()) == shapes


class Counted(TorchDispatchMode):
    """Names of the operators that compute: views and fresh memory are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operators(run) -> list[str]:
    with Counted() as counted:
        run()
    return counted.names


def test_a_layer_takes_three_multiplications_there_and_five_back():
    projections = layers([40], [0.5])
    x = torch.randn(7, IN, requires_grad=True)
    found: list[Tensor] = []
    assert operators(lambda: found.extend(products(x, projections))) == ["addmm_", "addmm", "addmm_"]
    ones = [torch.ones(7, 40)]
    back = operators(lambda: torch.autograd.grad(found, [x, *trained(projections)], ones))
    assert sorted(back) == ["addmm_", "addmm_", "mm", "mm", "mm"]


def test_under_autocast_with_copies_that_lie_together_q_k_and_v_add_nothing_but_multiplications():
    plain = [Held(p.change.a, p.change.b) for p in layers([48, 48, 48], [2.0] * 3) if p.change is not None]
    copies = NarrowCopies()
    bases = [p.module.to(torch.bfloat16) for p in layers([48, 48, 48], [None] * 3)]
    x = torch.randn(7, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert operators(lambda: copies.renew(plain)) == ["_foreach_copy_"]
        projections = [
            Projection(base, p.kernel, p.tensors, told(held))
            for base, held in zip(bases, plain, strict=True)
            for p in [projection(base)]
        ]
        found: list[Tensor] = []
        names = operators(lambda: found.extend(products(x, projections)))
    assert len(names) == 7 and set(names) == {"addmm_", "addmm", "mm"}


class Held:
    """A and B in nothing but this."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b, self.narrow, self.strength = a, b, None, Strength(2.0)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


def test_copies_in_half_precision_are_not_used_once_a_factor_has_changed_or_another_stands_in_its_place():
    (known,) = layers([40], [1.0])
    assert known.change is not None
    held, copies = Held(known.change.a, known.change.b), NarrowCopies()
    with torch.autocast("cpu", torch.bfloat16):
        copies.renew([held])
        assert told(held).narrow is not None
        with torch.no_grad():
            held.a.mul_(2)
        assert told(held).narrow is None
        copies.renew([held])
        assert_close(told(held).narrow[0].float(), held.a, rtol=1e-2, atol=1e-2)
        held.a = held.a * 2  # a fast weight
        assert told(held).narrow is None
        copies.renew([held])
        assert told(held).narrow is None


def test_copies_renewed_while_a_graph_waits_are_found_by_its_backward_pass():
    (known,) = layers([40], [1.0])
    assert known.change is not None
    held, copies = Held(known.change.a, known.change.b), NarrowCopies()
    with torch.autocast("cpu", torch.bfloat16):
        copies.renew([held])
        (y,) = products(torch.randn(5, IN), [Projection(known.module, known.kernel, known.tensors, told(held))])
        copies.renew([held])
    y.float().sum().backward()
    assert held.a.grad is not None and held.a.grad.any()


def test_rows_that_follow_each_other_in_memory_are_stacked_without_a_copy():
    whole = torch.randn(12, IN)
    parts = list(whole.split(4))
    assert stacked(parts).data_ptr() == whole.data_ptr() and torch.equal(stacked(parts), whole)
    assert torch.equal(stacked(parts[::-1]), torch.cat(parts[::-1]))


def test_the_gradient_of_a_gradient_is_that_of_the_formula():
    """La-MAML's second order: an inner step's gradient has one itself, also where weights are not leaves."""
    projections = layers([8, 12], [0.7, 2.0], torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    wanted = [x, *trained(projections)]
    found = []
    for ask in (products, lambda x, p, _=None: formula(x, p, False)):
        first = gradients(ask(x, projections), wanted, create_graph=True)
        fast = [w - 0.1 * g for w, g in zip(wanted, first, strict=True)]
        moved = [
            Projection(p.module, p.kernel, p.tensors, LowRank(fast[2 * n + 1], fast[2 * n + 2], p.change.scale))
            for n, p in enumerate(projections)
            if p.change is not None
        ]
        found.append(gradients(ask(fast[0], moved), wanted))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_an_input_that_wants_no_gradient_gets_none_and_factors_do():
    (known,) = layers([40], [1.0])
    x = torch.randn(5, IN)
    (y,) = products(x, [known])
    names = operators(lambda: y.sum().backward())
    assert x.grad is None and known.change.a.grad is not None and known.change.b.grad is not None
    assert sum("mm" in name for name in names) == 3  # v, dA, dB


def test_recomputed_they_give_the_same_bits():
    projections = layers([48, 24], [2.0, 1.0])
    x = torch.randn(6, IN, requires_grad=True)
    wanted = [x, *trained(projections)]
    again = checkpoint(lambda x: products(x, projections), x, use_reentrant=False)
    for one, other in zip(gradients(again, wanted), gradients(products(x, projections), wanted), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_packed_layer_is_multiplied_as_it_is_decoded(kind):
    torch.manual_seed(0)
    codes, scale = encoded(PACKINGS[kind], torch.randn(64, 64))
    packed = PackedLinear(Packed(codes, scale, (64, 64), PACKINGS[kind]), torch.randn(64), torch.float32)
    change = LowRank(nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(64, 4)), 0.5)
    known = projection(packed)
    plain = nn.Linear(64, 64).requires_grad_(False)
    plain.load_state_dict({"weight": packed.weight, "bias": packed.bias})
    x = torch.randn(9, 64, requires_grad=True)
    wanted = [x, change.a, change.b]
    found = products(x, [Projection(packed, known.kernel, known.tensors, change)])
    expected = formula(x, [Projection(plain, None, (), change)], False)
    for one, other in zip([*found, *gradients(found, wanted)], [*expected, *gradients(expected, wanted)], strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_gradients_of_the_factors_are_summed_and_kept_in_fp32(dtype):
    projections = layers([48, 48, 96], [2.0, 2.0, 2.0])
    x = torch.randn(4096, IN)
    wanted = trained(projections)
    expected = gradients(formula(x, projections, False), wanted)
    there = [
        Projection(p.module.cuda(), p.kernel, tuple(None if t is None else t.cuda() for t in p.tensors),
                   LowRank(*(t.detach().cuda().requires_grad_() for t in (p.change.a, p.change.b)), p.change.scale))
        for p in projections if p.change is not None
    ]  # fmt: skip
    with torch.autocast("cuda", dtype):
        answers = products(x.cuda(), there)
    for one, other in zip(gradients(answers, trained(there)), expected, strict=True):
        assert one.dtype == torch.float32
        assert functional.cosine_similarity(one.cpu().flatten(), other.flatten(), 0) >= 0.9999


def test_of_no_tokens_there_are_no_answers_and_gradients_of_zero():
    layer = torch.nn.Linear(8, 6).requires_grad_(False)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    x = torch.zeros(1, 0, 8, requires_grad=True)
    (y,) = products(x, [Projection(layer, PLAIN, (layer.weight, layer.bias), LowRank(a, b, 2.0))])
    y.sum().backward()
    assert y.shape == (1, 0, 6) and x.grad is not None and x.grad.shape == x.shape
    assert a.grad is not None and not a.grad.any()
