"""Faster twins of a language model's layers: the same numbers, on single modules, and refused where they do not fit."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tests.families.test_causal_lm import EAGER, KINDS, ROWS, gradients, relative, trained
from tests.small_text import SIZES, TextKind, make_text, packed
from weft.contracts import DEFAULT, Berth
from weft.errors import ConfigError
from weft.families.causal_lm import CausalLM
from weft.families.kernels import Kernels
from weft.families.text_attention import cuts
from weft.families.text_kernels import ROTARY, gated, norm_form, norms_of, turned
from weft.families.text_network import prepared
from weft.math.cross_entropy import Logits

GEMMA = ("gemma2", "gemma3_text")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("kernels")
    return cache(lambda kind: make_text(root / kind, kind))


def answers(
    folder: Path, kernels: Kernels, device: str = "cpu", precision: str = "fp32"
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and gradients of the first and the last layer."""
    family = CausalLM(source=str(folder), kernels=kernels)
    network = family.load(precision, DEFAULT.name, Berth()).to(device)
    tokens = packed(ROWS, family.config.vocab_size)
    tokens = type(tokens)(*(t.to(device) for t in (tokens.ids, tokens.positions, tokens.labels)))
    trained(network)
    losses = family.forward(network, tokens)
    return losses.detach(), gradients(losses, network)


FUSED = {"rms_norm": "fused", "mlp": "fused", "rotary": "fused"}


@pytest.mark.parametrize("kernel", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_kernel_gives_the_eager_numbers_and_gradients(folder, kind: TextKind, kernel: str) -> None:  # type: ignore[no-untyped-def]
    """To rounding of fp32."""
    if (kind, kernel) in (("cohere", "rms_norm"), ("cohere", "rotary"), ("qwen3_moe", "mlp")):
        pytest.skip("it has no such layer; refused, see below")
    losses, grads = answers(folder(kind), EAGER.model_copy(update={kernel: FUSED[kernel]}))
    wanted, truth = answers(folder(kind), EAGER)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert all(relative(a, b) < 1e-5 for a, b in zip(grads, truth, strict=True))


def test_norms_are_told_apart_by_what_they_answer(folder) -> None:  # type: ignore[no-untyped-def]
    for kind in KINDS:
        network = CausalLM(source=str(folder(kind)), kernels=EAGER).load("fp32", DEFAULT.name, Berth())
        forms = {norm_form(module) for module in norms_of(network)}
        offsets = {None if form is None else form.offset for form in forms}
        assert offsets == ({1.0} if kind in GEMMA else {None} if kind == "cohere" else {0.0}), kind
        assert all(form is None or form.eps == network.config.rms_norm_eps for form in forms)


def test_gemmas_norm_in_half_precision_keeps_small_weights(folder) -> None:  # type: ignore[no-untyped-def]
    """1 + w in bf16 would round w = 0.001 away; its own code adds in fp32, and so does the twin."""
    family = CausalLM(source=str(folder("gemma2")), kernels=EAGER)
    norm = next(norms_of(family.load("bf16", DEFAULT.name, Berth())))
    norm.weight.data.fill_(0.001)
    x = torch.linspace(-2, 2, 32, dtype=torch.bfloat16)[None]
    form = norm_form(norm)
    assert form is not None
    assert torch.equal(form(x, norm.weight), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_a_gated_layer_is_eager_to_the_bit_and_keeps_two_tensors(name: str, dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, 5, generator=chance).to(dtype).requires_grad_() for _ in range(2))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours = gated(a, b, name)
        fused, _ = list(kept), kept.clear()
        act = functional.silu(a) if name == "silu" else functional.gelu(a, approximate="tanh")
        wanted = act * b
    assert (len(fused), len(kept)) == (2, 3)
    assert torch.equal(ours, wanted)
    share = torch.randn(6, 5, generator=chance).to(dtype)
    for found, truth in zip(
        torch.autograd.grad(ours, (a, b), share), torch.autograd.grad(wanted, (a, b), share), strict=True
    ):
        assert torch.equal(found, truth)


def test_turning_by_an_angle_and_back_changes_nothing() -> None:
    q, k = torch.randn(2, 1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    angle = torch.linspace(0, 3, 20).view(1, 5, 4).repeat(1, 1, 2)
    there = turned(q, k, angle.cos(), angle.sin())
    back = turned(*there, angle.cos(), -angle.sin())
    torch.testing.assert_close(back[0], q)
    torch.testing.assert_close(back[1], k)
    torch.testing.assert_close(there[0].norm(dim=-1), q.norm(dim=-1))


def test_kernels_stand_on_one_network_and_leave_transformers_as_it_is(folder) -> None:  # type: ignore[no-untyped-def]
    kernels = Kernels(rms_norm="fused", mlp="fused", rotary="fused", attention="flex")
    changed = CausalLM(source=str(folder("qwen3")), kernels=kernels).load("fp32", DEFAULT.name, Berth())
    file = sys.modules[type(changed).__module__]
    own = vars(file)[ROTARY]
    other = CausalLM(source=str(folder("qwen3")), kernels=EAGER).load("fp32", DEFAULT.name, Berth())
    assert own.__module__ == file.__name__
    assert [path for path, m in other.named_modules() if "forward" in vars(m)] == [""]  # itself alone
    assert {path for path, m in changed.named_modules() if "forward" in vars(m)} > {
        "model.norm", "model.layers.1.mlp", "model.layers.0.self_attn", "model.layers.0.self_attn.q_norm"
    }  # fmt: skip
    assert (changed.config._attn_implementation, other.config._attn_implementation) == ("weft_flex", "eager")


def test_rows_are_cut_for_varlen_kernels_where_positions_begin_anew() -> None:
    """Conversations of 3 and 2 tokens with 1 of padding, then one of 6: ends at 3, 5, 6 and 12."""
    told = cuts(torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]))
    assert told["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 12]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_k"] == 6


