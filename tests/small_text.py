"""Small random language models of real classes with a byte-level tokenizer, made on the spot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from weft.contracts import UNLEARNED, Tokens

TextKind = Literal["qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3_text", "granite", "cohere", "qwen3_moe"]
CORPUS = ("The quick brown fox jumps over the lazy dog. Who are you? I am a small model. " * 4, "user assistant system")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, with the marks by which transformers tells what the assistant says.
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OWN: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 4},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
               "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention",
                                                                                     "full_attention"]},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}  # fmt: skip


def make_text(folder: Path, kind: TextKind = "qwen3", marked: bool = False, **options: Any) -> Path:
    """A folder as transformers saves it. marked: the chat template tells what the assistant says."""
    tokenizer = byte_tokenizer(marked)
    sizes = {**SIZES, "vocab_size": len(tokenizer), **OWN[kind], **options}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():  # norms and biases begin at 1 and 0, which would hide how they are used
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_qwen3(folder: Path, layers: int = 2, marked: bool = False, **options: Any) -> Path:
    """A Qwen3 of so many layers: tied head, grouped queries, norms on q and k."""
    return make_text(folder, "qwen3", marked, num_hidden_layers=layers, **options)


def byte_tokenizer(marked: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's marks: any text, few words."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = CHATML_MARKED if marked else CHATML
    return made


def packed(lengths: list[list[int]], words: int, seed: int = 0, learned: float = 0.7) -> Tokens:
    """Rows of conversations of these lengths, with random words; rows are padded to the longest, and a share of all
    places is learned."""
    chance = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths))
    ids, positions, labels = [], [], []
    for row in lengths:
        sizes = [*row, width - sum(row)]
        ids.append(torch.randint(words, (width,), generator=chance))
        positions.append(torch.cat([torch.arange(size) for size in sizes]))
        labels.append(labels_of(ids[-1], sizes, chance, learned))
    return Tokens(torch.stack(ids), torch.stack(positions), torch.stack(labels))


def labels_of(ids: Tensor, sizes: list[int], chance: torch.Generator, learned: float) -> Tensor:
    """The token after each, UNLEARNED at the ends of conversations, in padding, and where chance says."""
    labels = ids.roll(-1)
    labels[torch.tensor(sizes).cumsum(0)[:-1] - 1] = UNLEARNED
    labels[len(ids) - sizes[-1] :] = UNLEARNED
    labels[torch.rand(len(ids), generator=chance) > learned] = UNLEARNED
    return labels
