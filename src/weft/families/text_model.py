"""What transformers knows of a decoder's folder: its config checked, its class built, its tokenizer opened."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from weft.errors import ConfigError, ModelError, did_you_mean
from weft.families.text_network import blocks_of
from weft.families.weights import Form


def decoder_config(plain: Mapping[str, Any], folder: Path, trust: bool) -> PretrainedConfig:
    """The config of a decoder of text. Raises ModelError for another kind of model, and ConfigError for code that would
    have to be run."""
    kind = plain.get("model_type")
    remote = "auto_map" in plain and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if remote and not trust:
        raise ConfigError(
            f"family.trust_remote_code: {folder} brings its own Python code ('{kind}'). To run it, read it first and "
            "write family.trust_remote_code=true."
        )
    if "_class_name" in plain:
        raise ModelError(
            f"family.source: {folder}/config.json describes a {plain['_class_name']}, a part of a video model. Write "
            "family.kind=wan or hunyuan-video and its whole folder, or name a language model."
        )
    if not remote and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        advice = did_you_mean(str(kind), list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        raise ModelError(
            f"family.source: {folder}/config.json describes a '{kind}', which transformers has no decoder for. {advice}"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    named = plain.get("architectures") or ()
    if not remote and named and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise ModelError(
            f"family.source: {folder}/config.json describes a {named[0]}; a decoder of text, such as Qwen3ForCausalLM, "
            "was expected. Choose another source."
        )
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ModelError(
            f"family.source: {folder} holds a '{kind}', more than a decoder of text. Choose its text-only model."
        )
    return config


def built(config: PretrainedConfig, trust: bool) -> PreTrainedModel:
    """The network of a config, on the device and in the dtype of the surroundings."""
    # Eager, because a chosen kernel is set, and refused, with words of ours.
    return AutoModelForCausalLM.from_config(
        config, trust_remote_code=trust, attn_implementation="eager", dtype=torch.get_default_dtype()
    )


def open_tokenizer(folder: Path, config: PretrainedConfig, trust: bool) -> Any:
    """Raises ModelError when there is none, or one of another model."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"family.source: {folder} has no tokenizer (tokenizer.json). Fetch it with the model.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"family.source: the tokenizer in {folder} has {len(tokenizer)} words, the network {config.vocab_size}. "
            "They are of different models."
        )
    return tokenizer


def generation_config(folder: Path, network: PreTrainedModel) -> GenerationConfig:
    """How the model's makers sample from it; what its config says, where they left that open."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(network.config)


def kept_wide(network: PreTrainedModel, full: str) -> Callable[[str], bool]:
    """Which tensors the model's makers keep in fp32: some in fp16 alone, some in both half precisions."""
    parts = set(network._keep_in_fp32_modules_strict or ())
    if full == "fp16":
        parts |= set(network._keep_in_fp32_modules or ())

    def keeps(name: str) -> bool:
        return any(part in name.split(".") for part in parts)

    return keeps


def packable_blocks(network: nn.Module, form: Form) -> Sequence[nn.Module]:
    """The blocks of a network. Raises ConfigError where most of their weights could not be packed as was asked."""
    blocks = blocks_of(network)
    joined = [name for block in blocks for name, tensor in block.named_parameters() if tensor.dim() > 2]
    if form.storage != "plain" and joined:
        raise ConfigError(
            f"family.dtype: {form.storage} packs linear layers, and this mixture of experts keeps its experts in "
            f"tensors of another kind ('{joined[0]}'). Write family.dtype=auto, bf16 or fp16."
        )
    if form.compute == "fp8" and joined:
        raise ConfigError(
            "family.compute: fp8 multiplies linear layers, and this mixture of experts keeps its experts in tensors of "
            f"another kind ('{joined[0]}'). Write family.compute=full."
        )
    return blocks
