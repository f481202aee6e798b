"""A decoder layer of our own: the model's numbers and gradients, packed or alone, with less kept."""

from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families.test_causal_lm import EAGER, KINDS, alone, gradients, relative, theirs, trained
from tests.small_text import TextKind, make_text, packed
from weft.adapters.lora import Lora
from weft.contracts import DEFAULT, UNLEARNED, Berth, Tokens
from weft.errors import ConfigError
from weft.families.causal_lm import CausalLM
from weft.families.kernels import Kernels
from weft.families.text_packed import PACKING, Packing
from weft.run.counting import Counting, Pass, counted_pass

LONG = [[70, 30, 28], [128]]  # on the mean longer than what is asked under a mask
SHORT = [[7, 9, 1, 12, 5], [20, 3, 2, 8, 1]]
OWN: list[TextKind] = ["granite", "cohere"]  # whose layers are of another kind
LAYERS = r"model\.layers\.\d+\..*_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("lean")
    return cache(lambda kind: make_text(root / kind, kind))


def opened(folder: Path, kernels: Kernels, precision: str = "fp32") -> tuple[CausalLM, Any]:
    family = CausalLM(source=str(folder), kernels=kernels)
    return family, family.load(precision, DEFAULT.name, Berth())


def known(tokens: Tokens) -> Tokens:
    """With what the host knows of a batch."""
    texts = []
    for positions in tokens.positions:
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        texts.append(tuple(b - a for a, b in pairwise(starts)))
    learned = (tokens.labels.flatten() != UNLEARNED).nonzero().flatten()
    return Tokens(tokens.ids, tokens.positions, tokens.labels, learned, tuple(texts))


def adapted(network: nn.Module, backend: Any, stack: ExitStack) -> list[nn.Parameter]:
    paths = [path for path, m in network.named_modules() if path.endswith("_proj") and isinstance(m, nn.Linear)]
    adapters = Lora(rank=4, backend=backend).attach(network, paths, ["default"], 0)
    adapters.initialize()
    chance = torch.Generator().manual_seed(5)
    parameters = adapters.parameters("default")
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].copy_(0.2 * torch.randn(parameters[name].shape, generator=chance))
    stack.enter_context(adapters.use("default"))
    return [parameters[name] for name in sorted(parameters)]


# ---- Numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [LONG, SHORT], ids=["text by text", "under a mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_of_known_lengths_are_answered_as_if_each_were_alone(folder, kind: TextKind, rows) -> None:  # type: ignore[no-untyped-def]
    """Forward and backward, to rounding: fp32 sums in another order, 1e-5 of losses near 10."""
    family, network = opened(folder(kind), Kernels())
    tokens = known(packed(rows, family.config.vocab_size))
    assert Packing(tokens.texts or (), tokens.positions).by_text(None) == (rows is LONG)
    reference = theirs(folder(kind))
    trained(network), trained(reference)
    losses, wanted = family.forward(network, tokens), alone(reference, tokens)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    for ours, truth in zip(gradients(losses, network), gradients(wanted, reference), strict=True):
        assert relative(ours, truth) < 1e-5


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_eager_gradients(folder, kind: TextKind, backend: str) -> None:  # type: ignore[no-untyped-def]
    """To rounding of fp32: 1e-5 of each gradient."""
    answers = []
    for kernels in (Kernels(), EAGER.model_copy(update={"layer": "eager"})):
        family, network = opened(folder(kind), kernels)
        with ExitStack() as stack:
            parameters = adapted(network, backend, stack)
            losses = family.forward(network, known(packed(LONG, family.config.vocab_size)))
            losses.sum().backward()
            answers.append((losses.detach(), [p.grad for p in parameters if p.grad is not None]))
    (ours, found), (truth, wanted) = answers
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    assert len(found) == len(wanted) > 0
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_half_precision_costs_what_it_costs_the_models_own_code(folder, kind: TextKind) -> None:  # type: ignore[no-untyped-def]
    """Both round to bf16's 8 bits in other places: neither is nearer to fp32 than half the other's distance."""
    distances = []
    for kernels in (Kernels(), EAGER.model_copy(update={"layer": "eager"})):
        family, network = opened(folder(kind), kernels)
        tokens = known(packed(LONG, family.config.vocab_size))
        exact = family.forward(network, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            distances.append(relative(family.forward(network, tokens), exact))
    assert distances[0] < 2 * distances[1]


def test_a_layer_of_another_kind_keeps_its_own_code_and_fused_is_refused(folder) -> None:  # type: ignore[no-untyped-def]
    for kind in KINDS:
        _, network = opened(folder(kind), Kernels())
        assert all(("forward" in vars(layer)) == (kind not in OWN) for layer in network.base_model.layers), kind
    with pytest.raises(ConfigError, match=r"family.kernels.layer: 'fused' fits no layer of this model"):
        opened(folder("granite"), Kernels(layer="fused"))
    for eager in (Kernels(layer="eager"), Kernels(mlp="eager")):
        _, network = opened(folder("qwen3"), eager)
        assert not any("forward" in vars(layer) for layer in network.base_model.layers)


def test_a_network_that_is_asked_to_go_on_with_a_text_answers_as_before(folder) -> None:  # type: ignore[no-untyped-def]
    _, network = opened(folder("qwen3"), Kernels())
    prompt = torch.arange(5, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(network.generate(prompt, **options), theirs(folder("qwen3")).generate(prompt, **options))


def test_what_stands_between_the_modules_of_a_layer_is_called(folder) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder("qwen3"), Kernels())
    seen: list[str] = []
    network.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append("attention"))
    family.forward(network, known(packed(LONG, family.config.vocab_size)))
    assert seen == ["attention"]


