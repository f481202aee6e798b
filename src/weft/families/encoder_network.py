"""What transformers knows of an encoder's folder: its config checked, its class built, its tokenizer opened, its head
found."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from weft.errors import ConfigError, ModelError, did_you_mean
from weft.families.encoder_kinds import KINDS
from weft.families.encoder_source import POOLER

CLASSIFIER = "ForSequenceClassification"  # how the names of classes end whose head sorts documents
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
    "spm.model",
)  # fmt: skip
MULTI, SINGLE = "multi_label_classification", "single_label_classification"


def encoder_config(plain: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    """The config of a known encoder. Raises ModelError for another kind of model."""
    kind = str(plain.get("model_type"))
    label = f"family.source: {folder}/config.json describes a '{kind}'"
    if "_class_name" in plain:
        raise ModelError(
            f"family.source: {folder}/config.json describes a {plain['_class_name']}, a part of a video model. Name "
            "the folder of a text encoder, such as BERT's."
        )
    if kind not in KINDS and "auto_map" in plain:
        raise ModelError(
            f"{label}, which brings its own Python code. Weft runs no such code for encoders. Choose one that is in "
            f"transformers: {', '.join(list(KINDS)[:6])}, ..."
        )
    if kind not in KINDS and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{label}, a decoder that writes text. Weft trains it with family.kind=causal-lm; to sort documents name "
            f"the folder of an encoder: {', '.join(KINDS)}."
        )
    if kind not in KINDS:
        raise ModelError(f"{label}, which is no encoder that Weft knows. {did_you_mean(kind, list(KINDS))}")
    if plain.get("is_decoder") or plain.get("is_encoder_decoder"):
        raise ModelError(f"{label} made into a decoder, which reads no further than each word. Choose an encoder.")
    if plain.get("quantization_config"):
        raise ModelError(
            f"family.source: the weights in {folder} are quantized in a way that Weft cannot read. Take the model in "
            "fp32, bf16 or fp16."
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def with_head(config: PretrainedConfig, labels: Sequence[str], multi_label: bool | None) -> PretrainedConfig:
    """A copy of a config whose head has these classes; as many as the source has when there are none."""
    own = deepcopy(config)
    if labels:
        own.id2label = dict(enumerate(labels))
        own.label2id = {name: number for number, name in enumerate(labels)}
    if multi_label is not None:
        own.problem_type = MULTI if multi_label else SINGLE
    return own


def with_dropout(config: PretrainedConfig, dropout: float | None) -> PretrainedConfig:
    """A copy of a config all of whose dropouts have one rate; None: as they are."""
    own = deepcopy(config)
    if dropout is not None:
        for name, value in config.to_dict().items():
            if "dropout" in name and (value is None or isinstance(value, int | float)):
                setattr(own, name, float(dropout))
    return own


def built(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The network of a config, on the device and in the dtype of the surroundings. attention: auto is what transformers
    itself takes for it. Raises ConfigError for a kernel that the model cannot have."""
    own = deepcopy(config)
    if own.model_type == "big_bird":
        # It chooses by the first batches whether to attend to all or to some, and then keeps to it: what a document is
        # answered would depend on those before it, and a resumed run would answer otherwise.
        own.attention_type = "original_full"
    chosen = None if attention == "auto" else attention
    try:
        return AutoModelForSequenceClassification.from_config(
            own, trust_remote_code=False, attn_implementation=chosen, dtype=torch.get_default_dtype()
        )
    except ValueError as refused:
        if chosen is None:
            raise
        raise ConfigError(
            f"family.attention: a '{own.model_type}' cannot attend by '{attention}'. Write auto or eager."
        ) from refused


def classifier_of(network: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the parts beside the encoder that end in as many numbers as there are classes."""
    classes = network.config.num_labels
    found = [
        path.partition(".")[0]
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and not _of_base(network, path)
    ]
    assert found, f"{type(network).__name__} has no layer that sorts into {classes} classes"
    return tuple(dict.fromkeys(found))


def heads_of(network: PreTrainedModel, begun: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules that are trained whole, in the network's order: the classifier, and those with tensors that
    begin by chance, as whole as they stand beside the encoder or, a pooler, in it."""
    unread = KINDS[network.config.model_type].unread
    wanted = {_top(network, name) for name in begun} | set(classifier_of(network))
    return tuple(path for path, _ in network.named_modules() if path in wanted and path not in unread)


def _top(network: PreTrainedModel, name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]}.{parts[1]}" if _of_base(network, name) and parts[1] == POOLER else parts[0]


def _of_base(network: PreTrainedModel, name: str) -> bool:
    return name.startswith(f"{network.base_model_prefix}.")


def reserved(network: PreTrainedModel) -> int:
    """Places of the table of positions that no token has: RoBERTa and its kin count from the padding's number on."""
    tables = (module for path, module in network.named_modules() if path.endswith("position_embeddings"))
    table = next((module for module in tables if isinstance(module, nn.Embedding)), None)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def open_tokenizer(folder: Path, config: PretrainedConfig) -> Any:
    """Raises ModelError when there is none, one without padding, or one of another model."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(
            f"family.source: {folder} has no tokenizer (tokenizer.json, vocab.txt, ...). Fetch it with the model."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as damaged:
        reason = str(damaged).strip().splitlines()[0]
        raise ModelError(f"family.source: the tokenizer in {folder} cannot be opened: {reason}") from damaged
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"family.source: the tokenizer in {folder} has {len(tokenizer)} words, the network {config.vocab_size}. "
            "They are of different models."
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"family.source: the tokenizer in {folder} has no padding token, and documents of several lengths make a "
            "batch. Add pad_token to its tokenizer_config.json."
        )
    return tokenizer
