"""Wan text-to-video transformers in diffusers' layout. They predict the velocity, at times in thousandths."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weft.errors import ConfigError, ModelError
from weft.families.loading import fingerprint, model_folder, read_config, weight_files
from weft.geometry import VideoGeometry
from weft.section import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weft.contracts import Denoise, Encoders

NETWORK = "WanTransformer3DModel"
PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)"
TEXT_LENGTH = 512  # tokens that Wan was trained with, padding included and attended to


class Wan(Section):
    """Wan 2.1 text-to-video: a transformer, AutoencoderKLWan, UMT5."""

    kind: Literal["wan"] = "wan"
    source: str = Field(description="folder in diffusers layout, or 'tiny-wan', the small model that Weft ships")
    subfolder: str = Field(default="transformer", description="folder of the transformer within the source")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="of the frozen weights in memory; auto: the engine's precision"
    )
    text_length: int | None = Field(
        default=None, ge=1, description="text tokens, padding included; null: 512, or the tokenizer's own shorter limit"
    )

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

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The transformer's config.json, checked: text-to-video only. Raises ModelError."""
        config = read_config(model_folder(self.source), self.subfolder, NETWORK)
        if config["in_channels"] != config["out_channels"] or config.get("image_dim"):
            raise ModelError(
                f"family.source: {self.source} takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}: an image-to-video Wan. This version of Weft trains text-to-video Wan."
            )
        return config

    def geometry(self) -> VideoGeometry:
        """From the configs of the VAE and the transformer. Wan runs at 16 frames a second, TI2V-5B at 24."""
        vae = read_config(model_folder(self.source), "vae", "AutoencoderKLWan")
        channels = vae.get("z_dim", 16)
        if channels != self.network_config["in_channels"]:
            raise ModelError(
                f"family.source: the VAE gives {channels} channels, the transformer takes "
                f"{self.network_config['in_channels']}. They are parts of different models."
            )
        space = vae.get("scale_factor_spatial") or 2 ** (len(vae.get("dim_mult", [1, 2, 4, 4])) - 1)
        time = vae.get("scale_factor_temporal") or 2 ** sum(vae.get("temperal_downsample", [False, True, True]))
        patch = tuple(self.network_config["patch_size"])
        assert len(patch) == 3, f"{self.source}: patch_size {patch}"
        fps = 24.0 if channels == 48 else 16.0
        return VideoGeometry(fps=fps, space_stride=space, time_stride=time, patch=patch, latent_channels=channels)

    def identity(self) -> Mapping[str, str]:
        folder = model_folder(self.source)
        return {
            "network": fingerprint(folder, self.subfolder),
            "latents": fingerprint(folder, "vae"),
            "text": fingerprint(folder, "text_encoder", "tokenizer"),
        }

    def skeleton(self, device: str = "meta") -> "nn.Module":
        """The transformer without its weights: on the meta device, or on a device of fake tensors."""
        import torch
        from diffusers import WanTransformer3DModel

        with torch.device(device):
            network = WanTransformer3DModel.from_config(self.network_config)
        assert isinstance(network, WanTransformer3DModel)
        return network

    def weight_dtype(self, precision: str) -> str:
        if self.dtype == "auto":
            return precision
        if precision == "fp32" and self.dtype != "fp32":
            raise ConfigError(
                f"family.dtype: {self.dtype} weights cannot be multiplied in fp32, the engine's precision here. "
                f"Write family.dtype=auto, or engine.precision={self.dtype}."
            )
        return self.dtype

    def load(self, precision: str) -> "nn.Module":
        """The frozen transformer on the cpu, its conditioning embedder in fp32. Raises WeftError."""
        from weft.families.wan_network import load_transformer

        folder = model_folder(self.source)
        weight_files(folder, self.subfolder)
        assert self.network_config
        return load_transformer(folder / self.subfolder, self.weight_dtype(precision))

    def encoders(self, device: "torch.device", carry: "Callable[[nn.Module], nn.Module]") -> "Encoders":
        from weft.families.wan_network import WanEncoders

        folder = model_folder(self.source)
        for part in ("vae", "text_encoder"):
            weight_files(folder, part)
        return WanEncoders.load(folder, self.tokens_of_text, device, carry)

    def scheduler(self) -> Any:
        """The sampler's scheduler as the source's own config asks for."""
        from weft.families.wan_network import load_scheduler

        return load_scheduler(model_folder(self.source))

    @cached_property
    def tokens_of_text(self) -> int:
        """Text tokens with padding, as the transformer sees them."""
        if self.text_length is not None:
            return self.text_length
        folder = model_folder(self.source) / "tokenizer"
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            raise ModelError(f"family.source: {folder} has no tokenizer_config.json. Fetch the tokenizer.")
        limit = json.loads(path.read_text()).get("model_max_length") or TEXT_LENGTH
        return int(min(TEXT_LENGTH, limit))

    def conditions(self, items: int) -> "Mapping[str, Tensor]":
        """Conditions of the right shapes, without meaning: for estimates and benches."""
        import torch

        return {"text": torch.randn(items, self.tokens_of_text, self.network_config["text_dim"])}

    def blocks(self, network: "nn.Module") -> "Sequence[nn.Module]":
        from torch import nn

        blocks = network.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    def forward(self, call: Callable[..., Any], inputs: "Denoise") -> "Tensor":
        """The velocity. Text is padded with zeros to its full length, and attended to, as Wan was trained."""
        from torch.nn.functional import pad

        from weft.math.flow import network_timestep

        text = inputs.cond["text"]  # (B, L, D)
        text = pad(text, (0, 0, 0, self.tokens_of_text - text.shape[1]))
        timestep = network_timestep(inputs.t)
        return call(hidden_states=inputs.x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
