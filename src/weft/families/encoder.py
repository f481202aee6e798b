"""Text encoders that transformers loads and that sort documents into classes: BERT, RoBERTa, DeBERTa, ModernBERT."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weft.errors import ConfigError, ModelError
from weft.families.encoder_files import what_it_is
from weft.families.encoder_kinds import KINDS, Kind
from weft.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from weft.contracts import Berth, Denoise, Documents, Expert, SequenceGroup, Tokens
    from weft.families.encoder_source import EncoderSource
    from weft.families.stored import WeightFiles
    from weft.families.weights import Form

TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "spm")


class Encoder(Section):
    """A text encoder with a head that sorts documents: a folder with config.json, weights and a tokenizer.

    As transformers saves it; a head that the folder lacks begins by chance.
    """

    kind: Literal["encoder"] = "encoder"
    source: str = Field(
        description="folder with config.json, .safetensors (or pytorch_model.bin) and the tokenizer, of "
        f"{', '.join(KINDS)}; with a classifier or without"
    )
    labels: tuple[str, ...] = Field(
        default=(), description="names of the classes, in the order of the outputs; empty: those of the data"
    )
    multi_label: bool | None = Field(
        default=None, description="whether a document may have several classes at once; null: as the data say"
    )
    head: Literal["auto", "new"] = Field(
        default="auto",
        description="auto: the classifier that was trained in the source, where it has one, with its classes in its "
        "order; new: a classifier that begins by chance in any case",
    )
    seed: int | None = Field(
        default=None, ge=0, description="of what begins by chance, such as a new classifier; null: the run's seed"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="of the weights in memory; heads are fp32 always. What is trained should be fp32: half precision "
        "halves the memory of frozen weights, and loses small steps where they are trained. auto: the engine's "
        "precision",
    )
    longest: int | None = Field(
        default=None, ge=1, description="tokens of the longest document; null: what the model was made for"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="of all places in the network that have one; null: the source's own rates"
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        default="auto",
        description="auto: torch's sdpa where the model can, else eager. Equal to rounding; eager keeps a matrix of "
        "(tokens, tokens) for each head. BigBird attends to all tokens, without its pattern of blocks",
    )

    medium: ClassVar[Literal["documents"]] = "documents"

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
        raise ModelError(f"family.source: {what_it_is(self.source, folder)}")

    @cached_property
    def plain_config(self) -> dict[str, Any]:
        """config.json as it stands. Raises ModelError."""
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except ValueError as damaged:
            raise ModelError(f"{path}: not valid JSON ({damaged}). Fetch the file again.") from damaged

    @cached_property
    def source_config(self) -> "PretrainedConfig":
        """The config of the source as it is. Raises ModelError."""
        from weft.families.encoder_network import encoder_config

        return encoder_config(self.plain_config, self.folder)

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The config of the network that is trained: with its classes and its dropout. Raises ModelError and
        ConfigError."""
        from weft.families.encoder_network import with_dropout, with_head

        self._check_head()
        return with_dropout(with_head(self.source_config, self.labels, self.multi_label), self.dropout)

    @property
    def layers(self) -> Kind:
        """The layers of its kind. Raises ModelError."""
        kind = str(self.plain_config.get("model_type"))
        return KINDS[kind] if kind in KINDS else KINDS[self.source_config.model_type]  # which refuses in words

    @property
    def targets(self) -> Mapping[str, str]:
        return self.layers.targets

    @property
    def aliases(self) -> Mapping[str, str | tuple[str, ...]]:
        return self.layers.aliases

    @property
    def context(self) -> int:
        from weft.families.encoder_network import reserved

        places = self.source_config.to_dict().get("max_position_embeddings")
        if places is None:
            if self.longest is None:
                raise ConfigError(
                    "family.longest: the model's config does not say how long a document may be. Write it here."
                )
            return self.longest
        made_for = int(places) - reserved(self._source_skeleton)
        if self.longest is not None and self.longest > made_for:
            raise ConfigError(
                f"family.longest: {self.longest} tokens, but the model was made for {made_for}. Write at most that, or "
                "choose a model for longer documents, such as ModernBERT."
            )
        return self.longest or made_for

    def tokenizer(self) -> Any:
        """Its tokenizer. Raises ModelError."""
        from weft.families.encoder_network import open_tokenizer

        return open_tokenizer(self.folder, self.source_config)

    def identity(self) -> Mapping[str, str]:
        """network: config and weights. text: the tokenizer."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {
            "network": _digest([self.folder / "config.json", *self.weights.files]),
            "text": _digest([path for path in files if path.name.startswith(TOKENIZER_FILES)]),
        }

    # ---- Its head ----

    @cached_property
    def has_head(self) -> bool:
        """Whether the source's own classifier was trained to sort documents, and is to be used."""
        from weft.families.encoder_network import classifier_of

        if not self._may_sort:
            return False
        paths = classifier_of(self._source_skeleton)
        begun = self._source(self._source_skeleton).begun
        return not any(name.startswith(f"{path}.") for path in paths for name in begun)

    @property
    def _may_sort(self) -> bool:
        """Whether what the files call a classifier is one of documents, and not of words, and is wanted."""
        from weft.families.encoder_network import CLASSIFIER

        named = self.plain_config.get("architectures") or ()
        return self.head == "auto" and (not named or any(name.endswith(CLASSIFIER) for name in named))

    @property
    def trained_labels(self) -> tuple[str, ...]:
        """Names of the classes that the source's own classifier was trained for, in its order; empty without one, and
        where nobody named them."""
        if not self.has_head:
            return ()
        names = dict(self.source_config.id2label or {})
        found = tuple(str(name) for _, name in sorted(names.items()))
        return () if found == tuple(f"LABEL_{number}" for number in range(len(found))) else found

    def _check_head(self) -> None:
        """Raises ConfigError for classes that the source's trained classifier does not have."""
        if not self.labels:
            return
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError("family.labels: a class is named twice. Write each once.")
        if len(self.labels) == 1 and not self.multi_label:
            raise ConfigError(
                "family.labels: with one class alone there is nothing to tell apart. Name the other one, or write "
                "family.multi_label=true, and a document has it or has it not."
            )
        if not self.has_head:
            return
        named, count = self.trained_labels, self.source_config.num_labels
        mend = "Write family.head=new for a classifier that begins anew"
        if len(self.labels) != count:
            raise ConfigError(
                f"family.labels: {len(self.labels)} classes, but the classifier in {self.folder} was trained for "
                f"{count}{': ' + _listed(named) if named else ''}. {mend}, or choose another source."
            )
        if named and named != self.labels:
            raise ConfigError(
                f"family.labels: the classes are {_listed(self.labels)}, but the classifier in {self.folder} was "
                f"trained for {_listed(named)}, in that order. {mend}, or name the classes as it does."
            )
        trained = self.source_config.problem_type
        asked = {True: "multi_label_classification", False: "single_label_classification", None: trained}
        if trained is not None and trained != asked[self.multi_label]:
            was, now = ("several classes", "one class") if trained.startswith("multi") else ("one class", "several")
            raise ConfigError(
                f"family.multi_label: the classifier in {self.folder} was trained to give a document {was}, and here "
                f"it is to give {now}. {mend}."
            )

    def heads(self, network: "nn.Module") -> tuple[str, ...]:
        """Paths of the modules that are trained whole: the classifier, and what the files have no weights for."""
        return self._heads

    @cached_property
    def _heads(self) -> tuple[str, ...]:
        from weft.families.encoder_network import heads_of

        network = self.skeleton()
        return heads_of(network, tuple(self._source(network).begun))

    # ---- Its weights ----

    @cached_property
    def weights(self) -> "WeightFiles":
        """Its weight files, whole: safetensors, or torch's own where there are none. Raises ModelError."""
        from weft.families.encoder_files import encoder_files
        from weft.families.stored import WeightFiles

        return WeightFiles(encoder_files(self.folder))

    def weight_dtype(self, precision: str) -> str:
        if precision != "fp32" and self.layers.wide:
            raise ConfigError(
                f"family.source: a '{self.plain_config['model_type']}' overflows where it masks in {precision}, the "
                "engine's precision here. Write engine.precision=fp32, or choose its successor, deberta-v2 or -v3."
            )
        chosen = precision if self.dtype == "auto" else self.dtype
        if precision == "fp32" and chosen != "fp32":
            raise ConfigError(
                f"family.dtype: {chosen} weights cannot be multiplied in fp32, the engine's precision here. "
                f"Write family.dtype=fp32, or engine.precision={chosen}."
            )
        return chosen

    def form(self, precision: str) -> "Form":
        """How its weights are kept. Raises ConfigError for a pair of precisions that makes no sense."""
        from weft.families.weights import Form

        heads = tuple(f"{path}." for path in self._heads)
        return Form(self.weight_dtype(precision), keeps_fp32=lambda name: name.startswith(heads))

    def _source(self, network: "PreTrainedModel") -> "EncoderSource":
        from weft.families.encoder_network import classifier_of
        from weft.families.encoder_source import encoder_source

        anew = () if self._may_sort else classifier_of(network)
        return encoder_source(self.weights, network, self.folder, self.seed or 0, anew)

    def dress(self, network: "nn.Module", precision: str) -> None:
        from weft.families.dressed import dress

        dress(network, self.blocks(network), self.form(precision))

    def weight_bytes(self, precision: str) -> Mapping[int | None, int]:
        from weft.families.weights import weight_bytes

        network = self.skeleton()
        return weight_bytes(network, self.blocks(network), self.form(precision))

    # ---- The network ----

    def _built(self) -> "PreTrainedModel":
        from weft.families.encoder_network import built

        return built(self.config, self.attention)

    @cached_property
    def _source_skeleton(self) -> "PreTrainedModel":
        """The network as the source itself describes it, without weights."""
        import torch

        from weft.families.encoder_network import built

        with torch.device("meta"):
            return built(self.source_config, self.attention)

    def skeleton(self, device: str = "meta") -> "PreTrainedModel":
        import torch

        with torch.device(device):
            return self._built().requires_grad_(False).eval()

    def load(self, precision: str, expert: str, berth: "Berth") -> "PreTrainedModel":
        """The plain transformers network, read tensor by tensor into the places that berth gives. Raises WeftError."""
        from weft.families.weights import bare, fill

        if not self.labels and not self.has_head:
            raise ConfigError(
                f"family.labels: nobody said into which classes to sort, and {self.folder} has no classifier. A run "
                "takes them from its data; otherwise name them here."
            )
        network = bare(self._built)
        fill(network, self.blocks(network), self._source(self.skeleton()), self.form(precision), berth)
        return network.requires_grad_(False).eval()

    def blocks(self, network: "nn.Module") -> "Sequence[nn.Module]":
        """The encoder's layers, which are recomputed, streamed and sharded; ALBERT has one, asked many times."""
        from weft.families.text_network import blocks_of

        return blocks_of(network)

    def divide(self, network: "nn.Module", sequence: "SequenceGroup") -> None:
        raise ConfigError(
            "parallel.sequence: the tokens of a document are not parted among processes, for an encoder reads few at "
            "once. Write sequence=1, and let processes read different documents."
        )

    def forward(self, call: Callable[..., Any], inputs: "Denoise | Tokens | Documents") -> "Tensor":
        """Logits (B, classes), fp32 or wider."""
        from weft.contracts import Documents

        assert isinstance(inputs, Documents), "an encoder is asked about documents"
        ids, mask = inputs.ids, inputs.mask
        if self.layers.ends:  # padding goes before the text, whose order stays
            order = mask.to(ids.dtype).argsort(dim=1, stable=True)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
        logits = call(input_ids=ids, attention_mask=mask.to(ids.dtype)).logits
        return logits if logits.dtype.itemsize >= 4 else logits.float()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _digest(paths: Sequence[Path]) -> str:
    from hashlib import sha256

    from weft.families.loading import sampled_digest

    digest = sha256()
    for path in paths:
        sampled_digest(digest, path.name, path)
    return digest.hexdigest()[:32]
