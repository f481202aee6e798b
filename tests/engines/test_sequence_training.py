"""Processes that part a clip's tokens learn what one process learns, beside data and sharded weights too."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.equality import BOUND, Case, Learned, all_learned, distance
from tests.multi import spawn

# Parts of a gradient are summed over ranks, which differs from one sum by 1e-7; AdamW divides by the root of the second
# moment, and the smallest gradients, of time embeddings, feel it most.
OF_ADAPTERS = 1e-5
WHAT = {
    "native": Case(adapter={"targets": ["all-linear", "patch_embedding"], "conv_rank": 2}),
    "peft": Case(engine={"recompute": True}, adapter={"backend": "peft"}),
}
MESHES = {
    2: {"native": {"sequence": 2, "sequence_method": "ring"}, "peft": {"sequence": 2}},
    4: {
        "native": {"shard": 2, "sequence": 2},
        "peft": {"shard": 2, "sequence": 2},
        "native, copies": {"data": 2, "sequence": 2},
        "native, two heads on four": {"sequence": 4},
    },
}


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Learned]:
    return spawn(1, all_learned, model, WHAT)[0]


@pytest.mark.parametrize("world", list(MESHES))
def test_parted_clips_teach_what_whole_ones_do(world: int, model: Path, alone: dict[str, Learned]):
    cases = {name: replace(WHAT[name.split(",")[0]], parallel=mesh) for name, mesh in MESHES[world].items()}
    results = spawn(world, all_learned, model, cases)
    for name in cases:
        expected = alone[name.split(",")[0]]
        for learned in (said[name] for said in results):
            assert learned.losses == pytest.approx(expected.losses, rel=BOUND), name
            assert learned.norms == pytest.approx(expected.norms, rel=BOUND), name
            assert distance(learned.adapter, expected.adapter) < OF_ADAPTERS, name
            assert learned.answer == pytest.approx(expected.answer, rel=BOUND), name
