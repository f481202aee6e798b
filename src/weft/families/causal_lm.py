"""Decoder language models that transformers loads: Qwen3, Llama, Gemma, Mistral and others like them."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from weft.errors import ConfigError, ModelError, did_you_mean
from weft.families.computing import SAID, Compute, check_precision_goes, check_storage_goes
from weft.families.encoder_kinds import is_encoder
from weft.families.kernels import Kernels
from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from weft.contracts import Berth, Denoise, Expert, SequenceGroup, Tokens
    from weft.families.stored import WeightFiles
    from weft.families.weights import Form, Source

LAYERS = r"(?:\w+\.)*(?:layers|h|blocks)\.\d+\."
ATTENTION = r"(?:self_attn|self_attention|attn|attention)\.\w+"
MLP = r"(?:mlp|feed_forward|shared_mlp)\.(?:\w+\.)*\w+"
FULL = ("fp32", "bf16", "fp16")
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")
DECODERS = ("ForCausalLM", "LMHeadModel")  # ends of the names of their classes
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


class CausalLM(Section):
    """A decoder of text: a folder as transformers saves it, with config.json, safetensors and a tokenizer."""

    kind: Literal["causal-lm"] = "causal-lm"
    source: str = Field(description="folder with config.json, .safetensors files and the tokenizer")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "nf4"] = Field(
        default="auto",
        description="of the frozen weights in memory; auto: the engine's precision, and fp8 where the files have that; "
        "fp8, int8, nf4: the linear layers of the blocks, decoded for each multiplication",
    )
    compute: Compute = Field(default="full", description=SAID)
    longest: int | None = Field(
        default=None, ge=1, description="tokens of the longest row that is allowed; null: what the model was made for"
    )
    kernels: Kernels = Field(default=Kernels(), description="what its layers are computed with")
    trust_remote_code: bool = Field(
        default=False, description="run the Python code that the folder brings along, for models not in transformers"
    )

    medium: ClassVar[Literal["text"]] = "text"
    targets: ClassVar[Mapping[str, str]] = {
        "attention": LAYERS + ATTENTION,
        "mlp": LAYERS + MLP,
        "all": LAYERS + r".+",
    }
    aliases: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **{name: f"self_attn.{name}_proj" for name in "qkvo"},
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "w1": "mlp.gate_proj",
        "w3": "mlp.up_proj",
        "w2": "mlp.down_proj",
        "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }

    @model_validator(mode="after")
    def _what_is_kept_can_be_multiplied(self) -> "CausalLM":
        check_storage_goes(self.compute, self.dtype)
        return self

    # ---- What the model is ----

    @property
    def experts(self) -> "tuple[Expert, ...]":
        from weft.contracts import DEFAULT

        return (DEFAULT,)

    @property
    def all_experts(self) -> "tuple[Expert, ...]":
        return self.experts

    @cached_property
    def folder(self) -> Path:
        """Raises ModelError."""
        folder = Path(self.source).expanduser()
        if (folder / "config.json").is_file():
            return folder
        if (folder / "model_index.json").is_file():
            raise ModelError(
                f"family.source: {self.source} is a video model in diffusers layout. Write family.kind=wan or "
                "hunyuan-video, or name the folder of a language model."
            )
        if folder.is_dir():
            held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"family.source: {self.source} has no config.json. It holds: {held}. A folder with config.json, "
                ".safetensors files and a tokenizer was expected."
            )
        beside = folder.parent.iterdir() if folder.parent.is_dir() else []
        siblings = [path.name for path in beside if (path / "config.json").is_file()]
        fetch = (
            f"To fetch it: hf download {self.source} --local-dir {folder.name}." if self.source.count("/") == 1 else ""
        )
        raise ModelError(
            f"family.source: there is no folder '{self.source}' (looked from {Path.cwd()}). "
            f"{did_you_mean(folder.name, siblings) if siblings else fetch}".rstrip()
        )

    @cached_property
    def plain_config(self) -> dict[str, Any]:
        """config.json as it stands. Raises ModelError."""
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except ValueError as damaged:
            raise ModelError(f"{path}: not valid JSON ({damaged}). Fetch the file again.") from damaged

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The model's config, of a decoder. Raises ModelError and ConfigError."""
        from weft.families.text_model import decoder_config

        return decoder_config(self.plain_config, self.folder, self.trust_remote_code)

    @property
    def context(self) -> int:
        made_for = self.config.to_dict().get("max_position_embeddings")
        if made_for is None:
            if self.longest is None:
                raise ConfigError(
                    "family.longest: the model's config does not say how long a row may be. Write it here."
                )
            return self.longest
        if self.longest is not None and self.longest > made_for:
            raise ConfigError(
                f"family.longest: {self.longest} tokens, but the model was made for {made_for}. Write at most that; "
                "longer rows need a config.json with rope scaling."
            )
        return self.longest or int(made_for)

    def tokenizer(self) -> Any:
        """Its tokenizer. Raises ModelError."""
        from weft.families.text_model import open_tokenizer

        return open_tokenizer(self.folder, self.config, self.trust_remote_code)

    def identity(self) -> Mapping[str, str]:
        """network: config and weights. text: the tokenizer and its chat template."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {
            "network": _digest([self.folder / "config.json", *self.weights.files]),
            "text": _digest([path for path in files if path.name.startswith(TOKENIZER_FILES)]),
        }

    # ---- Its weights ----

    @cached_property
    def weights(self) -> "WeightFiles":
        """Its safetensors files, whole. Raises ModelError."""
        from weft.families.loading import safetensors_header, weight_files
        from weft.families.stored import WeightFiles
        from weft.families.text_weights import check_readable

        check_readable(self.plain_config, self.folder)
        index, whole = self.folder / INDEX, self.folder / WHOLE
        if not index.is_file() and whole.is_file():
            safetensors_header(whole)
            return WeightFiles((whole,))
        files = weight_files(self.folder, "")
        if index.is_file():  # beside them may stand the same weights under the names of another program
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            files = [path for path in files if path.name in named]
        return WeightFiles(tuple(files))

    def weight_dtype(self, precision: str) -> str:
        if self.dtype not in FULL:
            return precision
        if precision == "fp32" and self.dtype != "fp32":
            raise ConfigError(
                f"family.dtype: {self.dtype} weights cannot be multiplied in fp32, the engine's precision here. "
                f"Write family.dtype=auto, or engine.precision={self.dtype}."
            )
        return self.dtype

    def form(self, precision: str, network: "PreTrainedModel") -> "Form":
        """How its weights are kept. Raises ConfigError for a pair of precisions that makes no sense."""
        from weft.families.sniff import Tensors, precision_of
        from weft.families.storage import check_storage, storage_of
        from weft.families.text_model import kept_wide
        from weft.families.weights import Form

        self.weight_dtype(precision)
        check_precision_goes(self.compute, precision)
        stored = Tensors({name: (entry.dtype, entry.shape) for name, entry in self.weights.entries.items()})
        full, storage = storage_of(self.dtype, precision, precision_of(stored))
        check_storage(storage)
        return Form(full, storage, kept_wide(network, full), self.compute)

    def source_of(self, network: "PreTrainedModel") -> "Source":
        from weft.families.text_weights import open_source

        return open_source(self.weights, network, self.folder)

    def dress(self, network: "nn.Module", precision: str) -> None:
        from transformers import PreTrainedModel

        from weft.families.dressed import dress
        from weft.families.text_model import packable_blocks

        assert isinstance(network, PreTrainedModel)
        form = self.form(precision, network)
        dress(network, packable_blocks(network, form), form, self.source_of(network))

    def weight_bytes(self, precision: str) -> Mapping[int | None, int]:
        from weft.families.text_model import packable_blocks
        from weft.families.weights import weight_bytes

        network = self.skeleton()
        form = self.form(precision, network)
        return weight_bytes(network, packable_blocks(network, form), form, self.source_of(network))

    # ---- The network ----

    def _built(self) -> "PreTrainedModel":
        from weft.families.text_model import built

        return built(self.config, self.trust_remote_code)

    def skeleton(self, device: str = "meta") -> "PreTrainedModel":
        import torch

        from weft.families.text_network import prepared

        with torch.device(device):
            network = self._built()
        return prepared(network, self.kernels)

    def load(self, precision: str, expert: str, berth: "Berth") -> "PreTrainedModel":
        """The frozen network, read tensor by tensor into the places that berth gives. Raises WeftError."""
        from weft.families.text_model import generation_config, packable_blocks
        from weft.families.text_network import prepared
        from weft.families.weights import bare, fill

        network = bare(self._built)
        form = self.form(precision, network)
        fill(network, packable_blocks(network, form), self.source_of(network), form, berth)
        network.generation_config = generation_config(self.folder, network)
        return prepared(network, self.kernels)

    def blocks(self, network: "nn.Module") -> "Sequence[nn.Module]":
        """The parts of a network that are recomputed, streamed and sharded."""
        from weft.families.text_network import blocks_of

        return blocks_of(network)

    def divide(self, network: "nn.Module", sequence: "SequenceGroup") -> None:
        from weft.families.text_sequence import divide_text

        divide_text(network, sequence)

    def forward(self, call: Callable[..., Any], inputs: "Denoise | Tokens") -> "Tensor":
        """Losses (B, L) fp32, 0 where nothing is learned."""
        from weft.contracts import Tokens

        assert isinstance(inputs, Tokens), "a language model is asked about tokens"
        return call(
            ids=inputs.ids, positions=inputs.positions, labels=inputs.labels, learned=inputs.learned, texts=inputs.texts
        )


def is_language_model(folder: Path) -> bool:
    """Whether a folder is one as transformers saves it, and neither part of a video model nor an encoder."""
    path = folder / "config.json"
    if not path.is_file() or (folder / "model_index.json").exists() or is_encoder(folder):
        return False
    try:
        plain = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(plain, dict) and "model_type" in plain and "_class_name" not in plain


def _digest(paths: Sequence[Path]) -> str:
    from hashlib import sha256

    from weft.families.loading import sampled_digest

    digest = sha256()
    for path in paths:
        sampled_digest(digest, path.name, path)
    return digest.hexdigest()[:32]
