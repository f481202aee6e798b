"""How far products in fp8 are from those in half precision, measured on a run's own weights and its first batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from weft.contracts import Batch, Loss, ModelFamily, NoState, Phase
from weft.events import Listener, Notice
from weft.families.storage import Decoding, PackedLinear
from weft.math.float8 import Float8Kernel
from weft.projection import Kernel
from weft.run.computing import compute_of
from weft.run.learner import Learner
from weft.run.train import asked_of

# Above these the run warns. Rounding to e4m3 alone comes to .037 per product and a cosine above .99 over 12 layers.
USUAL_ERROR, USUAL_COSINE = 0.06, 0.98


@dataclass
class Sums:
    """Squares of what a layer's products were off, and of the products, forward and backward."""

    off: Tensor
    all: Tensor

    def add(self, found: Tensor, wanted: Tensor) -> None:
        self.off += (found.float() - wanted.float()).square().sum()
        self.all += wanted.float().square().sum()

    @property
    def relative(self) -> float:
        return float((self.off / self.all.clamp_min(1e-38)).sqrt())


@dataclass(frozen=True)
class Comparing:
    """A kernel that answers in half precision, and adds up how far fp8's answers are from its own."""

    decoding: Decoding
    kernel: Float8Kernel
    forward: Sums
    backward: Sums

    def product(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        wanted = self.decoding.product(x, *tensors)
        with torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1])
            self.forward.add(self.kernel.product(rows, *tensors), wanted.detach().reshape(-1, wanted.shape[-1]))
        if wanted.requires_grad:
            wanted.register_hook(lambda grad: self._note(grad, tensors))
        return wanted

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        self._note(grad, tensors)
        return self.decoding.gradient(grad, *tensors)

    def _note(self, grad: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            rows = grad.reshape(-1, grad.shape[-1])
            self.backward.add(self.kernel.gradient(rows, *tensors), self.decoding.gradient(rows, *tensors))


@dataclass(frozen=True)
class Float8Error:
    """Relative errors of each layer's products by its path; weights: of their rounding; cosines: of each adapter
    tensor's gradient with that of the same weights in half precision, and of all together."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    weights: Mapping[str, float]
    cosine: float
    cosines: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_usual(self) -> bool:
        return max(self.total.values()) <= USUAL_ERROR and self.cosine >= USUAL_COSINE

    @property
    def total(self) -> dict[str, float]:
        """Of each layer's forward product against the weights of the file: two roundings that know nothing of each
        other."""
        return {path: (error**2 + self.weights.get(path, 0.0) ** 2) ** 0.5 for path, error in self.forward.items()}

    def sentence(self) -> str:
        total, grads = self.total, self.backward
        worst, least = max(total, key=lambda path: total[path]), min(self.cosines, key=lambda name: self.cosines[name])
        back = f", of input gradients {median(grads.values()):.2%}" if grads else ""
        head = (
            f"fp8 compute, measured on the first batch: {len(total)} layers, relative error of a product "
            f"{median(total.values()):.2%} in the median, {total[worst]:.2%} in {worst}{back}; the adapter's gradient "
            f"has a cosine of {self.cosine:.4f} with that of the same weights in half precision, and worst of "
            f"{self.cosines[least]:.4f} in {least}."
        )
        if self.is_usual:
            return head
        return (
            f"{head} That is more than rounding explains (at most {USUAL_ERROR:.0%}, and a cosine of at least "
            f"{USUAL_COSINE}): this model has outliers that fp8 does not hold. Compare with family.compute=full."
        )


def layers_in_fp8(network: nn.Module) -> dict[str, PackedLinear]:
    """The layers that are multiplied in fp8, by their paths."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, PackedLinear) and isinstance(module.kernel, Float8Kernel)
    }


@contextmanager
def with_kernels(layers: Mapping[str, PackedLinear], kernels: Mapping[str, Kernel]) -> Iterator[None]:
    """Inside, layers are multiplied by other kernels, and nothing is compiled."""
    before = {path: layer.kernel for path, layer in layers.items()}
    for path, kernel in kernels.items():
        layers[path].kernel = kernel
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for path, kernel in before.items():
            layers[path].kernel = kernel


def measured(network: nn.Module, parameters: Mapping[str, Tensor], ask: Callable[[], Loss]) -> Float8Error:
    """The error of one question: asked in half precision, where each layer is compared on the way, and in fp8.

    ask must draw the same chance each time.
    """
    layers = layers_in_fp8(network)
    comparing: dict[str, Comparing] = {}
    for path, layer in layers.items():
        zeros = [torch.zeros((), device=layer.codes.device) for _ in range(4)]
        shape = (layer.out_features, layer.in_features)
        assert isinstance(layer.kernel, Float8Kernel)
        comparing[path] = Comparing(
            Decoding(layer.packing, shape), layer.kernel, Sums(zeros[0], zeros[1]), Sums(zeros[2], zeros[3])
        )
    with with_kernels(layers, comparing):
        wanted = _gradients(ask, parameters)
    with with_kernels(layers, {}):
        found = _gradients(ask, parameters)
    cosines = {name: cosine([found[name]], [wanted[name]]) for name in wanted if bool(wanted[name].any())}
    return Float8Error(
        {path: each.forward.relative for path, each in comparing.items() if float(each.forward.all)},
        {path: each.backward.relative for path, each in comparing.items() if float(each.backward.all)},
        {path: layer.rounding for path, layer in layers.items()},
        cosine([found[name] for name in wanted], list(wanted.values())),
        cosines,
    )


def _gradients(ask: Callable[[], Loss], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(ask().total, list(parameters.values()), allow_unused=True)
    return {name: grad.detach() for name, grad in zip(parameters, found, strict=True) if grad is not None}


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Of all numbers of two lists of tensors, summed in fp64."""
    a, b = (torch.cat([tensor.flatten().double().cpu() for tensor in tensors]) for tensors in (one, other))
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


class FirstBatch:
    """Measures once, before a run's first step, and says what came of it; nothing where nothing is in fp8."""

    def __init__(self, family: ModelFamily, tell: Listener) -> None:
        self._tell, self._done = tell, compute_of(family) == "full"

    def __call__(self, phase: Phase, learner: Learner, batches: Sequence[Batch]) -> None:
        if self._done:
            return
        self._done = True
        reason = "objectives that carry a state" if not isinstance(learner.state, NoState) else None
        if learner.engine.world > 1:
            reason = "several processes"
        if reason is not None:
            self._tell(Notice(text=f"fp8 compute: its error is not measured with {reason}; a run without says it"))
            return
        ask, _ = asked_of(phase, learner, batches)[0]
        role = phase.role
        with learner.model.adapters.use(role):

            def asked() -> Loss:
                with learner.engine.computing():
                    return ask()

            error = measured(learner.model.network, learner.model.adapters.parameters(role), asked)
        self._tell(Notice(text=error.sentence()))
