"""HunyuanVideo computed by Weft's own code: diffusers' numbers, and masks only where texts differ in length."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.families.networks import hunyuan, hunyuan_inputs
from tests.families.test_lean_wan import adapted, errors, learned
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.contracts import Denoise
from weft.engines.recompute import recompute
from weft.families.hunyuan_network import prepared as made_ready
from weft.families.hunyuan_video import HunyuanVideo
from weft.families.lean_hunyuan import lean_blocks, make_lean
from weft.families.video_attention import set_video_attention
from weft.families.weights import HERE
from weft.math import by_tokens
from weft.math.joint_attention import Ragged
from weft.math.sdpa import KERNELS
from weft.run.counting import Pass, counted, counted_pass
from weft.run.rehearsal import default_dtype

# Relative, of all numbers together: fp32 rounds at 6e-8, and sums are taken in another order.
FP32 = 1e-6
KINDS: dict[str, dict[str, Any]] = {
    "double and single blocks": {},
    "double blocks alone": {"num_single_layers": 0},
    "single blocks alone": {"num_layers": 0},
    "no guidance": {"guidance_embeds": False},
}
LENGTHS = {"texts of one length": (5, 5), "texts of different lengths": (5, 3)}
PLACES = {  # adapted layers, by a part of their path
    "attention and ffn": "attn.|.ff|proj_mlp|proj_out|attn.to",
    "some": "transformer_blocks.1.attn.to_k|transformer_blocks.0.ff_context|single_transformer_blocks.1.proj_out",
    "modulation too": "norm|attn.to_q|proj_mlp",
    "text refiner and embedders": "context_embedder|time_text_embed|attn.add_v_proj",
}


def question(network: Any, lengths: tuple[int, ...] = (5, 5)) -> dict[str, Any]:
    inputs = hunyuan_inputs(network, len(lengths))
    inputs["encoder_attention_mask"] = torch.arange(5) < torch.tensor(lengths)[:, None]
    return inputs if network.config.guidance_embeds else {**inputs, "guidance": None}


def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same question, known to be without padding where it is."""
    return {**inputs, "encoder_attention_mask": None} if inputs["encoder_attention_mask"].all() else inputs


def paths_of(network: nn.Module, among: str = "attention and ffn") -> list[str]:
    inside = among == "text refiner and embedders"
    parts = PLACES[among].split("|")
    return [
        path for path in layers_of(network)
        if any(part in path for part in parts) and (inside or "transformer_blocks." in path)
    ]  # fmt: skip


def both(kind: str, lengths: tuple[int, ...], among: str = "attention and ffn", **recipe: Any) -> list[float]:
    """Errors of the lean network against diffusers' own under its whole mask, with the same adapters."""
    found = []
    for lean in (False, True):
        network = hunyuan(**KINDS[kind])
        inputs = question(network, lengths)
        if lean:
            make_lean(network)
            inputs = trimmed(inputs)
        adapters = adapted(network, paths_of(network, among), **recipe)
        torch.manual_seed(5)  # of dropout
        found.append(learned(network, adapters, inputs))
    return errors(found[1], found[0])


# ---- The same numbers ----


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_velocities_and_gradients_are_diffusers_own_under_its_whole_mask(kind: str, lengths: str):
    assert max(both(kind, LENGTHS[lengths])) < FP32


@pytest.mark.parametrize("among", PLACES)
def test_adapters_may_stand_on_any_linear_layer(among: str):
    assert max(both("double and single blocks", (5, 3), among, backend="peft")) < FP32


@pytest.mark.parametrize("recipe", [{"dora": True}, {"init": "pissa"}, {"input_dropout": 0.5}])
def test_a_layer_whose_adapter_is_more_than_two_factors_is_called_itself(recipe: dict[str, Any]):
    assert max(both("double and single blocks", (5, 5), "some", **recipe)) < FP32


def test_a_text_without_padding_is_answered_alike_with_a_mask_and_without():
    network = hunyuan()
    make_lean(network)
    inputs = question(network)
    with torch.no_grad():
        masked, free = network(**inputs)[0], network(**trimmed(inputs))[0]
    assert errors([free], [masked])[0] < FP32


def test_without_a_mask_attention_runs_by_the_fused_kernel_alone():
    network = hunyuan()
    make_lean(network)
    with torch.no_grad():
        names = counted(lambda: network(**trimmed(question(network)))).names
    assert names["_scaled_dot_product_flash_attention_for_cpu"] == 4 + 1  # of the blocks, and of the text refiner's
    assert not any(name in names for name in ("logsumexp", "masked_fill", "bitwise_and"))


