"""A decoder whose tokens are parted among ranks: losses and gradients of packed rows are those of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.multi import spawn
from weft.adapters.lora import Lora
from weft.adapters.modules import layers_of
from weft.contracts import UNLEARNED
from weft.engines.recompute import recompute
from weft.engines.ring import Method, sequence_ranks
from weft.errors import ConfigError
from weft.families.kernels import Kernels
from weft.families.text_network import blocks_of, prepared
from weft.families.text_sequence import divide_text

BOUND = 2e-6  # relative; fp32 rounds at 6e-8, and sums are taken in another order
SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def qwen3(**change: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **change}))


def llama(**change: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **change}))


def mistral() -> PreTrainedModel:
    """Sees the last five tokens alone."""
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5))


def gemma2(heads: int = 4) -> PreTrainedModel:
    """Every other layer sees the last five tokens alone, and scores are capped."""
    options = {**SMALL, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return Gemma2ForCausalLM(Gemma2Config(**options, sliding_window=5, query_pre_attn_scalar=12))


def gemma3() -> PreTrainedModel:
    """One layer sees the last five tokens, by a rotary table of its own, the other all."""
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=5, query_pre_attn_scalar=12, layer_types=kinds))


def deepseek() -> PreTrainedModel:
    """Values are narrower than keys, and the second layer chooses among experts."""
    options = {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **options, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=6, first_k_dense_replace=1, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def rows(packed: bool) -> dict[str, Tensor]:
    """Two rows of 21 tokens: conversations of 9, 1 and 11, and of 18 with 3 of padding; or one each."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 60, (2, 21), generator=generator)
    lengths = [[9, 1, 11], [18, 3]] if packed else [[21], [21]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    labels = ids.roll(-1, 1)
    labels[positions.roll(-1, 1) == 0] = UNLEARNED
    labels[:, :3] = UNLEARNED
    if packed:
        labels[1, 18:] = UNLEARNED
    return {"ids": ids, "positions": positions, "labels": labels}


def learned_at(places: slice) -> dict[str, Tensor]:
    """All that is learned stands in a few places, and so on one rank."""
    asked = rows(packed=False)
    labels = torch.full_like(asked["labels"], UNLEARNED)
    labels[:, places] = asked["labels"][:, places]
    return {**asked, "labels": labels}


# network, rows, backend of the adapters, whether the head has one, method, layers recomputed
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Tensor], str, bool, Method, bool]] = {
    "Qwen3": (qwen3, rows(True), "native", True, "ulysses", False),
    "Qwen3, one conversation a row": (qwen3, rows(False), "peft", False, "ulysses", True),
    "Qwen3, tied, by a ring": (lambda: qwen3(tie_word_embeddings=True), rows(True), "native", False, "ring", True),
    "Llama, PEFT": (llama, rows(True), "peft", True, "ulysses", True),
    "Llama, three heads of one key": (
        lambda: llama(num_attention_heads=3, num_key_value_heads=1), rows(True), "native", False, "auto", False,
    ),
    "Llama, three heads, a ring, one conversation": (
        lambda: llama(num_attention_heads=3, num_key_value_heads=3), rows(False), "native", True, "ring", False,
    ),
    "Mistral, a window": (mistral, rows(True), "native", False, "ulysses", False),
    "Mistral, a window, by a ring": (mistral, rows(True), "native", False, "ring", True),
    "Gemma 2": (gemma2, rows(True), "native", False, "ulysses", True),
    "Gemma 2, six heads": (lambda: gemma2(6), rows(True), "native", False, "ulysses", False),
    "Gemma 3, two rotary tables": (gemma3, rows(True), "native", False, "ulysses", True),
    "DeepSeek V3": (deepseek, rows(True), "native", False, "ulysses", False),
    "DeepSeek V3, a ring": (deepseek, rows(True), "native", False, "ring", False),
    "all learned on the first rank": (qwen3, learned_at(slice(3, 5)), "native", False, "ulysses", False),
    "all learned on the last rank": (qwen3, learned_at(slice(19, 20)), "native", False, "ulysses", True),
    "all learned on the last rank, by a ring": (qwen3, learned_at(slice(19, 20)), "native", False, "ring", False),
    "all learned on the last rank, a head that learns": (
        qwen3, learned_at(slice(19, 20)), "native", True, "ulysses", False,
    ),
}  # fmt: skip


def answered(name: str, parted: bool) -> tuple[Tensor, Tensor]:
    """Losses (B, L), and the gradients of adapters on all linear layers, laid end to end."""
    make, asked, backend, on_head, method, recomputed = CASES[name]
    torch.manual_seed(0)
    network = prepared(make(), Kernels())
    paths = [path for path in layers_of(network) if on_head or not path.endswith("lm_head")]
    adapters = Lora(rank=2, backend=backend).attach(network, paths, ["default"], 0)  # type: ignore[arg-type]
    adapters.initialize()
    parameters = adapters.parameters("default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if parted:
        divide_text(network, group_of(method))
    if recomputed:
        for block in blocks_of(network):
            recompute(block, None, None)
    with adapters.use("default"):
        losses = network(**asked)
        losses.sum().backward()
    return losses.detach(), torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters.values()]
    )


def group_of(method: Method) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    return sequence_ranks(dist.group.WORLD, method)


def all_answers() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: answered(name, parted=True) for name in CASES}


@pytest.fixture(scope="module")
def truth() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: answered(name, parted=False) for name in CASES}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_part_the_tokens_lose_and_learn_as_one_process(world: int, truth: dict[str, Any]):
    results = spawn(world, all_answers)
    errors = {}
    for name, (losses, gradient) in truth.items():
        assert gradient.any() and losses.shape == (2, 21)
        of_losses = max(float((each[name][0] - losses).norm() / losses.norm()) for each in results)
        summed = torch.stack([each[name][1] for each in results]).sum(0)
        errors[name] = of_losses, float((summed - gradient).norm() / gradient.norm())
    assert max(max(pair) for pair in errors.values()) < BOUND, errors


def generated_and_refused() -> tuple[Tensor, str]:
    torch.manual_seed(0)
    network: Any = prepared(llama(num_attention_heads=3, num_key_value_heads=1), Kernels())
    asked = rows(packed=True)
    divide_text(network, group_of("ulysses"))
    words = network.generate(asked["ids"][:1, :4], max_new_tokens=5, do_sample=False)
    capped = prepared(gemma2(), Kernels())
    divide_text(capped, group_of("ring"))
    with pytest.raises(ConfigError, match="soft cap") as error:
        capped(**asked)
    return words, str(error.value)


def test_a_divided_decoder_still_generates_and_a_ring_refuses_a_soft_cap():
    torch.manual_seed(0)
    network: Any = prepared(llama(num_attention_heads=3, num_key_value_heads=1), Kernels())
    expected = network.generate(rows(packed=True)["ids"][:1, :4], max_new_tokens=5, do_sample=False)
    for words, refusal in spawn(2, generated_and_refused):
        assert words.tolist() == expected.tolist()
        assert refusal.startswith("parallel.sequence_method")
