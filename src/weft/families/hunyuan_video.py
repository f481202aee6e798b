"""HunyuanVideo: text-to-video, its guidance an input of the network. It predicts the velocity, at T = 1000 t."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weft.errors import ModelError
from weft.families.video_model import VideoModel
from weft.geometry import VideoGeometry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weft.contracts import Denoise, Encoders, Expert, SequenceGroup, Tokens

DOUBLE = r"transformer_blocks\.\d+"
SINGLE = r"single_transformer_blocks\.\d+"
JOINT = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
MLP = r"(ff|ff_context)\.net\.(0\.proj|2)"
ATTENTION = rf"{DOUBLE}\.{JOINT}|{SINGLE}\.attn\.to_[qkv]"

# Official and musubi's names, then ComfyUI's, of the layers in a block -> those of diffusers.
IN_DOUBLE: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("img_attn_qkv", "img_attn.qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("img_attn_proj", "img_attn.proj"): ("attn.to_out.0",),
    ("txt_attn_qkv", "txt_attn.qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("txt_attn_proj", "txt_attn.proj"): ("attn.to_add_out",),
    ("img_mlp.fc1", "img_mlp.0"): ("ff.net.0.proj",),
    ("img_mlp.fc2", "img_mlp.2"): ("ff.net.2",),
    ("txt_mlp.fc1", "txt_mlp.0"): ("ff_context.net.0.proj",),
    ("txt_mlp.fc2", "txt_mlp.2"): ("ff_context.net.2",),
    ("img_mod.linear", "img_mod.lin"): ("norm1.linear",),
    ("txt_mod.linear", "txt_mod.lin"): ("norm1_context.linear",),
}
IN_SINGLE: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("linear1",): ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("linear2",): ("proj_out",),
    ("modulation.linear", "modulation.lin"): ("norm.linear",),
}


class HunyuanVideo(VideoModel):
    """HunyuanVideo text-to-video: a transformer of double and single blocks, its autoencoder, Llama, CLIP."""

    kind: Literal["hunyuan-video"] = "hunyuan-video"
    text_length: int = Field(
        default=256, ge=1, description="text tokens of a caption at most, the template not counted"
    )
    guidance: float = Field(
        default=1.0, gt=0, description="the guidance that the network is told while it trains; samples tell their own"
    )
    lean: bool = Field(
        default=True,
        description="compute the network by Weft's own code, equal to diffusers' to rounding: for the backward "
        "pass a double block keeps 10 tensors of its tokens' width and a single one 9, and attention has no mask where "
        "the texts of a batch are of one length; false: diffusers' code, which has gradients of gradients too",
    )

    network_class: ClassVar[str] = "HunyuanVideoTransformer3DModel"
    targets: ClassVar[Mapping[str, str]] = {
        "attention": ATTENTION,
        "attention+ffn": rf"{ATTENTION}|{DOUBLE}\.{MLP}|{SINGLE}\.proj_(mlp|out)",
        "all-linear": rf"({DOUBLE}|{SINGLE})\..*",
    }

    @cached_property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """Whole paths, block by block: a layer's name alone would also find the text refiner's, or the last layer."""
        return dict(aliases_of(self.network_config["num_layers"], self.network_config["num_single_layers"]))

    @property
    def experts(self) -> "tuple[Expert, ...]":
        from weft.contracts import DEFAULT

        return (DEFAULT,)

    @property
    def all_experts(self) -> "tuple[Expert, ...]":
        return self.experts

    @property
    def image(self) -> Literal["none", "channels", "frames"]:
        return "none"

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.network_config["guidance_embeds"])

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The transformer's config, checked: text-to-video only. Raises ModelError."""
        config = self.checkpoint.config("transformer")
        if config["in_channels"] != config["out_channels"] or config.get("image_condition_type"):
            raise ModelError(
                f"family.source: {self.source} holds an image-to-video HunyuanVideo, which takes "
                f"{config['in_channels']} channels. Weft trains the text-to-video model; choose that one."
            )
        return config

    def geometry(self) -> VideoGeometry:
        """From the configs of the autoencoder and the transformer; 24 frames a second."""
        vae, network = self.checkpoint.config("vae"), self.network_config
        channels = vae.get("latent_channels", 16)
        self.check_channels(channels, network["in_channels"])
        side = network["patch_size"]
        return VideoGeometry(
            fps=24.0,
            space_stride=vae.get("spatial_compression_ratio", 8),
            time_stride=vae.get("temporal_compression_ratio", 4),
            patch=(network["patch_size_t"], side, side),
            latent_channels=channels,
            causal=False,  # its autoencoder normalises over all frames
        )

    def identity(self) -> Mapping[str, str]:
        fingerprint = self.checkpoint.fingerprint
        return {
            "network": fingerprint("transformer"),
            "latents": self.latents_identity(fingerprint("vae")),
            "text": f"{fingerprint('text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2')} {self.text_length}",
        }

    def conditions(self, items: int, frames: int, height: int, width: int) -> "Mapping[str, Tensor]":
        """Conditions of the right shapes, without meaning: for estimates and benches."""
        import torch

        config = self.network_config
        return {
            "text": torch.randn(items, self.text_length, config["text_embed_dim"]),
            # Several texts are masked, for they may have any lengths; one is as long as it is.
            "text_mask": torch.ones(items, self.text_length if items > 1 else 1, dtype=torch.bool),
            "pooled": torch.randn(items, config["pooled_projection_dim"]),
        }

    def sampler(self, steps: int, device: "torch.device") -> Any:
        """Noise levels from 1 in even steps before the shift, as HunyuanVideo's pipeline takes them. The scheduler
        alone would begin from a table that is already shifted."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self.scheduler()
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return super().sampler(steps, device)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        return scheduler

    def keeps_fp32(self, name: str) -> bool:
        from weft.families.hunyuan_network import keeps_fp32

        return keeps_fp32(name)

    def prepared(self, network: "nn.Module") -> "nn.Module":
        from weft.families.hunyuan_network import prepared

        return prepared(network, self.lean)

    def encoders(self, device: "torch.device", carry: "Callable[[nn.Module], nn.Module]") -> "Encoders":
        from diffusers import AutoencoderKLHunyuanVideo
        from transformers import CLIPTextModel, LlamaModel

        from weft.families.hunyuan_encoders import HunyuanEncoders

        vae = self.autoencoder(AutoencoderKLHunyuanVideo)
        llama = self.checkpoint.module("text_encoder", LlamaModel, "stored")
        clip = self.checkpoint.module("text_encoder_2", CLIPTextModel, "stored")
        for module in (vae, llama, clip):
            carry(module)
        tokenizer = self.tokenizer("tokenizer", padding_side="right")  # the template is cut from the left
        return HunyuanEncoders(vae, llama, clip, tokenizer, self.tokenizer("tokenizer_2"), self.text_length, device)

    def blocks(self, network: "nn.Module") -> "Sequence[nn.Module]":
        from torch import nn

        double, single = map(network.get_submodule, ("transformer_blocks", "single_transformer_blocks"))
        assert isinstance(double, nn.ModuleList) and isinstance(single, nn.ModuleList)
        return [*double, *single]

    def divide(self, network: "nn.Module", sequence: "SequenceGroup") -> None:
        from weft.families.video_sequence import divide_hunyuan

        divide_hunyuan(network, sequence)

    def forward(self, call: Callable[..., Any], inputs: "Denoise | Tokens") -> "Tensor":
        """The velocity. Only what the mask calls text is attended to; guidance is told in thousandths, as time is.

        A mask (B, 1) says that all is text, and then there is none: fused kernels know no masks.
        """
        import torch

        from weft.contracts import Denoise
        from weft.math.flow import network_timestep

        assert isinstance(inputs, Denoise), "a video model is asked about latents"
        assert inputs.given is None, "HunyuanVideo takes no clean frame"
        x, cond = inputs.x, inputs.cond
        text, mask, guidance = cond["text"], cond["text_mask"], None
        if mask.shape[1] == 1:
            mask = None if self.lean else mask.expand(text.shape[:2])
        if self.embeds_guidance:
            told = cond["guidance"] if "guidance" in cond else torch.full_like(inputs.t, self.guidance)
            guidance = network_timestep(told)
        return call(
            hidden_states=x,
            timestep=network_timestep(inputs.t),
            encoder_hidden_states=text.to(x.dtype),
            encoder_attention_mask=mask,
            pooled_projections=cond["pooled"].to(x.dtype),
            guidance=guidance,
            return_dict=False,
        )[0]


def aliases_of(doubles: int, singles: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(another program's path, paths in diffusers) of every layer in every block."""
    for theirs, ours, table, count in (
        ("double_blocks", "transformer_blocks", IN_DOUBLE, doubles),
        ("single_blocks", "single_transformer_blocks", IN_SINGLE, singles),
    ):
        for number in range(count):
            for names, layers in table.items():
                for name in names:
                    yield f"{theirs}.{number}.{name}", tuple(f"{ours}.{number}.{layer}" for layer in layers)
