"""Wan computed by Weft's own code: diffusers' numbers and gradients, less kept, fewer kernels, fewer bytes."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.lean import HEADS, TEXT_TO_VIDEO, adapted, prepared, question
from tests.families.networks import wan
from weft.adapters.modules import layers_of
from weft.contracts import Denoise
from weft.engines.recompute import recompute
from weft.families.lean_wan import make_lean
from weft.families.video_attention import set_video_attention
from weft.families.wan import Wan
from weft.families.wan_network import token_timesteps
from weft.run.counting import counted

# Relative, of all numbers together: fp32 rounds at 6e-8, and sums are taken in another order.
FP32 = 1e-6
KINDS: dict[str, dict[str, Any]] = {
    "text to video": TEXT_TO_VIDEO,
    "a first frame, shown by CLIP": {**HEADS, "channels": 36, "clip": True, "added_kv_proj_dim": 48},
    "no norm before cross-attention": {**HEADS, "cross_attn_norm": False},
    "heads of 128": {},
}
BLOCKS = "blocks."


def learned(network: Any, adapters: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The velocity, and the gradients of the adapters laid end to end."""
    parameters = adapters.parameters("default").values()
    for parameter in parameters:
        parameter.grad = None
    with adapters.use("default"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        velocity = network(**inputs)[0].float()
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    (velocity * weights).sum().backward()
    return [velocity.detach(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    assert [t.shape for t in found] == [t.shape for t in truth]
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True)]


def both(kind: str, among: str = BLOCKS, items: int = 2, **recipe: Any) -> list[float]:
    """Errors of the lean network against diffusers' own, with the same adapters on some layers."""
    found = []
    for lean in (False, True):
        network = wan(**KINDS[kind])
        if lean:
            make_lean(network)
        paths = [path for path in layers_of(network) if path.startswith(tuple(among.split("|")))]
        adapters = adapted(network, paths, **recipe)
        torch.manual_seed(5)  # of dropout
        found.append(learned(network, adapters, question(network, items)))
    return errors(found[1], found[0])


# ---- The same numbers ----


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_velocities_and_gradients_are_diffusers_own_in_fp32(kind: str, backend: str):
    assert max(both(kind, "blocks.", backend=backend)) < FP32


@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize(
    "among", ["blocks.1.attn1.to_k|blocks.2.ffn", "blocks.0.attn2", "blocks|condition_embedder|proj_out"]
)
def test_adapters_may_stand_on_some_layers_and_on_the_embedders_of_times_and_text(among: str, items: int):
    assert max(both("text to video", among, items)) < FP32


@pytest.mark.parametrize("recipe", [{"dora": True}, {"init": "pissa"}, {"backend": "peft", "dora": True}])
def test_a_layer_whose_adapter_is_more_than_two_factors_is_called_itself(recipe: dict[str, Any]):
    assert max(both("text to video", "blocks.0.attn1.to_q|blocks.1.ffn|blocks.1.attn2.to_out", **recipe)) < FP32


def test_dropout_on_an_adapters_input_is_drawn_as_by_diffusers_own_code():
    assert max(both("text to video", "blocks.1.attn1.to_q|blocks.1.ffn.net.2", input_dropout=0.5)) < FP32


@torch.no_grad()
def test_without_adapters_and_without_gradients_the_velocity_is_the_same():
    for kind in KINDS:
        network = wan(**KINDS[kind])
        lean = deepcopy(network)
        make_lean(lean)
        inputs = question(network)
        (error,) = errors([lean(**inputs)[0]], [network(**inputs)[0]])
        assert error < FP32, kind


@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_no_further_from_fp32_than_diffusers_own_code(dtype: torch.dtype, items: int):
    truth_network = prepared(dtype, lean=False).float()  # the same weights, rounded
    paths = [path for path in layers_of(truth_network) if path.startswith("blocks.")]
    inputs = question(truth_network, items)
    truth = learned(truth_network, adapted(truth_network, paths), inputs)
    of_lean, of_diffusers = (
        errors(learned(network, adapted(network, paths), inputs, dtype), truth)
        for network in (prepared(dtype, lean=True), prepared(dtype, lean=False))
    )
    # Rounding is chance: a tenth more is none.
    assert all(own < 1.1 * theirs for own, theirs in zip(of_lean, of_diffusers, strict=True)), (of_lean, of_diffusers)


def test_where_no_fused_kernel_fits_autograd_follows_torchs_attention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weft.math.normed_attention.kernel_here", lambda q, k, v: None)
    assert max(both("a first frame, shown by CLIP")) < FP32


def test_a_backend_that_was_chosen_by_name_is_the_one_that_runs():
    network = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    expected = network(**question(network))[0]
    set_video_attention(network, "math")
    seen = counted(lambda: network(**question(network))).names
    assert not [name for name in seen if "flash" in name]
    assert errors([network(**question(network))[0]], [expected])[0] < FP32


# ---- Times of frames ----


@pytest.mark.parametrize("rows", [[[1, 0, 0], [1, 0, 0]], [[1, 0, 1], [0, 0, 0]]])
def test_frames_that_are_given_have_time_0_as_with_diffusers_times_of_single_tokens(rows: list[list[int]]):
    t, known = torch.tensor([0.7, 0.3]), torch.tensor(rows).bool()
    network = wan(**TEXT_TO_VIDEO)
    lean = deepcopy(network)
    make_lean(lean)
    inputs = question(network)
    by_token = token_timesteps(t, known, inputs["hidden_states"], (1, 2, 2))
    paths = [path for path in layers_of(network) if path.startswith(("blocks.", "condition_embedder."))]
    truth = learned(network, adapted(network, paths), {**inputs, "timestep": by_token})
    adapters = adapted(lean, paths)
    found = learned(lean, adapters, {**inputs, "timestep": 1000 * t, "given": known})
    assert max(errors(found, truth)) < FP32
    # Pipelines of diffusers ask with the times of single tokens: the same answer.
    assert max(errors(learned(lean, adapters, {**inputs, "timestep": by_token}), truth)) < FP32


def test_times_are_embedded_once_for_each_that_there_is_and_never_for_each_token():
    network: Any = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    seen: list[tuple[int, ...]] = []
    network.condition_embedder.time_proj.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    network.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(tuple(args[2].shape)))
    inputs = question(network)
    network(**inputs)
    network(**inputs, given=torch.tensor([[True, False, False]] * 2))
    width = 48
    assert seen == [(2, 1, 6 * width), (2, 1, 6, width), (2, 2, 6 * width), (2, 3, 6, width)]