# ---- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "kernels", "message"),
    [
        ("qwen3", {"cross_entropy": "liger"}, r"family.kernels.cross_entropy: 'liger' .*'weft\[liger\]'"),
        ("qwen3", {"mlp": "liger"}, r"family.kernels.mlp: 'liger' .*'weft\[liger\]'"),
        ("qwen3", {"attention": "flash"}, r"family.kernels.attention: 'flash' .*'weft\[flash\]'"),
        ("cohere", {"rms_norm": "fused"}, "family.kernels.rms_norm: 'fused' fits no layer of this model"),
        ("cohere", {"rotary": "fused"}, "family.kernels.rotary: 'fused' fits no layer of this model"),
        ("qwen3_moe", {"mlp": "fused"}, "family.kernels.mlp: 'fused' fits no layer of this model"),
        ("gemma2", {"attention": "sdpa"}, "'sdpa' is nothing that Gemma2ForCausalLM can. Write flex, flash, eager"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused_by_name(folder, kind: TextKind, kernels, message: str) -> None:  # type: ignore[no-untyped-def]
    if "weft" in message and torch.cuda.is_available():
        pytest.skip("it may be there")
    with pytest.raises(ConfigError, match=message):
        CausalLM(source=str(folder(kind)), kernels=kernels).skeleton()


class Unusual(LlamaForCausalLM):
    """A decoder whose logits no scale and no cap explain."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.sin()
        return out


def test_a_head_that_weft_does_not_know_is_left_to_the_model() -> None:
    def network(choice: str) -> nn.Module:
        torch.manual_seed(0)
        made = Unusual(LlamaConfig(**SIZES, vocab_size=50))
        return prepared(made, Kernels(cross_entropy=choice))  # type: ignore[arg-type]

    tokens = packed(ROWS, 50)
    asked = {"ids": tokens.ids, "positions": tokens.positions, "labels": tokens.labels}
    found = network("auto")
    with torch.no_grad():
        logits = found(tokens.ids, position_ids=tokens.positions, use_cache=False).logits
        wanted = functional.cross_entropy(logits.flatten(0, 1), tokens.labels.flatten(), reduction="none")
        assert logits.abs().max() <= 1
        torch.testing.assert_close(found(**asked).flatten(), wanted)
    with pytest.raises(ConfigError, match=r"family.kernels.cross_entropy: Unusual makes its logits in a way"):
        network("chunked")


@pytest.mark.parametrize(
    ("kind", "logits"),
    [("llama", Logits()), ("gemma2", Logits(cap=3.0)), ("granite", Logits(scale=0.25)), ("cohere", Logits(scale=0.25))],
)
def test_scale_and_cap_of_logits_are_found_by_asking(folder, kind: TextKind, logits: Logits) -> None:  # type: ignore[no-untyped-def]
    from weft.families.text_network import logits_of

    network = CausalLM(source=str(folder(kind)), kernels=EAGER).load("fp32", DEFAULT.name, Berth())
    assert logits_of(network) == logits


# ---- On a GPU -----------------------------------------------------------------------------------------------------

HALF = 2e-2  # of bf16: 2^-8 for each of some roundings


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["rms_norm", "mlp", "rotary", "cross_entropy"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "granite"])
def test_a_liger_kernel_gives_the_eager_numbers(folder, kind: TextKind, kernel: str) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("liger_kernel")
    losses, grads = answers(folder(kind), EAGER.model_copy(update={kernel: "liger"}), "cuda")
    wanted, truth = answers(folder(kind), EAGER, "cuda")
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-3)
    assert all(relative(a, b) < 1e-3 for a, b in zip(grads, truth, strict=True))


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2"])
def test_flex_attention_gives_the_eager_gradients(folder, kind: TextKind) -> None:  # type: ignore[no-untyped-def]
    losses, grads = answers(folder(kind), EAGER.model_copy(update={"attention": "flex"}), "cuda")
    wanted, truth = answers(folder(kind), EAGER, "cuda")
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-3)
    assert all(relative(a, b) < 1e-3 for a, b in zip(grads, truth, strict=True))


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2"])
def test_flash_attention_keeps_packed_conversations_apart(folder, kind: TextKind) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("flash_attn")
    losses, grads = answers(folder(kind), EAGER.model_copy(update={"attention": "flash"}), "cuda", "bf16")
    wanted, truth = answers(folder(kind), EAGER, "cuda", "bf16")
    assert relative(losses, wanted) < HALF
    assert all(relative(a.float(), b.float()) < 5 * HALF for a, b in zip(grads, truth, strict=True))
