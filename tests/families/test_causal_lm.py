"""Language models of real classes: their weights as transformers reads them, their losses as transformers computes
them, packed or alone."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.small_text import OWN, TextKind, make_text, packed
from weft.contracts import DEFAULT, UNLEARNED, Berth, Tokens
from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import CausalLM
from weft.families.kernels import Kernels
from weft.families.storage import PackedLinear
from weft.families.text_attention import flex

KINDS: list[TextKind] = list(OWN)  # type: ignore[arg-type]
ROWS = [[7, 9, 1, 12], [20, 3]]  # one longer than the sliding windows of 4, one of a single token, one row padded
EAGER = Kernels(attention="eager", cross_entropy="eager", rms_norm="eager", mlp="eager", rotary="eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("text")
    return cache(lambda kind: make_text(root / kind, kind))


def opened(folder: Path, **options: object) -> tuple[CausalLM, PreTrainedModel]:
    family = CausalLM(source=str(folder), **options)  # type: ignore[arg-type]
    return family, family.load("fp32", DEFAULT.name, Berth())


@cache
def theirs(folder: Path) -> PreTrainedModel:
    """The model as transformers itself loads it and computes it."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def conversations(tokens: Tokens) -> list[tuple[int, slice]]:
    """(row, places) of every conversation."""
    found = []
    for row, positions in enumerate(tokens.positions):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        found += [(row, slice(a, b)) for a, b in pairwise(starts)]
    return found


def alone(network: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Losses of each conversation asked by itself, by transformers' own code."""
    out = torch.zeros(tokens.ids.shape)
    for row, places in conversations(tokens):
        logits = network(input_ids=tokens.ids[row : row + 1, places]).logits[0].float()
        out[row, places] = functional.cross_entropy(
            logits, tokens.labels[row, places], reduction="none", ignore_index=UNLEARNED
        )
    return out


def trained(network: nn.Module) -> list[nn.Parameter]:
    """First and last layer that an adapter would stand on: what goes wrong in between shows in the first."""
    found = [
        p.requires_grad_()
        for name, p in network.named_parameters()
        if name.endswith(("q_proj.weight", "o_proj.weight"))
    ]
    assert len(found) == 4
    return found


def gradients(losses: Tensor, network: nn.Module) -> list[Tensor]:
    losses.sum().backward()
    found = []
    for parameter in trained(network):
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
        parameter.requires_grad_(False)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- Weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_tables_are_those_that_transformers_loads(folder, kind: TextKind) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder(kind))
    wanted = theirs(folder(kind))
    found = network.state_dict()
    assert found.keys() == wanted.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    tables = dict(wanted.named_buffers())
    assert all(torch.equal(buffer, tables[name]) for name, buffer in network.named_buffers())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    tied = wanted.get_output_embeddings().weight is wanted.get_input_embeddings().weight
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    sizes = family.weight_bytes("fp32")
    assert sum(sizes.values()) == sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
    assert set(sizes) == {None, 0, 1}
    assert family.blocks(network) == list(network.base_model.layers)


def test_experts_are_joined_as_they_are_read(folder) -> None:  # type: ignore[no-untyped-def]
    """The files have a matrix for each expert, the network one tensor for all of them."""
    family = CausalLM(source=str(folder("qwen3_moe")))
    source = family.source_of(family.skeleton())
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in family.weights.entries
    assert source.shape("model.layers.0.mlp.experts.gate_up_proj") == (4, 2 * 16, 32)
    stored: list[tuple[int, ...]] = []
    placed: list[tuple[tuple[int, ...], int | None]] = []

    def read(here: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = here()
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)  # another process may have to make room for it
        stored.append(shape)
        return tensor

    def put(tensor: Tensor, block: int | None, blocks: int) -> Tensor:
        placed.append((tuple(tensor.shape), block))
        return tensor

    family.load("fp32", DEFAULT.name, Berth(put, read))
    assert placed.count(((4, 32, 32), 0)) == 1  # gate and up of 16 rows each
    assert placed.count(((4, 32, 16), 1)) == 1
    assert stored == [shape for shape, _ in placed]
    with pytest.raises(ConfigError, match=r"family.dtype: int8 packs linear layers.*mixture of experts"):
        CausalLM(source=str(folder("qwen3_moe")), dtype="int8").weight_bytes("fp32")


def test_shards_of_several_files_are_read_and_another_programs_copy_is_not(folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    own = tmp_path / "sharded"
    shutil.copytree(folder("llama"), own)
    (own / "model.safetensors").rename(own / "consolidated.safetensors")
    theirs(folder("llama")).save_pretrained(own, max_shard_size="60KB")
    family, network = opened(own)
    assert len(family.weights.files) > 2
    assert all(path.name.startswith("model-") for path in family.weights.files)
    found = network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs(folder("llama")).state_dict().items())


