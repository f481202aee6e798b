"""Recomputed blocks whose tokens go some at a time, and heads one by one, learn on many processes what one learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.equality import BOUND, Case, Learned, all_learned, distance
from tests.families import test_video_sequence as sequence
from tests.multi import spawn
from weft.math import by_tokens, normed_attention

RECOMPUTED = {"recompute": True}
ONE = Case(engine=RECOMPUTED, micro_batches=2)
# What a network of Wan learns on two processes.
CASES = {
    "fsdp": replace(ONE, parallel={"shard": "auto"}),
    "sequence": replace(ONE, parallel={"sequence": 2}),
    "ring": replace(ONE, parallel={"sequence": 2, "sequence_method": "ring"}),
}
ZERO = {f"zero{stage}": replace(ONE, engine={**RECOMPUTED, "kind": "deepspeed", "zero": stage}) for stage in (2, 3)}
ANSWERS = ["text to video, lean, recomputed", "joint attention, lean, recomputed"]
# Parts of a gradient are summed over ranks, and AdamW divides by the root of the second moment: see
# test_sequence_training.
OF_ADAPTERS = 1e-5


class Counted:
    """How many pieces there were."""

    def __init__(self) -> None:
        self.plain, self.pieces = by_tokens.pieces, 0

    def __call__(self, *args: Any) -> Any:
        for place in self.plain(*args):
            self.pieces += 1
            yield place


def crumbled(most: int) -> Counted:
    """In this process, which ends with its work: pieces of so many tokens, and single heads."""
    by_tokens.AT_ONCE, by_tokens.ALIGNED = most, 2
    normed_attention.AT_ONCE = 1
    by_tokens.pieces = counted = Counted()  # type: ignore[assignment]
    return counted


def learned_in_pieces(model: Path, cases: dict[str, Case]) -> dict[str, tuple[Learned, int]]:
    """What each case learned, of networks asked about 8 tokens, and in how many pieces."""
    counted, found = crumbled(2), {}
    for name, case in cases.items():
        before = counted.pieces
        learned = all_learned(model, {name: case})[name]
        found[name] = learned, counted.pieces - before
    return found


def answered_in_pieces() -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    counted, found = crumbled(8), {}
    for name in ANSWERS:
        before = counted.pieces
        found[name] = (*sequence.answered(name, parted=True), counted.pieces - before)
    return found


@pytest.fixture(scope="module")
def alone(model: Path) -> Learned:
    """By one process, whose blocks go whole."""
    return spawn(1, all_learned, model, {"one": ONE})[0]["one"]


@pytest.fixture(scope="module")
def together(model: Path) -> list[dict[str, tuple[Learned, int]]]:
    """By each of two processes."""
    return spawn(2, learned_in_pieces, model, CASES)


@pytest.mark.parametrize("name", CASES)
def test_blocks_in_pieces_learn_on_two_processes_what_one_learns(name: str, alone: Learned, together: Any):
    for said in together:
        learned, pieces = said[name]
        assert_learned(learned, pieces, alone)


@pytest.mark.slow
def test_blocks_in_pieces_learn_under_zero_what_one_process_learns(model: Path, alone: Learned):
    """But for ZeRO-3, which spreads weights that only their own modules gather: its blocks are diffusers' own."""
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    for said in spawn(2, learned_in_pieces, model, ZERO):
        learned, pieces = said["zero2"]
        assert_learned(learned, pieces, alone)
        learned, pieces = said["zero3"]
        assert pieces == 0
        assert_learned(learned, None, alone)


def assert_learned(learned: Learned, pieces: int | None, alone: Learned) -> None:
    if pieces is not None:  # 5 steps of 2 blocks, forward and backward, of which each goes in more than one
        assert pieces >= 2 * 5 * 2 * 2
    assert learned.losses == pytest.approx(alone.losses, rel=BOUND)
    assert learned.norms == pytest.approx(alone.norms, rel=BOUND)
    assert distance(learned.adapter, alone.adapter) < OF_ADAPTERS
    torch.testing.assert_close(learned.answer, alone.answer, rtol=1e-5, atol=0)


def test_blocks_in_pieces_answer_and_learn_where_two_ranks_part_the_tokens():
    """Of Wan, and of HunyuanVideo under a mask."""
    results = spawn(2, answered_in_pieces)
    for name in ANSWERS:
        velocity, gradient = sequence.answered(name, parted=False)
        summed = torch.stack([each[name][1] for each in results]).sum(0)
        assert float((summed - gradient).norm() / gradient.norm()) < sequence.BOUND
        for found, _, pieces in (each[name] for each in results):
            assert float((found - velocity).norm() / velocity.norm()) < sequence.BOUND
            assert pieces > 4
