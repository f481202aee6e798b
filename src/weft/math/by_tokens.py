"""Tokens that do not see each other, some of them at a time: for the backward pass nothing is kept but what they were.

For a block that runs again in its backward pass. What follows its attention is computed piece by piece, forward and
backward, so that of its inner tensors only those of one piece are there at a time; gradients that all pieces have in
common are summed in fp32. Of the block's second run this part is left out: its backward pass does it once, by itself.
Letters: B items, N tokens, U rows of modulation, each of N / U tokens in order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.projection import LowRank, Projection

AT_ONCE = 4096  # tokens of a piece, of all items: products of so many keep a large GPU busy
ALIGNED = 64  # pieces are multiples of it where they can be

Place = tuple[slice, slice]  # of a piece: its tokens, its rows of modulation


@dataclass(frozen=True)
class Given:
    """What a computation is given. tokens: (B, N, ...) each, and rows: (B or 1, U, ...), of which it is shown those of
    a piece; whole: tensors that all pieces see; layers: linear layers, asked once what they are."""

    tokens: tuple[Tensor, ...]
    rows: tuple[Tensor, ...] = ()
    whole: tuple[Tensor, ...] = ()
    layers: tuple[Projection, ...] = ()


Run = Callable[[Given], Tensor]  # (B, N, ...) in the dtype of the first of its tokens


def by_tokens(run: Run, given: Given) -> Tensor:
    """run(given), in pieces; as a whole where gradients or layers are such that pieces know nothing of them."""
    if not can_be_parted(given):
        return run(given)
    plan, flat = Plan.of(run, given)
    there: list[Any] = []
    anchor = _Keep.apply(there, *flat)
    return _InPieces.apply(anchor, there[0], plan, *flat)  # type: ignore[return-value]  # apply has no types


def are_many(x: Tensor) -> bool:
    """Whether tokens (B, N, ...) make more than one piece."""
    return x.shape[:2].numel() > AT_ONCE


def pieces(tokens: int, rows: int, most: int) -> Iterator[Place]:
    """Places of equal pieces of at most so many tokens; each is within one row of modulation, or of some whole ones."""
    of_row = tokens // rows
    if of_row <= most:
        step = max(1, most // of_row)
        for row in range(0, rows, step):
            end = min(rows, row + step)
            yield slice(row * of_row, end * of_row), slice(row, end)
        return
    step = ceil(of_row / ceil(of_row / most))
    step = min(of_row, -(-step // ALIGNED) * ALIGNED)
    for row in range(rows):
        for begin in range(0, of_row, step):
            first = row * of_row
            yield slice(first + begin, first + min(of_row, begin + step)), slice(row, row + 1)


def can_be_parted(given: Given) -> bool:
    """Whether gradients and layers are such that pieces know all of them."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    known = all(layer.kernel is not None for layer in given.layers)
    return known and not any(t is not None and t.requires_grad for layer in given.layers for t in layer.tensors)


