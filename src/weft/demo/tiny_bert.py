"""A small BERT made on the spot: real classes, a tokenizer over the invented words, weights by chance."""

from collections.abc import Sequence
from pathlib import Path

import torch

from weft.durable import write_folder

PLACES = 64  # tokens of the longest document
WIDTH, LAYERS, HEADS = 64, 2, 4
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}  # fmt: skip


def save_tiny_bert(folder: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Save a bare encoder, as transformers does: its classifier is still to begin, by chance, with the first run."""
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer(words)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=PLACES,
        type_vocab_size=1,
        pad_token_id=[*SPECIAL].index("pad_token"),
        # BERT's 0.02 is for a width of 768; narrower layers need more to begin as lively.
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BertModel(config)

    def fill(draft: Path) -> None:
        network.save_pretrained(draft)
        tokenizer.save_pretrained(draft)

    write_folder(folder, fill)
    return folder


def word_tokenizer(words: Sequence[str]):
    """A fast tokenizer that knows whole words alone, with BERT's frame [CLS] ... [SEP]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    places = {word: place for place, word in enumerate([*SPECIAL.values(), *words])}
    inner = Tokenizer(WordLevel(places, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    frame = [(name, places[name]) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=PLACES, **SPECIAL)
