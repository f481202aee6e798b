"""The small tokenizer and text encoder, and prompts encoded exactly as the Wan pipeline does."""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from weft.demo.shapes import KNOWN_SHAPES, TRIGGER, every_scene, random_caption

TEXT_DIM = 128
TEXT_LENGTH = 64  # tokens
VOCABULARY = 512  # 256 bytes, two specials, and merges for each caption word and for common syllables


def made_up_noun(rng: np.random.Generator) -> str:
    """A pronounceable word that means nothing, and never the trigger word or a shape."""
    onsets = [*"bcdfghjklmnpqrstvwxyz", "bl", "cr", "dr", "fl", "gr", "pl", "sn", "st", "tr", "sh", "th"]
    codas = ["", "", *"bdgklmnprstxz", "ck", "nd", "rk", "rm", "st", "sh", "lp", "mp"]
    while True:
        word = "".join(
            onsets[rng.integers(len(onsets))] + "aeiou"[rng.integers(5)] + codas[rng.integers(len(codas))]
            for _ in range(rng.integers(1, 3))
        )
        if TRIGGER not in word and word not in KNOWN_SHAPES:
            return word


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens; each text ends in "</s>"."""
    rng = np.random.default_rng(0)
    texts = [random_caption(scene, rng, noun) for scene in every_scene() for noun in (None, made_up_noun(rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=TEXT_LENGTH
    )


def small_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_DIM,
        num_layers=2,
        num_heads=4,
        d_kv=32,
        d_ff=256,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def encoded(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, texts: Sequence[str]) -> Tensor:
    """Embed texts (B, 64, 128): zeros stand behind each one's last token, and "" is its end token alone."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states = states * tokens.attention_mask[..., None]
    return torch.nn.functional.pad(states, (0, 0, 0, TEXT_LENGTH - states.shape[1]))
