"""Streaming and offloading around compiled blocks: no graph is made anew for weights that lie elsewhere each time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from tests.engines.test_compiling import CPU, TWO_LAYERS, compiled_learner, gradients, traced_only
from tests.learners import batch_of, learner_of, small_config, trained
from tests.small import make_wan
from weft.engines.compiling import Compiler, compiler_missing
from weft.engines.residency import Residence
from weft.run.learner import Learner

RECOMPUTED = Residence(recompute=True, stream_blocks=3, offload_inputs=True)
ONCE = Residence(stream_blocks=3)
AWAY = Residence(stream_blocks=3, offload_activations=True)


def parted(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Torch's own partition into a forward and a backward graph, which keep frozen weights for the latter as inductor's
    do; run operator by operator."""

    def plain(module: torch.fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=plain, bw_compiler=plain, partition_fn=min_cut_rematerialization_partition)
    return backend(graph, list(inputs))  # type: ignore[return-value]


def learner_with(root: Path, model: Path, residence: Residence, budget: float) -> Learner:
    learner = compiled_learner(small_config(root, model, **TWO_LAYERS), Compiler(budget, backend=parted), residence)
    if learner.engine.activations is not None:  # type: ignore[attr-defined]
        learner.engine.activations.least = 0  # type: ignore[attr-defined]
    return learner


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("compiled") / "model", layers=4)


@pytest.fixture(scope="module")
def expected(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Of the same operators where all weights stay, as they were traced, in one graph of both passes."""
    config = small_config(tmp_path_factory.mktemp("resident"), deep, **TWO_LAYERS)
    return gradients(compiled_learner(config, Compiler(backend=traced_only)), batch_of(2))


# A budget where a run may have one: a recomputed block keeps next to nothing without.
@pytest.mark.parametrize(("residence", "budget"), [
    pytest.param(RECOMPUTED, 1.0, marks=pytest.mark.slow), pytest.param(ONCE, 1.0, marks=pytest.mark.slow),
    (AWAY, 0.5),
], ids=["recomputed", "once", "away"])  # fmt: skip
def test_ten_steps_of_streaming_are_two_graphs_and_the_gradients_of_what_stays(
    deep, tmp_path, expected, residence, budget
):
    streaming = learner_with(tmp_path, deep, residence, budget)
    for _ in range(2):
        found = gradients(streaming, batch_of(2))
        assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    trained(streaming, small_config(tmp_path, deep, schedule={"steps": 8}), [batch_of(2)])
    (region,) = streaming.engine.regions  # type: ignore[attr-defined]
    assert region.graphs == 2 and region.stopped is None
    assert streaming.engine.ring.copied  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.timeout(900)  # its kernels may all have to be compiled
@pytest.mark.skipif(compiler_missing(CPU) is not None, reason="there is no C++ compiler")
def test_the_real_compiler_gives_the_gradients_of_none_whether_weights_stay_or_come_from_the_ring(deep, tmp_path):
    """From the ring as the partition above takes them under every residence: here under the one with the most copies.
    Both learners' graphs are equal, so that inductor compiles their kernels once."""
    config = small_config(tmp_path, deep, engine={"compile": True, "activation_budget": 0.5})
    plain = gradients(learner_of(small_config(tmp_path, deep)), batch_of(2))
    resident, streaming = learner_of(config), compiled_learner(config, Compiler(budget=0.5), AWAY)
    for learner in (streaming, resident):
        for _ in range(3):
            found = gradients(learner, batch_of(2))
            for name, gradient in plain.items():
                assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)  # inductor sums in another order
        (region,) = learner.engine.regions  # type: ignore[attr-defined]
        assert region.graphs == 2 and region.stopped is None
