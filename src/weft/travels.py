"""What travels between the nouns: batches, questions to a model, losses, and the chance of a micro-batch.

Letters as in contracts.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tensors of B items under their names, and the key of each item (for incidents and data-order tests).

    texts: of rows of text, how many tokens each of the texts packed in a row has, padding being one of them. It stays
    on the host, where layers need it: None where it is not known.
    """

    tensors: Mapping[str, Tensor]
    keys: tuple[str, ...]
    texts: tuple[tuple[int, ...], ...] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Denoise:
    """One question to a denoiser. x: (B, C, F, H, W). t: (B,) in [0, 1], fp32. cond: what the family asks for.

    given: (B, F) bool, latent frames that are known: there x holds their data, and their own time is 0. expert: which
    network is asked, where a model has several.
    """

    x: Tensor
    t: Tensor
    cond: Mapping[str, Tensor]
    given: Tensor | None = None
    expert: str | None = None


@dataclass(frozen=True)
class Tokens:
    """One question to a language model. ids, positions and labels: (B, L) int64.

    positions: place of each token in its own conversation. A 0 begins one, so that conversations packed into a row
    never see each other; padding at a row's end is one too. labels: the token that must come next at each place,
    already shifted; UNLEARNED where nothing is learned.

    What the host knew before the question went to the device, so that nobody has to wait for it there; None: look.
    learned: (n,) int64, the places of all B L that have a label. texts: as in Batch.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    learned: Tensor | None = None
    texts: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Documents:
    """One question to an encoder that sorts documents. ids: (B, L) int64, padded. mask: (B, L) bool, False where a
    place is padding."""

    ids: Tensor
    mask: Tensor


UNLEARNED = -100  # as torch's and transformers' losses have it


@dataclass(frozen=True)
class Loss:
    """total: the loss SUMMED over items. metrics: further sums over items, by name; the loop divides by the count."""

    total: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Rng:
    """The chance of one micro-batch, seeded anew for its place in the run: a resumed run draws the same, and so does
    one on another number of processes.

    own: of the micro-batch, whichever rank has it (noise). shared: equal on all ranks that are at work at the same
    time; anything that alters which network calls are made must come from it, or sharded engines wait for ever.
    draw: number of this micro-batch among its phase's, counted over all ranks since the run began, so that stratified
    draws go on across steps. done: steps that the phase has had before; equal on all ranks and in all micro-batches.
    """

    own: torch.Generator
    shared: torch.Generator
    seed: int
    draw: int
    done: int = 0
