"""An adapter's weights in another precision."""

from dataclasses import replace

import torch

from weft.errors import ConfigError, ModelError, did_you_mean
from weft.formats.adapter_file import SavedAdapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(adapter: SavedAdapter, dtype: str) -> SavedAdapter:
    """The adapter in fp32, bf16 or fp16. Raises ModelError where a weight is beyond what the dtype holds."""
    if dtype not in DTYPES:
        raise ConfigError(f"an adapter is not written in '{dtype}'. {did_you_mean(dtype, tuple(DTYPES))}")
    made = {name: tensor.to(DTYPES[dtype]) for name, tensor in adapter.tensors.items()}
    lost = [name for name in made if bool((made[name].isinf() & adapter.tensors[name].isfinite()).any())]
    if lost:
        raise ModelError(f"'{lost[0]}' has weights beyond the largest number of {dtype}. Write bf16 or fp32.")
    return replace(adapter, tensors=made)
