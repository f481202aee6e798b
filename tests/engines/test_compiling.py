"""Blocks that are compiled: two graphs of equal blocks, the gradients of those that are not, and a memory budget."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.learners import ROLE, TEXT_WIDTH, Given, batch_of, learner_of, shake, small_config, trained, weights
from tests.small import make_qwen3, make_wan
from weft.contracts import Batch, NoState
from weft.engines.compiling import Compiler, Region, compiler_missing
from weft.engines.parallel import Layout
from weft.engines.residency import Residence
from weft.engines.single_device import SingleEngine
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError
from weft.events import StepEnded
from weft.run.assemble import assemble
from weft.run.learner import Learner
from weft.run.partitions import Accounts

CPU = torch.device("cpu")
# One adapted layer of each shape: a compiler reads every one of them anew.
TWO_LAYERS = {"adapter": {"targets": ("attn1.to_q", "ffn.net.2")}}


def traced_only(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that runs what was traced operator by operator."""
    return graph.forward


def compiled_learner(config: Any, compiler: Compiler, residence: Residence | None = None) -> Learner:
    torch.set_num_threads(1)
    learner = assemble(config, SingleEngine(CPU, "fp32", residence, compiler=compiler))
    shake(learner)
    return learner


def clip(items: int, frames: int, height: int, width: int) -> Batch:
    chance = torch.Generator().manual_seed(frames)
    shape = (items, 16, frames, height, width)
    tensors = {name: torch.randn(shape, generator=chance) for name in ("latents", "noise")}
    text = torch.randn(items, 5, TEXT_WIDTH, generator=chance)
    return Batch({**tensors, "text": text, "t": torch.rand(items, generator=chance)}, ("a", "b")[:items])


def gradients(learner: Learner, batch: Batch, role: str | None = ROLE) -> dict[str, Tensor]:
    with learner.model.adapters.use(role):
        Given().loss("train", learner.model, batch, NoState(), None).total.backward()
    found = {name: p.grad for name, p in weights(learner).items()}
    for parameter in weights(learner).values():
        parameter.grad = None
    return found


# ---- Graphs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("compiled") / "model", layers=3)


@pytest.mark.slow
def test_a_network_of_equal_blocks_is_two_graphs_and_is_compiled_anew_for_a_second_number_of_tokens_alone(
    deep, tmp_path
):
    """Block 0's input wants no gradient. Shapes of equal token counts, adapters off and on again, and samples between
    steps compile nothing; a second number of tokens makes graphs for all numbers."""
    torch._dynamo.reset()  # of blocks that were compiled before with other numbers of tokens it would make symbols
    config = small_config(tmp_path, deep, **TWO_LAYERS)
    learner = compiled_learner(config, Compiler(backend=traced_only))
    (region,), plain = learner.engine.regions, learner_of(config)
    found, expected = gradients(learner, batch_of(2)), gradients(plain, batch_of(2))
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert region.graphs == 2
    for shape in ((1, 8, 4), (4, 4, 2), (2, 4, 4)):  # as many tokens
        gradients(learner, clip(2, *shape))
    learner.model.network.eval()
    Given().measure(learner.model, batch_of(2), "default", 0.5, 0)
    learner.model.network.train()
    assert region.graphs == 2
    for frames in (3, 5, 2, 4):
        gradients(learner, clip(2, frames, 4, 4))
    assert region.graphs == 4 and region.stopped is None