def halved(dtype: torch.dtype, lean: bool) -> nn.Module:
    """A network as a family loads it in half precision."""
    network: Any = hunyuan()
    return made_ready(network.to(dtype), lean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_under_autocast_it_is_no_further_from_fp32_than_diffusers_own_code(dtype: torch.dtype, lengths: str):
    truth_network: Any = halved(dtype, lean=False).float()  # the same weights, rounded
    paths, inputs = paths_of(truth_network), question(truth_network, LENGTHS[lengths])
    truth = learned(truth_network, adapted(truth_network, paths), inputs)
    found = []
    for lean in (True, False):
        network = halved(dtype, lean)
        asked = trimmed(inputs) if lean else inputs
        found.append(errors(learned(network, adapted(network, paths), asked, dtype), truth))
    # Rounding is chance: a tenth more is none.
    assert all(own < 1.1 * theirs for own, theirs in zip(*found, strict=True)), found


@pytest.mark.parametrize("lengths", LENGTHS)
def test_where_no_fused_kernel_fits_autograd_follows_torchs_attention(lengths: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weft.math.normed_attention.kernel_here", lambda q, k, v: None)
    assert max(both("double and single blocks", LENGTHS[lengths])) < FP32


def test_a_backend_that_was_chosen_by_name_is_the_one_that_runs():
    network = hunyuan()
    make_lean(network)
    inputs = question(network, (5, 3))
    expected = network(**inputs)[0]
    set_video_attention(network, "math")
    seen = counted(lambda: network(**inputs)).names
    assert seen["_scaled_dot_product_flash_attention_for_cpu"] == 1  # of the text refiner's, which has no choice
    assert errors([network(**inputs)[0]], [expected])[0] < FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_kernel_gives_the_answer_and_the_gradients_of_a_masked_softmax(dtype: torch.dtype):
    torch.manual_seed(0)
    wide = [torch.randn(2, 3, 11, 8).to(dtype).double().requires_grad_() for _ in "qkv"]
    mask = (torch.arange(4) < torch.tensor([[1], [3]]))[:, None, None]
    whole = torch.cat([torch.ones(2, 1, 1, 7, dtype=torch.bool), mask], -1)
    answer = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=whole)
    grad = torch.randn(answer.shape)
    answer.backward(grad.double())

    q, k, v = (x.detach().to(dtype) for x in wide)
    kernel = Ragged(KERNELS["cpu-flash"], mask)
    out, sums, extras = kernel.forward(q, k, v, 8**-0.5)
    found = kernel.backward(grad.to(dtype), (q, k, v), out, sums, 8**-0.5, extras)
    truth = [answer.detach(), *(x.grad for x in wide if x.grad is not None)]
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert max(errors([x.double() for x in (out, *found)], truth)) < bound
    hidden = ~mask.expand(2, 3, 1, 4).squeeze(2)
    assert not found[1][:, :, 7:][hidden].any() and not found[2][:, :, 7:][hidden].any()


def test_a_familys_question_is_the_same_with_and_without_lean(hunyuan_folder: Any):
    chance = torch.Generator().manual_seed(0)
    for mask in (torch.tensor([[True], [True]]), torch.arange(6) < torch.tensor([[6], [2]])):
        told = {"text": torch.randn(2, 6, 32), "text_mask": mask, "pooled": torch.randn(2, 20)}
        asked = Denoise(torch.randn(2, 16, 3, 4, 6, generator=chance), torch.tensor([0.8, 0.2]), told)
        answers = []
        for lean in (True, False):
            family = HunyuanVideo(source=str(hunyuan_folder), lean=lean)
            with torch.no_grad():
                answers.append(family.forward(family.load("fp32", "default", HERE), asked))
        assert errors(answers[:1], answers[1:])[0] < FP32


def test_tables_of_places_are_made_once_for_each_shape_whatever_the_length_of_the_text():
    network: Any = hunyuan()
    make_lean(network)
    seen: list[Tensor] = []
    network.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    inputs = trimmed(question(network))
    shorter = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]}
    other = {**inputs, "hidden_states": inputs["hidden_states"][:, :, :1]}
    with torch.no_grad():
        for asked in (inputs, shorter, other):
            network(**asked)
    assert [table.shape[1] for table in seen] == [8 + 5, 8 + 3, 4 + 5]
    assert seen[0].data_ptr() == seen[1].data_ptr() != seen[2].data_ptr()


# ---- Who wants no gradient does no work; recomputed and compiled ----


def test_blocks_below_the_lowest_adapter_build_no_graph():
    network: Any = hunyuan()
    make_lean(network)
    adapters = adapted(network, ["single_transformer_blocks.1.attn.to_q"])
    graphs: list[bool] = []
    for block in network.single_transformer_blocks:
        block.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    learned(network, adapters, trimmed(question(network)))
    assert graphs == [False, True]