@pytest.mark.parametrize(("dtype", "rounding"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
def test_packed_blocks_have_the_loss_of_their_rounded_weights(folder, dtype: str, rounding: float) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder("qwen3"), dtype=dtype)
    exact_family, exact = opened(folder("qwen3"))
    tokens = packed(ROWS, family.config.vocab_size)
    found, wanted = family.forward(network, tokens), exact_family.forward(exact, tokens)
    assert not torch.equal(found, wanted)
    layers = {path: module for path, module in network.named_modules() if isinstance(module, PackedLinear)}
    assert len(layers) == 2 * 7
    for path, layer in layers.items():
        weight = exact.get_submodule(path).weight
        assert 0 < relative(layer.weight, weight) < rounding, path
        weight.data = layer.weight
    assert relative(found, exact_family.forward(exact, tokens)) < 1e-6
    assert sum(family.weight_bytes("fp32").values()) < sum(exact_family.weight_bytes("fp32").values())


def test_half_precision_is_that_of_transformers(folder) -> None:  # type: ignore[no-untyped-def]
    family = CausalLM(source=str(folder("gemma3_text")), kernels=EAGER)
    network = family.load("bf16", DEFAULT.name, Berth())
    wanted = AutoModelForCausalLM.from_pretrained(
        folder("gemma3_text"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    tokens = packed([[9]], family.config.vocab_size)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert torch.equal(network(tokens.ids).logits, wanted.eval()(tokens.ids).logits)


# ---- Losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_conversations_are_answered_as_if_each_were_alone(folder, kind: TextKind, attention: str) -> None:  # type: ignore[no-untyped-def]
    """Forward and backward, to rounding: fp32 sums in another order, 1e-5 of losses near 10."""
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("it caps the logits of attention; refused, see below")
    family, network = opened(folder(kind), kernels={"attention": attention})
    tokens = packed(ROWS, family.config.vocab_size)
    reference = theirs(folder(kind))
    trained(network), trained(reference)
    losses, wanted = family.forward(network, tokens), alone(reference, tokens)
    assert losses.dtype == torch.float32
    assert torch.equal(losses == 0, tokens.labels == UNLEARNED)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    for ours, truth in zip(gradients(losses, network), gradients(wanted, reference), strict=True):
        assert relative(ours, truth) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_answers_packed_conversations_as_if_each_were_alone(folder, kind: TextKind) -> None:  # type: ignore[no-untyped-def]
    """Forward alone: torch has no backward pass of it on a CPU."""
    family, network = opened(folder(kind), kernels={"attention": "flex"})
    tokens = packed(ROWS, family.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(
            family.forward(network, tokens), alone(theirs(folder(kind)), tokens), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ConfigError, match=r"'flex' has no backward pass on a CPU. Write sdpa or auto"):
        flex(network, torch.randn(1, 1, 2, 4, requires_grad=True), *torch.randn(2, 1, 1, 2, 4), None)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "granite", "cohere", "qwen3_moe"])
def test_losses_without_all_logits_are_those_with_them(folder, kind: TextKind) -> None:  # type: ignore[no-untyped-def]
    tokens = packed(ROWS, 300)
    found = []
    for choice in ("eager", "chunked"):
        family, network = opened(folder(kind), kernels={"cross_entropy": choice})
        trained(network)
        losses = family.forward(network, tokens)
        found.append((losses.detach(), gradients(losses, network)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found[0][1], found[1][1], strict=True))


def test_the_head_is_asked_about_learned_tokens_alone(folder, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    family, network = opened(folder("llama"))
    tokens = packed([[20, 12]], family.config.vocab_size, learned=0.2)
    asked: list[int] = []
    linear = functional.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == family.config.vocab_size:
            asked.append(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(functional, "linear", noted)
    family.forward(network, tokens)
    assert asked == [int((tokens.labels != UNLEARNED).sum())]


def test_a_row_without_learned_tokens_has_a_gradient_all_the_same(folder) -> None:  # type: ignore[no-untyped-def]
    """Else ranks that wait for each other's gradients would wait for ever."""
    family, network = opened(folder("qwen3"))
    tokens = packed([[8]], family.config.vocab_size, learned=0.0)
    trained(network)
    losses = family.forward(network, tokens)
    assert not losses.any()
    assert not any(gradient.any() for gradient in gradients(losses, network))


def test_a_network_that_answers_losses_still_generates(folder) -> None:  # type: ignore[no-untyped-def]
    _, network = opened(folder("qwen3"))
    ids = torch.tensor([[5, 9, 40]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(network.generate(ids, **options), theirs(folder("qwen3")).generate(ids, **options))


# ---- What is refused ----------------------------------------------------------------------------------------------


def changed(folder: Path, to: Path, **config: object) -> Path:
    """A copy whose config says something else; None takes a key away."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    plain = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["Qwen3ForSequenceClassification"]},
            "describes a Qwen3ForSequenceClassification; a decoder",
        ),
        (
            {"model_type": "qwen33"},
            r"describes a 'qwen33', which transformers has no decoder for. Did you mean 'qwen3'",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"are quantized \(gptq\).*family.dtype=nf4"),
        ({"_class_name": "WanTransformer3DModel"}, "describes a WanTransformer3DModel, a part of a video model"),
        ({"hidden_size": 64}, "tensors have another shape than the config asks for"),
        ({"num_hidden_layers": 3, "layer_types": None}, "tensors are missing, first 'model.layers.2"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "family.trust_remote_code: .* brings its own",
        ),
    ],
)
def test_a_folder_that_is_no_decoder_of_text_is_refused(folder, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    family = CausalLM(source=str(changed(folder("qwen3"), tmp_path / "model", **change)))
    with pytest.raises((ModelError, ConfigError), match=message):
        family.load("fp32", DEFAULT.name, Berth())


def test_a_source_that_is_not_there_names_its_neighbour_or_the_way_to_fetch_it(folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    beside = folder("qwen3").parent / "qwen"
    with pytest.raises(ModelError, match="Did you mean 'qwen3'"):
        _ = CausalLM(source=str(beside)).config
    with pytest.raises(ModelError, match="hf download Nobody/Model --local-dir Model"):
        _ = CausalLM(source="Nobody/Model").config
    with pytest.raises(ModelError, match=r"has no config.json. It holds: nothing"):
        _ = CausalLM(source=str(tmp_path)).config


def test_layers_that_carry_a_state_along_the_row_are_refused(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, **sizes})
    )
    with pytest.raises(ModelError, match=r"carry a state along the row \(conv\)"):
        CausalLM(source=str(tmp_path)).skeleton()


@pytest.mark.parametrize("kind", ["opt", "gpt_oss", "bloom"])
def test_a_decoder_whose_packed_conversations_see_each_other_is_refused(tmp_path: Path, kind: str) -> None:
    """OPT masks by padding alone, and gpt-oss does not hand positions on to its masks: both would read across."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "word_embed_proj_dim": 16, **sizes}))
    with pytest.raises(ModelError, match="does not mask attention by the positions of tokens"):
        CausalLM(source=str(tmp_path)).skeleton()


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    own = changed(folder("qwen3"), tmp_path / "model", vocab_size=100)
    with pytest.raises(ModelError, match=r"has \d+ words, the network 100. They are of different models"):
        CausalLM(source=str(own)).tokenizer()
    for path in own.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        CausalLM(source=str(own)).tokenizer()


def test_rows_longer_than_the_model_was_made_for_are_refused(folder) -> None:  # type: ignore[no-untyped-def]
    source = str(folder("qwen3"))
    assert CausalLM(source=source).context == 512
    assert CausalLM(source=source, longest=100).context == 100
    with pytest.raises(ConfigError, match=r"family.longest: 600 tokens, but the model was made for 512"):
        _ = CausalLM(source=source, longest=600).context


def test_an_identity_follows_weights_and_template_each_for_itself(folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    own = changed(folder("qwen3"), tmp_path / "model")
    before = CausalLM(source=str(own)).identity()
    assert before == CausalLM(source=str(own)).identity()
    template = own / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = CausalLM(source=str(own)).identity()
    assert after["network"] == before["network"]
    assert after["text"] != before["text"]
    weights = bytearray((own / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (own / "model.safetensors").write_bytes(weights)
    assert CausalLM(source=str(own)).identity() == {**after, "network": CausalLM(source=str(own)).identity()["network"]}
    assert CausalLM(source=str(own)).identity()["network"] != before["network"]


# ---- Adapters -----------------------------------------------------------------------------------------------------


def test_qwen3_0_6b_has_the_lora_parameters_that_its_published_config_implies(tmp_path: Path) -> None:
    """28 layers of width 1024; q 2048 (16 heads of 128), k and v 1024 (8 heads), o back; MLP of 3072."""
    published = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu", "bos_token_id": 151643,
        "eos_token_id": 151645,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    family = CausalLM(source=str(tmp_path))
    network = family.skeleton()
    linears = {path: m for path, m in network.named_modules() if isinstance(m, nn.Linear)}

    def lora(target: str, rank: int) -> int:
        chosen = [m for path, m in linears.items() if re.fullmatch(family.targets[target], path)]
        return sum(rank * (m.in_features + m.out_features) for m in chosen)

    attention = (1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024)
    mlp = 3 * (1024 + 3072)
    assert lora("attention", 16) == 28 * 16 * attention == 4_587_520
    assert lora("mlp", 16) == 28 * 16 * mlp == 5_505_024
    assert lora("all", 16) == 10_092_544
    assert sum(p.numel() for p in network.parameters()) == 596_049_920  # the head is the embedding
    assert family.context == 40960
    assert "lm_head" not in {path for path in linears if re.fullmatch(family.targets["all"], path)}
