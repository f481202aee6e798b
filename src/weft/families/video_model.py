"""What families of video models share: where their files are, how weights are kept, the sampler's schedule."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from weft.errors import ConfigError, ModelError
from weft.families.computing import SAID, Compute, check_precision_goes, check_storage_goes
from weft.families.files import Files
from weft.section import Section

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
    from torch import nn

    from weft.contracts import Berth, Expert
    from weft.families.checkpoint import Checkpoint
    from weft.families.weights import Form

    Autoencoder = TypeVar("Autoencoder", AutoencoderKLWan, AutoencoderKLHunyuanVideo)

FULL = ("fp32", "bf16", "fp16")


class VideoModel(Section):
    """A base of family sections. A family adds its tables, its conditions, and how it is asked."""

    kind: str
    source: str = Field(
        description="folder in diffusers layout, folder of the official checkpoint, or one .safetensors file of the "
        "transformer; 'tiny-wan' is the small model that Weft ships"
    )
    files: Files = Field(default=Files(), description="single parts of the model that lie elsewhere")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "nf4"] = Field(
        default="auto",
        description="of the frozen weights in memory; auto: the engine's precision, and fp8 where the files have that; "
        "fp8, int8, nf4: the linear layers of the blocks, decoded for each multiplication",
    )
    compute: Compute = Field(default="full", description=SAID)
    shift: float | None = Field(
        default=None, gt=0, description="of the sampler's times toward noise; null: as the source says"
    )
    attention: Literal["auto", "native", "cudnn", "efficient", "math", "flex", "flash"] = Field(
        default="auto",
        description="kernel of the attention; auto: the fastest one that this kind of chip has (cuDNN's on Hopper and "
        "Blackwell, flash attention 2 on Ampere and Ada, the memory-efficient one before), and the log says which ran; "
        "native: torch's own choice; flash needs the extra 'flash', on Hopper flash-attn 3 or 4; all but native and "
        "math a GPU",
    )
    vae_tiling: bool = Field(
        default=False, description="encode and decode frames tile by tile: less memory, faint differences at the seams"
    )

    network_class: ClassVar[str]
    medium: ClassVar[Literal["video"]] = "video"

    @model_validator(mode="after")
    def _what_is_kept_can_be_multiplied(self) -> "VideoModel":
        check_storage_goes(self.compute, self.dtype)
        return self

    @cached_property
    def checkpoint(self) -> "Checkpoint":
        """The files of the source. Raises ModelError."""
        from weft.families.checkpoint import open_checkpoint

        return open_checkpoint(self.source, self.files, self.kind)  # type: ignore[arg-type]

    @property
    @abstractmethod
    def experts(self) -> "tuple[Expert, ...]":
        """The networks that are trained."""

    @property
    @abstractmethod
    def network_config(self) -> Mapping[str, Any]:
        """The transformer's config in diffusers' words."""

    @abstractmethod
    def blocks(self, network: "nn.Module") -> "Sequence[nn.Module]":
        """The parts of a network that are recomputed, streamed and sharded."""

    @abstractmethod
    def keeps_fp32(self, name: str) -> bool:
        """Whether a parameter stays in fp32 whatever the precision."""

    @abstractmethod
    def prepared(self, network: "nn.Module") -> "nn.Module":
        """The network, frozen, with what must not run in half precision kept from it."""

    def part_of(self, expert: str) -> str:
        """The checkpoint's part that holds an expert's network."""
        return "transformer" if expert == "default" else expert

    # ---- The network ----

    def skeleton(self, device: str = "meta") -> "nn.Module":
        """The network without its weights: on the meta device, or on a device of fake tensors."""
        import torch

        with torch.device(device):
            return self.prepared(self._built())

    def _on_kernel(self, network: "nn.Module") -> "nn.Module":
        """Raises ConfigError for an attention kernel that this machine has not."""
        from weft.families.video_attention import set_video_attention

        set_video_attention(network, self.attention)
        return network

    def _built(self) -> "nn.Module":
        import diffusers

        return getattr(diffusers, self.network_class).from_config(dict(self.network_config))

    def weight_dtype(self, precision: str) -> str:
        if self.dtype not in FULL:
            return precision
        if precision == "fp32" and self.dtype != "fp32":
            raise ConfigError(
                f"family.dtype: {self.dtype} weights cannot be multiplied in fp32, the engine's precision here. "
                f"Write family.dtype=auto, or engine.precision={self.dtype}."
            )
        return self.dtype

    def form(self, precision: str, part: str) -> "Form":
        """How the weights of a part are kept. Raises ConfigError for a pair of precisions that makes no sense."""
        from weft.families.storage import storage_of
        from weft.families.weights import Form

        self.weight_dtype(precision)
        check_precision_goes(self.compute, precision)
        return Form(*storage_of(self.dtype, precision, self.checkpoint.stored(part)), self.keeps_fp32, self.compute)

    def dress(self, network: "nn.Module", precision: str) -> None:
        part = self.part_of(self.experts[0].name)
        self.checkpoint.dress(part, network, self.blocks(network), self.form(precision, part))

    def weight_bytes(self, precision: str) -> Mapping[int | None, int]:
        """Of a model with two networks, those of the first that is trained: they have the same shapes."""
        if precision not in self._weighed:
            part = self.part_of(self.experts[0].name)
            network = self.skeleton()
            form = self.form(precision, part)
            self._weighed[precision] = self.checkpoint.weight_bytes(part, network, self.blocks(network), form)
        return self._weighed[precision]

    @cached_property
    def _weighed(self) -> "dict[str, Mapping[int | None, int]]":
        """Weight bytes that are known already, by precision: a network's skeleton takes half a second."""
        return {}

    def load(self, precision: str, expert: str, berth: "Berth") -> "nn.Module":
        """The frozen network of an expert, read tensor by tensor into the places that berth gives. Raises WeftError."""
        from weft.families.weights import bare

        part = self.part_of(expert)
        network = self._on_kernel(bare(self._built))
        return self.prepared(
            self.checkpoint.network(part, network, self.blocks(network), self.form(precision, part), berth)
        )

    # ---- The sampler ----

    def scheduler(self) -> Any:
        """The sampler's scheduler as the source's own config asks for, at the shift that this config asks for."""
        import inspect

        import diffusers

        config = dict(self.checkpoint.config("scheduler"))
        name = config.get("_class_name", "")
        scheduler = getattr(diffusers, name, None)
        if scheduler is None:
            raise ModelError(f"family.source: the installed diffusers has no scheduler '{name}'. Update diffusers.")
        if self.shift is not None:
            options = inspect.signature(scheduler.__init__).parameters
            key = next((key for key in ("flow_shift", "shift") if key in options), None)
            if key is None:
                raise ConfigError(f"family.shift: {name}, the source's scheduler, has no shift. Leave the key out.")
            config[key] = self.shift
        return scheduler.from_config(config)

    @cached_property
    def flow_shift(self) -> float:
        """How far the sampler moves times toward noise; 1 for one that does not."""
        if self.shift is not None:
            return self.shift
        config = self.checkpoint.config("scheduler")
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    def sampler(self, steps: int, device: "torch.device") -> Any:
        """A scheduler whose timesteps are set as the model's own pipeline sets them."""
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    # ---- The encoders ----

    def autoencoder(self, cls: "type[Autoencoder]") -> "Autoencoder":
        """The video autoencoder, frozen, on the cpu; in fp32, for its small errors are learned."""
        vae = self.checkpoint.module("vae", cls, "fp32")
        if self.vae_tiling:
            vae.enable_tiling()
        return vae

    def tokenizer(self, part: str, **options: Any) -> Any:
        """A text encoder's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint.tokenizer_folder(part), local_files_only=True, **options)

    def check_channels(self, latents: int, network: int) -> None:
        """Raises ModelError when autoencoder and transformer are of different models."""
        if latents != network:
            raise ModelError(
                f"family.source: the VAE gives {latents} channels, the transformer takes {network}. "
                "They are parts of different models."
            )

    def latents_identity(self, *parts: str) -> str:
        """What latents depend on, in one line: fingerprints, and how they are made."""
        return " ".join([*parts, *(["tiled"] if self.vae_tiling else [])])