@pytest.mark.parametrize("kind", [True, "selective"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_recomputed_blocks_learn_the_same(kind: Any, lengths: str, monkeypatch: pytest.MonkeyPatch):
    """To the bit where their attention is kept; else what each token does by itself is computed in pieces, and a single
    block's two halves are added in another order."""
    monkeypatch.setattr(by_tokens, "AT_ONCE", 8)
    monkeypatch.setattr(by_tokens, "ALIGNED", 2)
    found = []
    for recomputed in (False, True):
        network: Any = hunyuan()
        make_lean(network)
        adapters = adapted(network, paths_of(network))
        for block in (*network.transformer_blocks, *network.single_transformer_blocks) if recomputed else ():
            recompute(block, None, None, kind)
        found.append(learned(network, adapters, trimmed(question(network, LENGTHS[lengths]))))
    assert all(map(torch.equal, *found)) if kind == "selective" else max(errors(found[1], found[0])) < FP32


@pytest.fixture
def compiler() -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS)
def test_compiled_blocks_are_a_graph_of_each_kind_without_breaks_whatever_the_frames_of_as_many_tokens(
    lengths: str, compiler: dict[str, Any]
):
    network: Any = hunyuan(num_layers=1)
    make_lean(network)
    adapters = adapted(network, paths_of(network))
    inputs = trimmed(question(network, LENGTHS[lengths]))
    eager = learned(network, adapters, inputs)
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.compile(fullgraph=True, backend="aot_eager")
    assert max(errors(learned(network, adapters, inputs), eager)) < FP32
    learned(network, adapters, {**inputs, "hidden_states": inputs["hidden_states"].reshape(2, 16, 4, 2, 4)})
    assert compiler["stats"]["unique_graphs"] == 2
    assert not compiler["graph_break"]


# ---- Bars ----

WIDTH, HEADS, RANK, TEXT = 3072, 24, 32, 256
TOKENS = (4096, 32_760)  # an image of 1024 x 1024 and 81 frames at 480 x 832, on fake tensors
FLOORS = {"double": 6 + 4, "single": 5 + 4}  # x, q, k, v, out, of a double block x before its ffn; and 4 d of the ffn


class OneBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        single = kind == "single"
        block: Any = HunyuanVideoSingleTransformerBlock if single else HunyuanVideoTransformerBlock
        self.transformer_blocks = nn.ModuleList([block(HEADS, WIDTH // HEADS, mlp_ratio=4.0)])
        lean_blocks([] if single else self.transformer_blocks, self.transformer_blocks if single else [])

    def forward(self, *args: Any) -> Tensor:
        answer = self.transformer_blocks[0](*args)
        return answer if isinstance(answer, Tensor) else torch.cat(answer, 1)


@cache
def passes(kind: str, dtype: torch.dtype) -> tuple[Pass, Pass, int]:
    """Of so many tokens, and the bytes by which one Nd differs between them."""
    few, many = (pass_of(kind, tokens, dtype) for tokens in TOKENS)
    return few, many, (TOKENS[1] - TOKENS[0]) * WIDTH * dtype.itemsize


def pass_of(kind: str, tokens: int, dtype: torch.dtype) -> Pass:
    with FakeTensorMode():
        with default_dtype(dtype):
            network = OneBlock(kind).requires_grad_(False)
        paths = [path for path in layers_of(network) if "norm" not in path]
        adapters = Lora(rank=RANK, backend="native").attach(network, paths, ["default"], 0)
        own = tokens + TEXT if kind == "single" else tokens
        x = torch.empty(1, own, WIDTH, dtype=dtype, requires_grad=True)
        text = torch.empty(1, TEXT, WIDTH, dtype=dtype, requires_grad=True)
        temb, turn = torch.empty(1, WIDTH), torch.empty(2, tokens + TEXT, 1, WIDTH // HEADS)
        args = (x, temb, None, turn) if kind == "single" else (x, text, temb, None, turn)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return network(*args)

        with adapters.use("default"):
            return counted_pass(forward, [temb, turn, *network.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FLOORS)
def test_a_block_keeps_its_floor_and_at_most_half_a_tensor_more(kind: str, dtype: torch.dtype):
    """More are rank activations, and some numbers a token and head."""
    few, many, unit = passes(kind, dtype)
    assert FLOORS[kind] <= (many.saved - few.saved) / unit <= FLOORS[kind] + 0.5


@pytest.mark.parametrize(("kind", "forward", "backward"), [("double", 140, 220), ("single", 70, 110)])
def test_a_single_block_starts_at_most_70_kernels_forward_and_110_backward_and_two_streams_twice_as_many(
    kind: str, forward: int, backward: int
):
    few, many, _ = passes(kind, torch.bfloat16)
    assert few.forward.operations == many.forward.operations <= forward, few.forward.names
    assert few.backward.operations == many.backward.operations <= backward, few.backward.names
    assert few.forward.syncs == few.backward.syncs == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FLOORS)
def test_pointwise_mathematics_moves_at_most_100_tensors_forward_and_170_backward(kind: str, dtype: torch.dtype):
    few, many, unit = passes(kind, dtype)
    moved = [(many.forward.pointwise - few.forward.pointwise) / unit]
    moved.append((many.backward.pointwise - few.backward.pointwise) / unit)
    assert moved[0] <= 100 and moved[1] <= 170, moved
