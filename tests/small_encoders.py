"""Small random encoders of real classes, each with a tokenizer over invented words, made on the spot."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Head = Literal["none", "masked-lm", "classifier"]
SYLLABLES = ("ba", "de", "fi", "go", "lu", "me", "nor", "pi", "ras", "tu", "vel", "zo")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}  # fmt: skip
PLACES = 64  # tokens of the longest document
SIZES: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": PLACES, "type_vocab_size": 2, "initializer_range": 0.1,
}  # fmt: skip
OF_ROBERTA: Mapping[str, Any] = {"max_position_embeddings": PLACES + 2, "type_vocab_size": 1}  # two are for padding
# Sizes under the type's own names, and None for those of SIZES that it has another word for.
OWN: Mapping[str, Mapping[str, Any]] = {
    "bert": {},
    "ernie": {"use_task_id": False},
    "megatron-bert": {},
    "roberta": OF_ROBERTA,
    "xlm-roberta": OF_ROBERTA,
    "camembert": OF_ROBERTA,
    "data2vec-text": OF_ROBERTA,
    "roberta-prelayernorm": OF_ROBERTA,
    "mpnet": {"max_position_embeddings": PLACES + 2, "type_vocab_size": None},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "type_vocab_size": None,
                   "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None,
                   "num_attention_heads": None},
    "deberta": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"],
                "type_vocab_size": 0},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"],
                   "share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "type_vocab_size": None},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "longformer": {**OF_ROBERTA, "attention_window": 8},
    "big_bird": {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"},
    "xlnet": {"d_model": 32, "d_inner": 48, "n_layer": 2, "n_head": 4, "hidden_size": None, "type_vocab_size": None,
              "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
              "max_position_embeddings": None},
}  # fmt: skip
PADDED_WITH_1 = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "mpnet", "longformer")


def save_tiny_encoder(
    folder: Path,
    model_type: str = "bert",
    *,
    head: Head = "none",
    labels: Sequence[str] = (),
    words: Sequence[str] | int = 200,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """A folder as transformers saves it: of the bare encoder, as a masked language model, or with a classifier of these
    labels. words: what its tokenizer knows, or how many of the invented ones. sizes: of the config, and anything else
    in it."""
    tokenizer = word_tokenizer(invented(words) if isinstance(words, int) else words, model_type)
    network = tiny_encoder(model_type, len(tokenizer), tokenizer, head=head, labels=labels, seed=seed, **sizes)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoder(
    model_type: str,
    vocabulary: int,
    tokenizer: PreTrainedTokenizerFast,
    *,
    head: Head = "none",
    labels: Sequence[str] = (),
    seed: int = 0,
    **sizes: Any,
) -> PreTrainedModel:
    """The network of such a folder; its norms and biases are not the ones and zeros that they begin as."""
    config = tiny_config(model_type, vocabulary, tokenizer, labels, **sizes)
    built = {"none": AutoModel, "masked-lm": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = built[head].from_config(config, dtype=torch.float32)
        stir(network)
    return network


def tiny_config(
    model_type: str, vocabulary: int, tokenizer: PreTrainedTokenizerFast, labels: Sequence[str] = (), **sizes: Any
) -> PretrainedConfig:
    """The config of a network with a tokenizer's special tokens, and names of classes where there are some."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id,
    }  # fmt: skip
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    chosen = {**SIZES, **OWN[model_type], **ids, "vocab_size": vocabulary, **(named if labels else {}), **sizes}
    return AutoConfig.for_model(model_type, **{name: value for name, value in chosen.items() if value is not None})


def stir(network: nn.Module) -> None:
    """Move norms and biases off ones and zeros, which would hide how they are used."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))


def word_tokenizer(words: Sequence[str], model_type: str = "bert") -> PreTrainedTokenizerFast:
    """One token a word, by white space; `[CLS] text [SEP]`, of XLNet `text [SEP] [CLS]`, padded at the left."""
    specials = list(SPECIAL.values())
    if model_type in PADDED_WITH_1:  # whose places are counted from the number of the padding on
        specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    last = model_type == "xlnet"
    tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP] [CLS]" if last else "[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left" if last else "right", model_max_length=PLACES, **SPECIAL
    )


def invented(count: int) -> tuple[str, ...]:
    """So many words that mean nothing, each another: two syllables, and three when those run out."""
    return tuple(islice(_syllables(), count))


def _syllables() -> Iterator[str]:
    for length in (2, 3, 4):
        yield from ("".join(parts) for parts in product(SYLLABLES, repeat=length))
