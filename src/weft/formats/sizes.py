"""Whether the tensors of one layer fit together, whatever file they come from."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, A, B

W1_A, W1_B, W2_A, W2_B = ENDS["loha"]


def refuse_misfits(name: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise ModelError for tensors of a layer, by their canonical ends, that are no factors of one change."""
    pairs = [(A, B), (W1_B, W1_A), (W2_B, W2_A), (".lokr_w1_b", ".lokr_w1_a"), (".lokr_w2_b", ".lokr_w2_a")]
    for inner, outer in pairs:
        if inner not in tensors or outer not in tensors:
            continue
        low, high = tensors[inner], tensors[outer]
        if low.dim() < 2 or high.dim() < 2 or not len(low) or len(low) != high.shape[1]:
            raise _misfit(name, {inner: low, outer: high}, source)
    halves = [(tensors[outer].shape[0], tensors[inner].shape[1]) for inner, outer in pairs[1:3] if inner in tensors]
    if len(set(halves)) > 1:
        raise _misfit(name, {end: tensors[end] for end in ENDS["loha"]}, source)
    flat = {end: tensors[end] for end in (".lokr_w1", ".lokr_w2", ".oft_R.weight") if end in tensors}
    if any(tensor.dim() != 2 for tensor in flat.values()):
        raise _misfit(name, flat, source)
    if MAGNITUDE in tensors and B in tensors and not tensors[MAGNITUDE].numel():
        raise _misfit(name, {MAGNITUDE: tensors[MAGNITUDE]}, source)


def _misfit(name: str, tensors: Mapping[str, Tensor], source: Path) -> ModelError:
    shapes = " and ".join(f"{end.strip('.')} {tuple(tensor.shape)}" for end, tensor in tensors.items())
    return ModelError(f"{source} is damaged: '{name}' has {shapes}, which make no change of a layer.")
