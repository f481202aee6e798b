"""What a family of models owes the others: how its weights are read and placed, divided into blocks, and asked.

The nouns that it shares with everything else are in contracts.py. Letters in shapes: B batch, C channels, F frames,
H height, W width, L text tokens, D width of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from weft.geometry import VideoGeometry
from weft.math.attention import Attention

if TYPE_CHECKING:
    from weft.travels import Denoise, Documents, Tokens


@dataclass(frozen=True)
class Expert:
    """One network of a family, and the times [low, high] that it is asked at. Its adapter has its name."""

    name: str  # "default" where a model has one network; "high" and "low" in Wan 2.2 A14B
    times: tuple[float, float]


DEFAULT = Expert("default", (0.0, 1.0))  # PEFT's own name of a single adapter, so that files carry no name of ours

# (frozen tensor, number of its block or None, blocks of the network) -> the tensor where it lives while training.
Put = Callable[[Tensor, int | None, int], Tensor]
# (how it is read from its file, its shape, its dtype) -> the tensor as it lies in the file, read here or elsewhere.
Read = Callable[[Callable[[], Tensor], tuple[int, ...], torch.dtype], Tensor]


def stay(tensor: Tensor, block: int | None, blocks: int) -> Tensor:
    """A Put that leaves tensors where they were read."""
    return tensor


def at_once(read: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A Read of a process that has files of its own."""
    return read()


@dataclass(frozen=True)
class Berth:
    """Where the frozen tensors of a network go as they are read, and who reads them."""

    put: Put = stay
    read: Read = at_once


class SequenceGroup(Protocol):
    """Ranks that share one batch and part its tokens. Gradients of what runs between split and gather are partial on
    each rank: their sum over the group is the gradient."""

    rank: int
    size: int

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that all ranks have whole; a length that does not divide is padded by repeating
        the last token."""
        ...

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The whole of all ranks' parts, cut to its length."""
        ...

    def by_heads(self, heads: int) -> bool:
        """Whether a layer with so many heads attends to whole sequences, each rank with some of the heads; otherwise
        to a rank's own queries."""
        ...

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attention of own queries (B, n, H, D) over the keys (B, n, G, D) and values (B, n, G, D') of all ranks.

        lengths: of the segments (video, text) that were split one by one and whose parts lie end to end.
        """
        ...


class Encoders(Protocol):
    """The frozen encoders around a video model; loaded for caching and sampling, never while training from a cache."""

    def latents(self, pixels: Tensor) -> Tensor:
        """Normalised posterior mean, fp32 (B, C, f, h, w), of pixels (B, 3, F, H, W) in [-1, 1]."""
        ...

    def given(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """What an image-to-video network is told of the first frame of pixels (B, 3, F, H, W) in [-1, 1], by name, each
        (B, ...); nothing for other models. Of the frames after the first only the number counts."""
        ...

    def pixels(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] of normalised latents."""
        ...

    def text(self, captions: Sequence[str]) -> list[Mapping[str, Tensor]]:
        """For each caption {"text": (L_i, D), ...}. Its text is cut to its real length, and padded when a batch is
        made; further tensors have one shape for all captions."""
        ...


class ModelFamily(Protocol):
    """How one family of checkpoints is loaded, divided into blocks, and called.

    forward(Denoise) is always the velocity dx/dt = noise - data: a family converts what its network predicts.
    forward(Tokens) is the negative log-likelihood (B, L) fp32 of each label, 0 where nothing is learned.
    forward(Documents) is what is answered of each class, logits (B, classes) in fp32, or wider where weights are.
    """

    @property
    def medium(self) -> Literal["video", "text", "documents"]:
        """What the model is made for: decides which data and which objectives go with it."""
        ...

    @property
    def targets(self) -> Mapping[str, str]:
        """Named sets of linear layers, each a regex that is matched against whole module paths."""
        ...

    @property
    def aliases(self) -> Mapping[str, str | tuple[str, ...]]:
        """Other programs' names of layer suffixes -> this network's: {'self_attn.q': 'attn1.to_q', ...}."""
        ...

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that are trained."""
        ...

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The networks that a sample needs, noisiest first."""
        ...

    def skeleton(self, device: str = "meta") -> nn.Module:
        """The network without weights: names and shapes on the meta device, or on a device of fake tensors."""
        ...

    def weight_dtype(self, precision: str) -> str:
        """fp32, bf16 or fp16: in which frozen weights lie in memory, or are decoded to, when the engine multiplies in
        precision."""
        ...

    def dress(self, network: nn.Module, precision: str) -> None:
        """Let a network of shapes alone be as `load` would give it: each tensor in its dtype, packed what is packed."""
        ...

    def weight_bytes(self, precision: str) -> Mapping[int | None, int]:
        """Bytes of one network's frozen weights in memory by the number of their block; None: outside of blocks."""
        ...

    def load(self, precision: str, expert: str, berth: Berth) -> nn.Module:
        """The frozen network of an expert. Each tensor is read, cast or quantized, and put where it lives."""
        ...

    def divide(self, network: nn.Module, sequence: SequenceGroup) -> None:
        """Make a network answer for a group that parts its tokens: split before block 0, exchanged around attention,
        gathered after the last projection. Raises ConfigError where that is not possible."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Fingerprints of the weights: {'network': ..., 'latents': ..., 'text': ...}, without reading them whole."""
        ...

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]: ...
    def forward(self, call: Callable[..., Any], inputs: "Denoise | Tokens | Documents") -> Tensor: ...


