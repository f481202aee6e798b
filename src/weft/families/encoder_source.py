"""The weights of an encoder with a head for documents: read where its files have them, else begun by chance."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weft.families.stored import WeightFiles
from weft.families.text_weights import JoinedSource, open_source
from weft.families.weights import tensors_of
from weft.math.chance import seed_of
from weft.names.rules import Piece

POOLER = "pooler"  # the one part inside an encoder that only a head for documents reads
COUNTED = ("position_ids", "token_type_ids")  # tables in old files that are nothing but numbers counted up


@dataclass(frozen=True)
class EncoderSource(JoinedSource):
    """A source some of whose tensors no file has: they are drawn. begun: their names and shapes."""

    begun: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    network: PreTrainedModel | None = None  # has shapes only; knows how its parts begin
    seed: int = 0

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.begun else super().dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.begun[name] if name in self.begun else super().shape(name)

    def place(self, name: str) -> tuple[str, int]:
        return ("", 0) if name in self.begun else super().place(name)

    def read(self, name: str) -> Tensor:
        if name not in self.begun:
            return super().read(name)
        assert self.network is not None
        return beginning(self.network, name, self.seed)


def encoder_source(
    weights: WeightFiles, network: PreTrainedModel, folder: Path, seed: int, anew: Sequence[str] = ()
) -> EncoderSource:
    """The tensors of a network that has shapes only. What the files lack of its head begins by chance, and so do the
    modules of these paths, whatever the files have. Other tasks' heads are left in the files; what is missing, or too
    much, in the encoder itself stays, for whoever reads it to refuse."""
    found = open_source(weights, network, folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict(keep_vars=True).items()}
    names = {name: piece for name, piece in found.names.items() if name in shapes or _inside(network, name)}
    for name in [name for name in names if _under(name, anew)]:
        del names[name]
    begun: dict[str, tuple[int, ...]] = {}
    for group in tensors_of(network):
        if not any(name in names for name in group) and not _inside(network, group[0]):
            begun[group[0]] = shapes[group[0]]
            names[group[0]] = Piece(group[0])
    return EncoderSource(weights, names, found.scales, found.label, found.joined, found.made, begun, network, seed)


def _under(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _inside(network: PreTrainedModel, name: str) -> bool:
    """Whether a tensor, of the network or of a file, is of the encoder, and not of a head."""
    first, *rest = name.removeprefix(f"{network.base_model_prefix}.").split(".")
    own = dict(network.base_model.named_children())
    own |= dict(network.base_model.named_parameters(recurse=False))  # type: ignore[arg-type]
    return first in own and first != POOLER and (rest or [first])[-1] not in COUNTED


def beginning(network: PreTrainedModel, name: str, seed: int) -> Tensor:
    """First values of a parameter, in fp32: distributed as transformers begins it, and drawn from the seed and its name
    alone. network: has shapes only."""
    shell = deepcopy(network)
    path, _, end = name.rpartition(".")
    owner = shell.get_submodule(path)
    drawn = nn.Parameter(torch.full(owner.get_parameter(end).shape, torch.nan, device="cpu"), requires_grad=False)
    owner._parameters[end] = drawn
    parts = path.split(".")
    above = [shell.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, "head", name))
        for module in above:  # from the layer to the whole: some models say how a layer begins only there
            shell._init_weights(module)
    assert drawn.isfinite().all(), f"transformers does not say how '{name}' begins"
    return drawn.data
