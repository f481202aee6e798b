"""Configs and constants of released models, in diffusers' words. Sources: the models' own config files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]

HEAD_WIDTH = 128  # of every released Wan and HunyuanVideo
VISION_HEAD_WIDTH = 80  # of CLIP ViT-H/14


@dataclass(frozen=True)
class Released:
    """One released model. shift and steps are its sampler's defaults; boundary parts the experts in shifted time."""

    family: Literal["wan", "hunyuan-video"]
    task: Literal["t2v", "i2v", "ti2v"]
    network: Config
    vae: Literal["wan-2.1", "wan-2.2", "hunyuan-video"]
    shift: float
    steps: int
    boundary: float | None = None  # of models with two experts
    expand_timesteps: bool = False  # an own time for each token


# ---- Transformers -------------------------------------------------------------------------------------------------


def wan_network(heads: int, ffn: int, layers: int, channels: int = 16, clip: bool = False) -> Config:
    """Config of a WanTransformer3DModel. clip: with the image tokens of Wan 2.1's image-to-video models."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": HEAD_WIDTH,
        "in_channels": channels,
        "out_channels": 48 if channels == 48 else 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": 1280 if clip else None,
        "added_kv_proj_dim": heads * HEAD_WIDTH if clip else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


HUNYUAN_NETWORK: Config = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": HEAD_WIDTH,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": [16, 56, 56],
    "image_condition_type": None,
}

_A14B: Any = {"heads": 40, "ffn": 13824, "layers": 40}

RELEASED: Mapping[str, Released] = {
    "Wan 2.1 T2V 1.3B": Released("wan", "t2v", wan_network(12, 8960, 30), "wan-2.1", shift=5.0, steps=50),
    "Wan 2.1 T2V 14B": Released("wan", "t2v", wan_network(**_A14B), "wan-2.1", shift=5.0, steps=50),
    "Wan 2.1 I2V 14B 480P": Released(
        "wan", "i2v", wan_network(**_A14B, channels=36, clip=True), "wan-2.1", shift=3.0, steps=40
    ),
    "Wan 2.1 I2V 14B 720P": Released(
        "wan", "i2v", wan_network(**_A14B, channels=36, clip=True), "wan-2.1", shift=5.0, steps=40
    ),
    "Wan 2.2 T2V A14B": Released("wan", "t2v", wan_network(**_A14B), "wan-2.1", shift=12.0, steps=40, boundary=0.875),
    "Wan 2.2 I2V A14B": Released(
        "wan", "i2v", wan_network(**_A14B, channels=36), "wan-2.1", shift=5.0, steps=40, boundary=0.9
    ),
    "Wan 2.2 TI2V 5B": Released(
        "wan", "ti2v", wan_network(24, 14336, 30, channels=48), "wan-2.2", 5.0, 50, expand_timesteps=True
    ),
    "HunyuanVideo": Released("hunyuan-video", "t2v", HUNYUAN_NETWORK, "hunyuan-video", shift=7.0, steps=50),
}

# ---- Autoencoders -------------------------------------------------------------------------------------------------

# Means and deviations of the latents: Wan2.2, vae2_1.py and vae2_2.py.
_MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

VAES: Mapping[str, Config] = {
    "wan-2.1": {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": list(_MEAN_2_1),
        "latents_std": list(_STD_2_1),
    },
    "wan-2.2": {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "latents_mean": list(_MEAN_2_2),
        "latents_std": list(_STD_2_2),
    },
    "hunyuan-video": {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
        "mid_block_add_attention": True,
    },
}

# ---- Encoders of text and images ----------------------------------------------------------------------------------

UMT5_XXL: Config = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 256384,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "scalable_attention": True,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}

CLIP_VISION_H: Config = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "projection_dim": 1024,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}

CLIP_TEXT_L: Config = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

LLAVA_LLAMA_3_8B: Config = {
    "architectures": ["LlamaModel"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128320,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128258,
}

# ---- Samplers -----------------------------------------------------------------------------------------------------


def scheduler_config(family: str, shift: float) -> Config:
    """What the released pipelines in diffusers layout name, at a flow shift."""
    if family == "hunyuan-video":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 2,
    }


@dataclass(frozen=True)
class Sizes:
    """What tells transformers of a family apart: width, (double) blocks, input channels, image tokens."""

    inner: int
    layers: int
    channels: int
    clip: bool = False

    @classmethod
    def of(cls, config: Config) -> "Sizes":
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        return cls(inner, config["num_layers"], config["in_channels"], bool(config.get("image_dim")))


def released(family: str, sizes: Sizes, experts: int) -> str | None:
    """The released model of such a size, or None. Of two that differ in nothing that a file shows, the first."""
    for name, model in RELEASED.items():
        two = model.boundary is not None
        if model.family == family and Sizes.of(model.network) == sizes and two == (experts == 2):
            return name
    return None