def test_a_familys_question_is_the_same_with_and_without_lean(wan_folder: Any):
    from weft.families.weights import HERE

    x = torch.randn(2, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    asked = Denoise(x, torch.tensor([0.8, 0.2]), {"text": torch.randn(2, 5, 128)}, torch.tensor([[1, 0, 0]] * 2).bool())
    answers = []
    for lean in (True, False):
        family = Wan(source=str(wan_folder("ti2v")), lean=lean)
        with torch.no_grad():
            answers.append(family.forward(family.load("fp32", "default", HERE), asked))
    assert errors(answers[:1], answers[1:])[0] < FP32


def test_tables_of_places_are_made_once_for_each_shape():
    network: Any = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    seen: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    for _ in range(2):
        network(**question(network))
    assert len({id(table) for table in seen}) == 1
    network(**{**question(network), "hidden_states": torch.randn(2, 16, 1, 4, 6)})
    assert len({id(table) for table in seen}) == 2


# ---- Who wants no gradient does no work ----


def test_blocks_below_the_lowest_adapter_build_no_graph():
    network: Any = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    adapters = adapted(network, ["blocks.1.attn1.to_q"])
    graphs: list[bool] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    learned(network, adapters, question(network))
    assert graphs == [False, True, True]


def test_recomputed_blocks_learn_the_same_to_the_bit():
    found = []
    for recomputed in (False, True):
        network: Any = wan(**TEXT_TO_VIDEO)
        make_lean(network)
        adapters = adapted(network, [path for path in layers_of(network) if path.startswith("blocks.")])
        for block in network.blocks if recomputed else ():
            recompute(block, None, None)
        found.append(learned(network, adapters, question(network)))
    assert all(map(torch.equal, *found))


def test_weights_that_stand_in_for_parameters_are_those_that_answer():
    network = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    adapters = adapted(network, ["blocks.1.attn1.to_q"])
    names = {id(p): name for name, p in network.named_parameters()}
    parameters = list(adapters.parameters("default").values())
    fast = {names[id(p)]: (2 * p).detach().requires_grad_() for p in parameters}
    with adapters.use("default"):
        answer = torch.func.functional_call(network, fast, (), question(network))[0]
        answer.sum().backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(2)
        assert torch.equal(network(**question(network))[0], answer)
    assert all(weight.grad is not None for weight in fast.values())
    assert all(parameter.grad is None for parameter in parameters)


def test_a_gradient_of_a_gradient_is_refused_and_not_wrong():
    network = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    adapters = adapted(network, ["blocks.1.attn1.to_q"])
    parameters = list(adapters.parameters("default").values())
    with adapters.use("default"):
        loss = network(**question(network))[0].square().sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.stack([each.square().sum() for each in gradients]).sum().backward()


# ---- Compiled ----


@pytest.fixture
def fresh_compiler() -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["native", pytest.param("peft", marks=pytest.mark.slow)])
def test_compiled_blocks_are_two_graphs_without_breaks_and_know_only_how_many_tokens_there_are(
    backend: str, fresh_compiler: dict[str, Any]
):
    """Two: what block 0 is given wants no gradient."""
    network: Any = wan(**TEXT_TO_VIDEO)
    make_lean(network)
    adapters = adapted(network, [p for p in layers_of(network) if p.startswith("blocks.")], backend=backend)
    inputs = question(network)
    eager = learned(network, adapters, inputs)
    for block in network.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert max(errors(learned(network, adapters, inputs), eager)) < FP32
    other = inputs["hidden_states"].reshape(2, 16, 1, 12, 6)  # 18 tokens too
    learned(network, adapters, {**inputs, "hidden_states": other})
    assert fresh_compiler["stats"]["unique_graphs"] == 2
    assert not fresh_compiler["graph_break"]