class VideoFamily(ModelFamily, Protocol):
    """A family of video models."""

    @property
    def image(self) -> Literal["none", "channels", "frames"]:
        """How the network is given a first frame: not at all, in further channels (always), as a clean latent frame."""
        ...

    @property
    def flow_shift(self) -> float:
        """How far the model's own sampler moves times toward noise: s in s t / (1 + (s-1) t)."""
        ...

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network, cond["guidance"] (B,), in place of a second question."""
        ...

    def geometry(self) -> VideoGeometry: ...
    def conditions(self, items: int, frames: int, height: int, width: int) -> Mapping[str, Tensor]:
        """Conditions of the right shapes for latents (items, C, frames, height, width), without meaning: for estimates
        and benches."""
        ...

    def encoders(self, device: torch.device, carry: Callable[[nn.Module], nn.Module]) -> Encoders:
        """The encoders, carried to the device by the engine's own way."""
        ...

    def sampler(self, steps: int, device: torch.device) -> Any:
        """A fresh diffusers scheduler as the source's own config asks for, its timesteps set as the model's own
        pipeline sets them."""
        ...


class TextFamily(ModelFamily, Protocol):
    """A family of decoder language models."""

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        ...

    def tokenizer(self) -> Any:
        """Its tokenizer, a transformers PreTrainedTokenizer."""
        ...


class EncoderFamily(ModelFamily, Protocol):
    """A family of encoders that sort documents into classes."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the head's outputs; none yet: those of the data will do."""
        ...

    @property
    def trained_labels(self) -> tuple[str, ...]:
        """Names of the classes that the source's own head was trained for, in its order; none without such a head."""
        ...

    @property
    def context(self) -> int:
        """Tokens of the longest document that the network takes."""
        ...

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        """Paths of the modules that are trained whole beside any adapter: the classifier, and whatever else the source
        has no weights for, so that it begins by chance."""
        ...

    def tokenizer(self) -> Any:
        """Its tokenizer, a transformers PreTrainedTokenizer."""
        ...


def as_video(family: ModelFamily) -> VideoFamily:
    """The family of a model that makes videos, as such."""
    assert family.medium == "video", f"a {family.medium} model is asked for what only video models have"
    return cast(VideoFamily, family)


def as_text(family: ModelFamily) -> TextFamily:
    """The family of a language model, as such."""
    assert family.medium == "text", f"a {family.medium} model is asked for what only language models have"
    return cast(TextFamily, family)


def as_encoder(family: ModelFamily) -> EncoderFamily:
    """The family of an encoder, as such."""
    assert family.medium == "documents", f"a {family.medium} model is asked for what only encoders have"
    return cast(EncoderFamily, family)
