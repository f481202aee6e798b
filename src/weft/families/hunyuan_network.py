"""HunyuanVideo's transformer made ready: islands of fp32 in a half-precision network."""

import re

from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from weft.families.lean_hunyuan import make_lean
from weft.families.precision import keep_fp32, keep_residual_fp32, widen

REFINER_NORM = re.compile(r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm\d\.")


def keeps_fp32(name: str) -> bool:
    """Whether a parameter stays in fp32 in a half-precision network: those of the embeddings of time and guidance, and
    the text refiner's norms, which meet an fp32 residual under fp16."""
    return "time_text_embed." in name or REFINER_NORM.match(name) is not None


def prepared(network: nn.Module, lean: bool) -> nn.Module:
    """The network, frozen, with its time embeddings in fp32, and its residuals too where fp16 would overflow.

    lean: computed by Weft's own forward.
    """
    assert isinstance(network, HunyuanVideoTransformer3DModel)
    widen(network.requires_grad_(False).eval(), keeps_fp32)
    keep_fp32(network.time_text_embed)
    keep_fp32(network.context_embedder.time_text_embed)
    keep_residual_fp32(network.x_embedder)
    keep_residual_fp32(network.context_embedder.proj_in)
    if lean:
        make_lean(network)
    return network
