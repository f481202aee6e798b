"""Which of diffusers' attention kernels a video network runs on, chosen for one network and not for the process.

What torch's own attention comes to is chosen for a whole run, by the chip: see math/sdpa_policy.py.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from weft.errors import ConfigError
from weft.math.sdpa_policy import Chip

VideoAttention = Literal["auto", "native", "cudnn", "efficient", "math", "flex", "flash"]
BACKENDS = {
    "native": AttentionBackendName.NATIVE,  # torch's sdpa, which chooses among the next three
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "math": AttentionBackendName._NATIVE_MATH,
    "flex": AttentionBackendName.FLEX,
    "flash": AttentionBackendName.FLASH,
}


def set_video_attention(network: nn.Module, choice: VideoAttention) -> None:
    """Choose the kernel; auto leaves diffusers' own. Raises ConfigError for one that this machine has not."""
    if choice == "auto":
        return
    place = f"family.attention: '{choice}'"
    later = choice == "flash" and has_better_than_flash_2()  # then torch's own operator runs the third or the fourth
    if choice == "flash" and not later and find_spec("flash_attn") is None:
        raise ConfigError(
            f"{place} needs the package flash-attn, which is not installed. Install it with pip install 'weft[flash]', "
            "or write family.attention=auto."
        )
    if choice in ("cudnn", "efficient", "flex", "flash") and not torch.cuda.is_available():
        raise ConfigError(f"{place} trains on a GPU only, and torch sees none. Write family.attention=auto.")
    processors = [processor for module in network.modules() if (processor := vars(module).get("processor")) is not None]
    chosen = [processor for processor in processors if "_attention_backend" in dir(processor)]
    if not chosen:
        raise ConfigError(f"{place} fits no layer of this network. Write family.attention=auto.")
    for processor in chosen:
        # diffusers' own setter would choose for every network of the process too.
        processor._attention_backend = BACKENDS["native" if later else choice]


def has_better_than_flash_2() -> bool:
    """Whether the GPU is one of those that flash attention 2 leaves half idle."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return Chip("cuda", torch.cuda.get_device_capability()).is_datacenter
