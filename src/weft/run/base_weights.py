"""A base model's weights under canonical names, however they are laid out, fused and kept, one tensor at a time."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import CausalLM, is_language_model
from weft.families.checkpoint import Checkpoint, open_checkpoint
from weft.families.loading import SHIPPED, sampled_digest
from weft.families.sniff import Tensors, content_of, names_expert, precision_of, refuse_gguf
from weft.families.stored import WeightFiles
from weft.families.weights import HERE, Reader, Source
from weft.names.modules import family_of
from weft.names.rules import unchanged

Family = Literal["wan", "hunyuan-video", "causal-lm"]
EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|embed_in|word_embeddings|tok_embeddings|wte|wpe)\.weight")


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of one network by their names in diffusers or transformers. linear: paths of its linear layers.

    identity: of its files, as runs on this base write it under weft.base.
    """

    path: str
    family: Family
    expert: str | None
    source: Source
    linear: tuple[str, ...]
    identity: str

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, in the order of the files, so that they are read from front to back."""
        return {name: self.source.shape(name) for name in sorted(self.source.names, key=self.source.place)}

    @property
    def precision(self) -> str:
        """Of most numbers, as they lie in the files: fp32, bf16, fp16, fp8 or fp8 scaled."""
        return precision_of(_header(self.source.weights))

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor lies in its file."""
        return self.source.dtype(name)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor in memory of its own, decoded where the file has it in 8 bits."""
        return Reader(self.source, HERE.read).wide(name, dtype)

    def decoded(self, name: str) -> bool:
        """Whether its file has it in 8 bits with a scale."""
        return self.source.in_8_bits(name) and self.source.names[name].source in self.source.scales

    def close(self) -> None:
        """Let go of files that are mapped."""
        self.source.weights.close()


def open_weights(path: str | Path, expert: str | None = None) -> BaseWeights:
    """The network at a path: a folder of diffusers or transformers, the makers' own directory, or a single file, also
    ComfyUI's. expert: high or low, of a model that has two. Nothing is read yet but headers.

    Raises: ModelError for what is no such network, ConfigError for an expert that it has not, or that is not named.
    """
    place = str(path)
    with _no_field_of_a_config():
        folder = Path(place).expanduser()
        if place not in SHIPPED and is_language_model(folder):
            return _language_model(place, expert)
        if folder.suffix == ".safetensors" and folder.is_file() and (found := _single_decoder(folder)):
            _refuse_expert(place, expert)
            return found
        return _video_model(place, expert)


def _video_model(path: str, expert: str | None) -> BaseWeights:
    family = open_checkpoint(path, None, "wan").kind_of_network
    checkpoint = open_checkpoint(path, None, family)
    part = _part(path, checkpoint, expert)
    source = checkpoint.tensors(part)
    linear = tuple(name.removesuffix(".weight") for name in source.names if _is_matrix(source, name))
    return BaseWeights(path, family, expert, source, linear, checkpoint.fingerprint(part))


def _part(path: str, checkpoint: Checkpoint, expert: str | None) -> str:
    """The part of a checkpoint that is meant. A file, or a folder of one network, is the expert that it is said to be,
    unless its name says another."""
    if checkpoint.where.two_experts:
        if expert is None:
            raise ConfigError(f"--expert: {path} has two networks. Say which is meant: high or low.")
        return expert
    if expert is not None and checkpoint.family != "wan":
        _refuse_expert(path, expert)
    other = {"high": "low", "low": "high"}.get(expert or "")
    name = Path(path).name
    if expert is not None and other is not None and names_expert(name, other) and not names_expert(name, expert):
        raise ConfigError(f"--expert: {path} calls itself the expert for {other} noise. Write --expert {other}.")
    return "transformer"


def _language_model(path: str, expert: str | None) -> BaseWeights:
    _refuse_expert(path, expert)
    family = CausalLM(source=path)
    network = family.skeleton()
    source = family.source_of(network)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    paths = tuple(path for name in source.names if (path := name.removesuffix(".weight")) in linear)
    return BaseWeights(path, "causal-lm", None, source, paths, family.identity()["network"])


def _single_decoder(path: Path) -> BaseWeights | None:
    """A language model's only weight file by itself; None where a file holds something else."""
    refuse_gguf(path)
    weights = WeightFiles((path,))
    if family_of(weights.entries) != "causal-lm" or content_of(_header(weights)).kind == "adapter":
        return None
    source = Source.open(weights, unchanged, str(path))
    linear = tuple(name.removesuffix(".weight") for name in source.names if _is_matrix(source, name))
    return BaseWeights(str(path), "causal-lm", None, source, linear, _digest_of(path))


def _is_matrix(source: Source, name: str) -> bool:
    return name.endswith(".weight") and len(source.shape(name)) == 2 and not EMBEDDINGS.fullmatch(name)


def _header(weights: WeightFiles) -> Tensors:
    return Tensors({name: (entry.dtype, entry.shape) for name, entry in weights.entries.items()})


def _digest_of(path: Path) -> str:
    digest = sha256()
    sampled_digest(digest, path.name, path)
    return digest.hexdigest()[:32]


def _refuse_expert(path: str, expert: str | None) -> None:
    if expert is not None:
        raise ConfigError(f"--expert: {path} has one network, and no '{expert}' one. Leave the option out.")


@contextmanager
def _no_field_of_a_config() -> Iterator[None]:
    """Take the field of a run's config, which errors begin with, from those of a model that a command line names."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("family.source: ", "")) from error
