"""How Wan's transformer is asked: channels of a given first frame, times of single tokens, islands of fp32."""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from weft.families.lean_wan import make_lean
from weft.families.precision import keep_fp32, keep_residual_fp32, widen
from weft.math.flow import network_timestep

SUB_FRAMES = 4  # frames of pixels in a latent frame; each has its own mask channel
FP32_PARTS = ("condition_embedder.", "scale_shift_table", "norm1.", "norm2.", "norm3.")


def keeps_fp32(name: str) -> bool:
    """Whether a parameter stays in fp32 in a half-precision network: what Wan's own code computes in fp32."""
    return any(part in name for part in FP32_PARTS)


def prepared(network: nn.Module, lean: bool) -> nn.Module:
    """The network, frozen, with its time embedding in fp32, and its residual too where fp16 would overflow.

    lean: computed by Weft's own forward.
    """
    assert isinstance(network, WanTransformer3DModel)
    widen(network.requires_grad_(False).eval(), keeps_fp32)
    keep_fp32(network.condition_embedder)
    keep_residual_fp32(network.patch_embedding)
    if lean:
        make_lean(network)
    return network


def with_image(x: Tensor, image: Tensor) -> Tensor:
    """x (B, 16, f, h, w), behind it the mask (B, 4, f, h, w) and the image's latents (B, 16, f, h, w).

    The mask tells each frame of pixels whether it is given. The first latent frame stands for one frame of pixels, and
    so has that one's answer four times.
    """
    mask = torch.zeros(len(x), SUB_FRAMES, *x.shape[2:], dtype=x.dtype, device=x.device)
    mask[:, :, 0] = 1
    return torch.cat([x, mask, image.to(x.dtype)], dim=1)


def token_timesteps(t: Tensor, given: Tensor, x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """T (B, N) of each token of x (B, C, F, H, W): 0 in the frames that are given (B, F), 1000 t elsewhere."""
    by_frame = network_timestep(t)[:, None] * ~given[:, :: patch[0]]  # (B, F / p)
    return by_frame.repeat_interleave((x.shape[3] // patch[1]) * (x.shape[4] // patch[2]), dim=1)
