"""A network of shapes alone as it is when it has been filled: what a rehearsal needs to hold what a run holds."""

from collections.abc import Sequence

import torch
from torch import nn

from weft.families.storage import COMPUTED, PACKINGS, Float8, Packed, encoded
from weft.families.weights import Form, Kept, Source, assign, kernel_of, packed_layers, put_packed, tensors_of


def dress(network: nn.Module, blocks: Sequence[nn.Module], form: Form, source: Source | None = None) -> None:
    """Let a network of shapes alone, on the meta device, be as it is when it has been filled: each tensor in its dtype,
    and packed what is packed."""
    packed, tensors = packed_layers(network, blocks, form, source), network.state_dict(keep_vars=True)
    for group in tensors_of(network):
        path, _, end = group[0].rpartition(".")
        if end == "weight" and path in packed:
            put_packed(network, path, _codes_alone(network, path, packed[path], form, source), form)
        elif tensors[group[0]].is_floating_point():
            shared = nn.Parameter(tensors[group[0]].data.to(form.full(group[0])), requires_grad=False)
            for alias in group:
                assign(network, alias, shared)


def _codes_alone(network: nn.Module, path: str, kept: Kept, form: Form, source: Source | None) -> Packed:
    """What a packed layer is made of, on the meta device."""
    name, linear = f"{path}.weight", network.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    shape = linear.out_features, linear.in_features
    if not kept.own:
        packing = COMPUTED if kept.computed else PACKINGS[form.storage]
        codes, scale = encoded(packing, torch.empty(shape, device="meta"))
        return Packed(codes, scale, shape, packing, kernel_of(kept))
    assert source is not None
    scale = torch.empty(source.scale_shape(name), device="meta")
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    return Packed(codes, scale, shape, Float8(source.dtype(name)), kernel_of(kept))