class Block(nn.Module):
    """A frozen layer and a change of it, of a strength that is a number."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width).requires_grad_(False)
        self.change = nn.Parameter(torch.full((width, width), 0.1))
        self.in_use = "none"
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        if self.in_use != "none":
            y = y + x @ self.change * float(len(self.in_use))
        if self.breaks:
            torch._dynamo.graph_break()  # what no graph can hold
        return y


def region_of(blocks: Sequence[nn.Module], told: list[str], limit: int = 64, strict: bool = True) -> Region:
    region = Region(Compiler(backend=traced_only, strict=strict, tell=told.append), limit)
    for block in blocks:
        region.compile(block)
    return region


def test_what_was_compiled_once_is_there_when_it_comes_back():
    blocks, told = [Block() for _ in range(3)], []
    region = region_of(blocks, told)
    for name in ("none", "one", "other", "none", "one", "other"):
        for block in blocks:
            block.in_use = name
            block(torch.ones(2, 4))
    assert region.graphs == 3 and not told


def test_networks_do_not_count_each_others_graphs():
    first, second = (region_of([Block()], []) for _ in range(2))
    blocks = [Block(), Block()]
    first.compile(blocks[0])
    second.compile(blocks[1])
    for block in blocks:
        block(torch.ones(2, 4))
    assert (first.graphs, second.graphs) == (1, 1)


def test_a_storm_of_recompilations_ends_with_a_word_and_the_block_goes_on():
    block, told = Block(), []
    plain = block.forward
    region = region_of([block], told, limit=3)
    for number in range(6):
        block.in_use = f"role {number}"
        assert_close(block(torch.ones(2, 4)), plain(torch.ones(2, 4)))
    assert region.graphs == 3 and region.stopped
    assert len(told) == 1 and "compiled anew 3 times" in told[0]


def test_what_cannot_be_compiled_is_an_error_where_compiling_was_asked_for_and_else_a_word():
    strict, loose, told = Block(), Block(), []
    for block in (strict, loose):
        block.breaks = True
    region_of([strict], told)
    with pytest.raises(ConfigError, match=r"engine.compile: a block of this model cannot be compiled: .*compile=false"):
        strict(torch.ones(2, 4))
    region = region_of([loose], told, strict=False)
    loose(torch.ones(2, 4))
    loose(torch.ones(2, 4))
    assert region.stopped and len(told) == 1


def test_questions_without_gradient_of_a_network_at_rest_are_not_compiled():
    block = Block().eval()
    region = region_of([block], [])
    with torch.no_grad():
        block(torch.ones(2, 4))
    assert region.graphs == 0
    block.train()(torch.ones(2, 4))
    assert region.graphs == 1


# ---- What goes together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "said"), [
    ({"compile": True, "recompute": "selective"}, "selective is for blocks that are not compiled"),
    ({"compile": False, "activation_budget": 0.5}, "Write compile: true"),
    ({"activation_budget": 0.5}, "Write compile: true"),
    ({"compile": True, "recompute": True, "activation_budget": 0.5}, "keeps next to nothing"),
    ({"compile": True, "activation_budget": 1.5}, "less than or equal to 1"),
])  # fmt: skip
def test_settings_that_exclude_each_other_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Torch(**fields)


def test_parted_sequences_are_not_compiled():
    with pytest.raises(ConfigError, match=r"engine.compile: not with parallel.sequence=2"):
        Torch(compile=True).check(Layout(1, 1, 2))


def test_an_engine_that_compiles_does_not_offer_fast_weights():
    engine = SingleEngine(CPU, "fp32", compiler=Compiler(backend=traced_only))
    assert "functional" not in engine.can
    assert "functional" not in Torch(compile=True).can(Layout())
    assert "functional" in Torch().can(Layout())


def test_a_device_without_a_compiler_is_told():
    assert "no compiler that Weft was tried with" in (compiler_missing(torch.device("mps")) or "")


# ---- Slow: the partitioner, whole runs -------------------------------------------------------------------------------


def losses(told: Sequence[Any]) -> list[float]:
    return [event.metrics["train/loss"] for event in told if isinstance(event, StepEnded)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "budget", "targets"), [(False, 0.5, {}), (True, 1.0, TWO_LAYERS)], ids=["kept", "recomputed"]
)
def test_compiled_training_is_eager_training(model, tmp_path, recompute, budget, targets):
    """Twenty steps in fp32, parted under a budget of one half, or recomputed as a whole, where there is no budget: sums
    in another order, 1e-5 of a loss."""
    config = small_config(tmp_path, model, schedule={"steps": 20}, **targets)
    batches = [batch_of(2, seed) for seed in range(4)]
    expected = losses(trained(learner_of(config), config, batches))
    compiler = Compiler(budget=budget, backend=Accounts())
    learner = compiled_learner(config, compiler, Residence(recompute=recompute))
    found = losses(trained(learner, config, batches))
    assert len(found) == 20 and found == pytest.approx(expected, rel=1e-5)
    assert learner.engine.regions[0].stopped is None


@pytest.mark.slow
def test_a_compiled_language_model_gives_the_gradients_of_one_that_is_not(tmp_path):
    from tests.small_text import packed
    from weft.families.causal_lm import CausalLM

    family = CausalLM(source=str(make_qwen3(tmp_path / "model", layers=3)))
    tokens, found = packed([[7, 9], [5, 11]], 300), []
    for compiler in (None, Compiler(budget=0.5, backend=Accounts())):
        torch.manual_seed(0)
        engine = SingleEngine(CPU, "fp32", compiler=compiler)
        network = family.load("fp32", "default", engine.berth(0))
        for block in family.blocks(network):
            block.mlp.down_proj.weight.requires_grad_()
        engine.place(network, family.blocks(network)).train()
        family.forward(network, tokens).sum().backward()
        found.append([block.mlp.down_proj.weight.grad for block in family.blocks(network)])
    assert engine.regions[0].graphs <= 2
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_compiled_blocks_on_a_gpu_give_the_gradients_of_plain_ones(model, tmp_path):
    on = {"device": "cuda", "precision": "fp32"}
    found = []
    for engine in ({**on, "compile": True, "activation_budget": 0.5}, {**on, "compile": False}):
        learner = learner_of(small_config(tmp_path, model, engine=engine))
        found.append(gradients(learner, learner.engine.put(batch_of(2))))
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5)
