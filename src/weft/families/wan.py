"""Wan 2.1 and 2.2: text-to-video, image-to-video, both experts. It predicts the velocity, at times in thousandths."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weft.errors import ConfigError, ModelError
from weft.families.video_model import VideoModel
from weft.geometry import VideoGeometry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weft.contracts import Denoise, Encoders, Expert, SequenceGroup, Tokens

PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)"
TEXT_LENGTH = 512  # tokens that Wan was trained with, padding included and attended to
CLIP_TOKENS = 257  # of a picture, its class token included
MASK = 4  # channels that tell which frames of pixels are given


class Wan(VideoModel):
    """Wan 2.1 and 2.2: one or two transformers, AutoencoderKLWan, UMT5, and CLIP's eyes where the model has them."""

    kind: Literal["wan"] = "wan"
    expert: Literal["high", "low", "both"] | None = Field(
        default=None,
        description="which of two networks is trained: high, for noisy times, low, for times near data, or both, each "
        "with its own adapter; null: the model has one network",
    )
    boundary: float | None = Field(
        default=None, gt=0, lt=1, description="time between the two networks, in [0, 1]; null: the model's own"
    )
    text_length: int | None = Field(
        default=None, ge=1, description="text tokens, padding included; null: 512, or the tokenizer's own shorter limit"
    )

    lean: bool = Field(
        default=True,
        description="compute the network by Weft's own code, equal to diffusers' to rounding: for the backward pass a "
        "block keeps 15 tensors of its tokens' width in place of 33 to 50, and pointwise mathematics moves a third of "
        "the bytes; false: diffusers' code, which has gradients of gradients too",
    )

    network_class: ClassVar[str] = "WanTransformer3DModel"
    targets: ClassVar[Mapping[str, str]] = {
        "attention": rf"blocks\.\d+\.attn[12]\.{PROJECTIONS}",
        "self-attention": rf"blocks\.\d+\.attn1\.{PROJECTIONS}",
        "cross-attention": rf"blocks\.\d+\.attn2\.{PROJECTIONS}",
        "ffn": r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        "attention+ffn": rf"blocks\.\d+\.(attn[12]\.{PROJECTIONS}|ffn\.net\.(0\.proj|2))",
        "all-linear": r"(blocks|condition_embedder)\..*|proj_out",
    }
    aliases: ClassVar[Mapping[str, str]] = {
        **{f"self_attn.{n}": f"attn1.to_{n}" for n in "qkv"},
        **{f"cross_attn.{n}": f"attn2.to_{n}" for n in "qkv"},
        **{n: f"to_{n}" for n in "qkv"},
        "self_attn.o": "attn1.to_out.0",
        "cross_attn.o": "attn2.to_out.0",
        "o": "to_out.0",
        "to_out": "to_out.0",
        "cross_attn.k_img": "attn2.add_k_proj",
        "cross_attn.v_img": "attn2.add_v_proj",
        "k_img": "add_k_proj",
        "v_img": "add_v_proj",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "head.head": "proj_out",
        "time_projection.1": "condition_embedder.time_proj",
    }

    # ---- What the model is ----

    @property
    def experts(self) -> "tuple[Expert, ...]":
        """Raises ConfigError where `expert` does not go with the model."""
        assert self.network_config  # a model of another family is told first
        if not self._has_two:
            if self.expert is not None:
                raise ConfigError(
                    f"family.expert: {self.source} has one network, and no '{self.expert}' one. Leave the key out."
                )
            return self.all_experts
        if self.expert is None:
            raise ConfigError(
                f"family.expert: {self.source} has two networks. Say which is trained: high (times from "
                f"{self._boundary:g}), low (times below), or both."
            )
        return tuple(each for each in self.all_experts if self.expert in (each.name, "both"))

    @property
    def all_experts(self) -> "tuple[Expert, ...]":
        from weft.contracts import DEFAULT, Expert

        if self._has_two:
            return Expert("high", (self._boundary, 1.0)), Expert("low", (0.0, self._boundary))
        if self.boundary is not None:
            raise ConfigError(f"family.boundary: {self.source} has one network, for all times. Leave the key out.")
        return (DEFAULT,)

    @cached_property
    def _has_two(self) -> bool:  # kept, for it looks at the disk, and every step asks
        return self.checkpoint.where.two_experts

    @property
    def _boundary(self) -> float:
        """Time between the experts."""
        known = self.checkpoint.facts.boundary_ratio
        assert known is not None, "two experts without a boundary"
        return known if self.boundary is None else self.boundary

    @property
    def image(self) -> Literal["none", "channels", "frames"]:
        if self.network_config["in_channels"] != self.network_config["out_channels"]:
            return "channels"
        return "frames" if self.checkpoint.facts.expand_timesteps else "none"

    @property
    def embeds_guidance(self) -> bool:
        return False

    @property
    def has_eyes(self) -> bool:
        """Whether the network is shown the first frame by CLIP too: Wan 2.1 image-to-video."""
        return self.network_config.get("image_dim") is not None

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The transformer's config, checked. Raises ModelError."""
        config = self.checkpoint.config(self.checkpoint.first_network)
        taken, given = config["in_channels"], config["out_channels"]
        if config.get("pos_embed_seq_len"):
            raise ModelError(
                f"family.source: {self.source} goes from a first frame to a last one. Weft trains Wan that is given no "
                "frame, or the first alone; choose an I2V model."
            )
        if taken not in (given, 2 * given + MASK):
            raise ModelError(
                f"family.source: {self.source} takes {taken} channels and gives {given}. Weft trains Wan that takes as "
                f"many as it gives (text-to-video), or {2 * given + MASK} (image-to-video): no control or inpainting "
                "models."
            )
        return config

    def geometry(self) -> VideoGeometry:
        """From the configs of the VAE and the transformer. Wan runs at 16 frames a second, TI2V-5B at 24."""
        vae = self.checkpoint.config("vae")
        channels = vae.get("z_dim", 16)
        self.check_channels(channels, self.network_config["out_channels"])
        space = vae.get("scale_factor_spatial") or 2 ** (len(vae.get("dim_mult", [1, 2, 4, 4])) - 1)
        time = vae.get("scale_factor_temporal") or 2 ** sum(vae.get("temperal_downsample", [False, True, True]))
        patch = tuple(self.network_config["patch_size"])
        assert len(patch) == 3, f"{self.source}: patch_size {patch}"
        fps = 24.0 if channels == 48 else 16.0
        return VideoGeometry(fps=fps, space_stride=space, time_stride=time, patch=patch, latent_channels=channels)

    def identity(self) -> Mapping[str, str]:
        fingerprint = self.checkpoint.fingerprint
        parts = ["vae", *(["image_encoder"] if self.has_eyes else [])]
        told = ["image"] if self.image == "channels" else []
        return {
            "network": fingerprint(*(self.part_of(expert.name) for expert in self.experts)),
            "latents": self.latents_identity(fingerprint(*parts), *told),
            "text": f"{fingerprint('text_encoder', 'tokenizer')} {self.tokens_of_text}",
        }

    @cached_property
    def tokens_of_text(self) -> int:
        """Text tokens with padding, as the transformer sees them."""
        if self.has_eyes:
            # diffusers takes the last 512 tokens for text and those before for the picture's.
            if self.text_length not in (None, TEXT_LENGTH):
                raise ConfigError(
                    f"family.text_length: {self.text_length}, but Wan 2.1 image-to-video runs with {TEXT_LENGTH} text "
                    "tokens alone. Leave the key out."
                )
            return TEXT_LENGTH
        if self.text_length is not None:
            return self.text_length
        folder = self.checkpoint.tokenizer_folder()
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            raise ModelError(f"family.source: {folder} has no tokenizer_config.json. Fetch the tokenizer.")
        limit = json.loads(path.read_text()).get("model_max_length") or TEXT_LENGTH
        return int(min(TEXT_LENGTH, limit))

    # ---- How it runs ----

    def keeps_fp32(self, name: str) -> bool:
        from weft.families.wan_network import keeps_fp32

        return keeps_fp32(name)

    def prepared(self, network: "nn.Module") -> "nn.Module":
        from weft.families.wan_network import prepared

        return prepared(network, self.lean)

    def encoders(self, device: "torch.device", carry: "Callable[[nn.Module], nn.Module]") -> "Encoders":
        from diffusers import AutoencoderKLWan
        from transformers import CLIPVisionModel, UMT5EncoderModel

        from weft.families.wan_encoders import Eyes, WanEncoders

        vae = self.autoencoder(AutoencoderKLWan)
        text_model = self.checkpoint.module("text_encoder", UMT5EncoderModel, "stored")
        tokenizer, eyes = self.tokenizer("tokenizer"), None
        if self.has_eyes:
            clip = self.checkpoint.module("image_encoder", CLIPVisionModel, "fp32")
            processor = self.checkpoint.where.place("image_processor")
            eyes = Eyes.open(clip, None if processor is None else processor.folder)
            carry(clip)
        carry(vae)
        carry(text_model)
        return WanEncoders(vae, text_model, tokenizer, self.tokens_of_text, device, self.image == "channels", eyes)

    def conditions(self, items: int, frames: int, height: int, width: int) -> "Mapping[str, Tensor]":
        """Conditions of the right shapes, without meaning: for estimates and benches."""
        import torch

        config = self.network_config
        told = {"text": torch.randn(items, self.tokens_of_text, config["text_dim"])}
        if self.image == "channels":
            told["image"] = torch.randn(items, config["out_channels"], frames, height, width)
        if self.has_eyes:
            told["clip"] = torch.randn(items, CLIP_TOKENS, config["image_dim"])
        return told

    def blocks(self, network: "nn.Module") -> "Sequence[nn.Module]":
        from torch import nn

        blocks = network.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    def divide(self, network: "nn.Module", sequence: "SequenceGroup") -> None:
        from weft.families.video_sequence import divide_wan

        divide_wan(network, sequence)

    def forward(self, call: Callable[..., Any], inputs: "Denoise | Tokens") -> "Tensor":
        """The velocity. Text is padded with zeros to its full length, and attended to, as Wan was trained."""
        from torch.nn.functional import pad

        from weft.contracts import Denoise
        from weft.families.wan_network import token_timesteps, with_image
        from weft.math.flow import network_timestep

        assert isinstance(inputs, Denoise), "a video model is asked about latents"
        x, cond, image = inputs.x, inputs.cond, self.image
        text = cond["text"]  # (B, L, D)
        assert text.shape[1] <= self.tokens_of_text, f"{text.shape[1]} text tokens, at most {self.tokens_of_text}"
        timestep = network_timestep(inputs.t)
        given = {}
        if inputs.given is not None:
            assert image == "frames", "this network takes no clean frames"
            if self.lean:
                given = {"given": inputs.given}
            else:
                timestep = token_timesteps(inputs.t, inputs.given, x, self.network_config["patch_size"])
        return call(
            hidden_states=with_image(x, cond["image"]) if image == "channels" else x,
            timestep=timestep,
            encoder_hidden_states=pad(text, (0, 0, 0, self.tokens_of_text - text.shape[1])),
            encoder_hidden_states_image=cond["clip"] if self.has_eyes else None,
            return_dict=False,
            **given,
        )[0]