# ---- Counts -------------------------------------------------------------------------------------------------------

TOKENS = 128


def counted_layer(folder: Path, kernels: Kernels, backend: str) -> tuple[Pass, Any]:
    """Of one layer with LoRA on all its linear layers, one row of one text."""
    _, network = opened(folder, kernels)
    layer = network.model.layers[0]
    with ExitStack() as stack:
        adapted(network, backend, stack)
        positions = torch.arange(TOKENS)[None]
        x = torch.randn(1, TOKENS, network.config.hidden_size, generator=torch.Generator().manual_seed(0))
        turn = network.model.rotary_emb(x, positions)
        asked = {"attention_mask": None, "position_ids": positions, "position_embeddings": turn}
        if kernels.layer != "eager":
            asked[PACKING] = Packing(((TOKENS,),), positions)
        x.requires_grad_()

        def forward() -> Tensor:
            return layer(x, **asked)

        forward()
        return counted_pass(forward, [*network.parameters(), *turn]), network.config


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_a_layer_keeps_its_floor(folder, backend: str) -> None:  # type: ignore[no-untyped-def]
    """x, q, k, v, the answer, x1, gate and up; beside it of o and down the rank activations, and a number a query and
    head. Of width 32: 4 heads of 8 and 2 of keys, gates of 48."""
    found, config = counted_layer(folder("qwen3"), Kernels(), backend)
    d, own = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    floor = (d + own + 2 * keys + own + d + 2 * config.intermediate_size) / d
    beside = (2 * 4 + config.num_attention_heads) / d
    kept = found.saved / (TOKENS * d * 4)
    assert floor <= kept <= floor + beside + 0.5
    theirs_kept = counted_layer(folder("qwen3"), EAGER.model_copy(update={"layer": "eager"}), "peft")[0]
    assert kept * TOKENS * d * 4 < 0.4 * theirs_kept.saved


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_a_layer_starts_and_moves_less_than_the_librarys_both_ways(folder, backend: str) -> None:  # type: ignore[no-untyped-def]
    """In fp32, of width 32, 4 heads of 8 and 2 of keys, gates of 48; beside the listed one fills and scales numbers a
    row. Of a norm 3 passes forward and 2 and 5 backward, the first one in place; of a turn 5, of a gate forward 5,
    and backward 14."""
    found, config = counted_layer(folder("qwen3"), Kernels(), backend)
    theirs_found = counted_layer(folder("qwen3"), EAGER.model_copy(update={"layer": "eager"}), "peft")[0]
    asked = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    d, gate = config.hidden_size, config.intermediate_size
    forward = 5 * (2 * d + asked) + 5 * asked + 5 * gate + 6 * d
    backward = 9 * (2 * d + asked) + 10 * asked + 14 * gate + 6 * d
    for ours, floor, theirs_way in (
        (found.forward, forward, theirs_found.forward), (found.backward, backward, theirs_found.backward)
    ):  # fmt: skip
        moved = ours.pointwise / (TOKENS * 4)
        assert floor < moved < 1.3 * floor, (moved, floor)
        assert ours.pointwise < 0.8 * theirs_way.pointwise
    assert found.backward.operations < theirs_found.backward.operations


def test_nothing_is_computed_backward_below_the_lowest_adapter(folder) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder("qwen3"), Kernels())
    upper = [p for p, m in network.model.layers[1].named_modules() if p.endswith("_proj") and isinstance(m, nn.Linear)]
    adapters = Lora(rank=4).attach(network, [f"model.layers.1.{path}" for path in upper], ["default"], 0)
    adapters.initialize()
    noted: list[bool] = []
    for layer in network.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: noted.append(out.requires_grad))
    with adapters.use("default"):
        losses = family.forward(network, known(packed(LONG, family.config.vocab_size)))
    assert noted == [False, True]
    assert losses.requires_grad and not network.get_input_embeddings()._forward_hooks


class Pairs(TorchDispatchMode):
    """Sums up queries times keys of attention, and the shapes of all that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "attention_for_cpu" in str(func) and "backward" not in str(func):
            self.pairs += args[0].shape[0] * args[0].shape[2] * args[1].shape[2]
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_attention_works_through_the_squares_of_texts_and_makes_no_mask_of_a_row(folder) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder("qwen3"), Kernels())
    row = [[64] * 8]
    with torch.no_grad(), Pairs() as pairs:
        family.forward(network, known(packed(row, family.config.vocab_size, learned=0.05)))
    layers, length = 2, 512
    assert pairs.pairs == layers * 8 * 64 * 64
    assert pairs.largest < length * length
    with torch.no_grad(), Pairs() as masked:
        family.forward(network, packed(row, family.config.vocab_size, learned=0.05))
    assert masked.pairs == layers * length * length


def test_no_operation_of_a_step_waits_for_the_device(folder) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder("qwen3"), Kernels())
    trained(network)
    tokens = known(packed(LONG, family.config.vocab_size))
    with Counting() as counting:
        family.forward(network, tokens).sum().backward()
    assert counting.traffic.syncs == 0