@dataclass(frozen=True)
class Plan:
    """A computation and what is known of its tensors, which travel apart. counts: of its tokens, rows and whole."""

    run: Run
    counts: tuple[int, int, int]
    layers: tuple[Projection, ...]
    computing: Callable[[], AbstractContextManager[Any]]

    @staticmethod
    def of(run: Run, given: Given) -> "tuple[Plan, list[Tensor | None]]":
        """The plan, and all tensors in a row."""
        flat: list[Tensor | None] = [*given.tokens, *given.rows, *given.whole]
        for layer in given.layers:
            flat += layer.tensors
            if layer.change is not None:
                flat += [layer.change.a, layer.change.b, *(layer.change.narrow or (None, None))]
        kind = given.tokens[0].device.type
        # Autograd calls a backward pass outside of autocast.
        computing = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        counts = len(given.tokens), len(given.rows), len(given.whole)
        return Plan(run, counts, given.layers, computing), flat

    def given(self, flat: Sequence[Any]) -> Given:
        """What stands in a row of tensors."""
        parts, at = [], 0
        for count in self.counts:
            parts.append(tuple(flat[at : at + count]))
            at += count
        layers = []
        for layer in self.layers:
            tensors, at = tuple(flat[at : at + len(layer.tensors)]), at + len(layer.tensors)
            change = layer.change
            if change is not None:
                a, b, *narrow = flat[at : at + 4]
                at += 4
                change = LowRank(a, b, change.scale, None if narrow[0] is None else (narrow[0], narrow[1]))
            layers.append(replace(layer, tensors=tensors, change=change))
        tokens, rows, whole = parts
        return Given(tokens, rows, whole, tuple(layers))

    def places(self, flat: Sequence[Any]) -> Iterator[Place]:
        x, (tokens, rows, _) = flat[0], self.counts
        most = max(ALIGNED, AT_ONCE // max(1, len(x)))
        return pieces(x.shape[1], flat[tokens].shape[1] if rows else 1, most)

    def piece(self, place: Place, flat: Sequence[Any]) -> list[Any]:
        """The row of tensors as one piece sees it."""
        tokens, rows, _ = self.counts
        here = [place[0]] * tokens + [place[1]] * rows
        return [*(t[:, own] for t, own in zip(flat, here, strict=False)), *flat[tokens + rows :]]


class _Keep(torch.autograd.Function):
    """Keeps what the other one needs, before that has computed anything: a second run of a block ends here."""

    @staticmethod
    def forward(ctx: Any, there: list[Any], *flat: Tensor | None) -> Tensor:
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        there.append(ctx)
        return flat[0].new_empty(0)  # type: ignore[union-attr]  # tokens; where they are, so that it is their turn

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, keeping: Any, plan: Plan, *flat: Any) -> Tensor:
        ctx.keeping, ctx.plan = keeping, plan
        answer: Tensor | None = None
        for place in plan.places(flat):
            found = plan.run(plan.given(plan.piece(place, flat)))
            if answer is None:
                answer = found.new_empty((*flat[0].shape[:2], *found.shape[2:]))
            answer[:, place[0]] = found
        assert answer is not None
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        flat = ctx.keeping.saved_tensors
        sums = Sums(plan, flat, ctx.needs_input_grad[3:])
        for place in plan.places(flat):
            with torch.enable_grad(), plan.computing():
                leaves = sums.leaves(place)
                answer = plan.run(plan.given(leaves))
            sums.add(place, leaves, answer, grad[:, place[0]])
            del leaves, answer
        return None, None, None, *sums.gradients()


@dataclass
class Sums:
    """Gradients of a row of tensors. Those of tokens are written where they belong, in their own dtype; the others,
    to which several pieces add, are summed in fp32 or wider."""

    plan: Plan
    flat: Sequence[Any]
    needs: Sequence[bool]
    found: dict[int, Tensor] = field(default_factory=dict)

    def leaves(self, place: Place) -> list[Any]:
        """What one piece sees, cut off from what it came from."""
        seen = self.plan.piece(place, self.flat)
        return [t.detach().requires_grad_() if need else t for t, need in zip(seen, self.needs, strict=True)]

    def add(self, place: Place, leaves: Sequence[Any], answer: Tensor, grad: Tensor) -> None:
        """The gradients of one piece."""
        wanted = [number for number, need in enumerate(self.needs) if need]
        made = torch.autograd.grad(answer, [leaves[number] for number in wanted], grad, allow_unused=True)
        tokens, rows, _ = self.plan.counts
        for number, own in zip(wanted, made, strict=True):
            total = self._total(number)
            if number < tokens:
                total[:, place[0]] = 0 if own is None else own
            elif own is not None:
                (total[:, place[1]] if number < tokens + rows else total).add_(own)

    def _total(self, number: int) -> Tensor:
        if number not in self.found:
            whole: Tensor = self.flat[number]
            if number < self.plan.counts[0]:
                self.found[number] = torch.empty_like(whole)
            else:
                dtype = torch.promote_types(whole.dtype, torch.float32)
                self.found[number] = torch.zeros_like(whole, dtype=dtype)
        return self.found[number]

    def gradients(self) -> list[Tensor | None]:
        """All of them, None where none was wanted."""
        return [self.found[number].to(t.dtype) if number in self.found else None for number, t in enumerate(self.flat)]
