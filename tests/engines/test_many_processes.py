"""Two, three and four processes learn what one learns: DDP, FSDP2 and HSDP on a small real Wan."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.engines.equality import BOUND, Case, Learned, all_learned, distance
from tests.multi import spawn

PEFT = {"backend": "peft"}
RECOMPUTE = {"recompute": True}
KEPT = ["fp8", "int8", *(["nf4"] if find_spec("bitsandbytes") else [])]
# What is trained.
WHAT = {
    "native": Case(),
    "peft": Case(engine=RECOMPUTE, adapter=PEFT),
    "bf16": Case(engine={"precision": "bf16"}),
    "fp16": Case(engine={"precision": "fp16"}),
    **{dtype: Case(family={"dtype": dtype}, engine=RECOMPUTE) for dtype in KEPT},
    "two": Case(micro_batches=2),
    "three": Case(engine=RECOMPUTE, micro_batches=3),
}
MESHES = {"ddp": {}, "fsdp": {"shard": "auto"}, "hsdp": {"data": 2, "shard": 2}}
BROADCAST = {"read": "broadcast"}
# Which of these are shown on how many processes, by the name of the mesh and of what is trained.
SHOWN = {
    2: ["ddp native", "ddp two", "ddp peft", "fsdp native", "fsdp two", "fsdp peft", "fsdp bf16", "fsdp fp16",
        *[f"fsdp {dtype}" for dtype in KEPT]],
    3: ["fsdp three"],
    4: ["ddp bf16", "fsdp native", "hsdp native", "hsdp peft"],
}  # fmt: skip
PLACES = [(world, name) for world, names in SHOWN.items() for name in names]


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Learned]:
    """Each of them learned by one process, which accumulates."""
    return spawn(1, all_learned, model, WHAT)[0]


@pytest.fixture(scope="module")
def together(model: Path) -> dict[tuple[int, str], list[Learned]]:
    """By the number of processes and the name: what each rank says that it learned."""
    found: dict[tuple[int, str], list[Learned]] = {}
    for world, names in SHOWN.items():
        cases = {name: case_of(name) for name in names}
        if world == 2:
            cases |= {f"{mesh} read once": case_of(f"{mesh} native", BROADCAST) for mesh in ("ddp", "fsdp")}
        for said in spawn(world, all_learned, model, cases):
            for name, learned in said.items():
                found.setdefault((world, name), []).append(learned)
    return found


def case_of(name: str, engine: dict[str, str] | None = None) -> Case:
    mesh, _, what = name.partition(" ")
    case = WHAT[what]
    return replace(case, parallel=MESHES[mesh], engine={**case.engine, **(engine or {})})


@pytest.mark.parametrize(("world", "name"), PLACES)
def test_processes_together_learn_what_one_learns(alone, together, world, name):
    expected, (first, *_) = alone[name.partition(" ")[2]], together[world, name]
    assert first.losses == pytest.approx(expected.losses, rel=BOUND)
    assert first.norms == pytest.approx(expected.norms, rel=BOUND)
    assert distance(first.adapter, expected.adapter) < BOUND
    torch.testing.assert_close(first.answer, expected.answer, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("world", "name"), PLACES)
def test_every_process_ends_with_the_same_bits(together, world, name):
    first, *others = together[world, name]
    assert len(others) == world - 1
    for other in others:
        assert (other.losses, other.norms) == (first.losses, first.norms)
        assert all(torch.equal(other.adapter[key], tensor) for key, tensor in first.adapter.items())


@pytest.mark.parametrize("mesh", ["ddp", "fsdp"])
def test_two_processes_with_a_micro_batch_each_learn_bit_for_bit_what_one_learns(alone, together, mesh):
    """a + b = b + a, and clipping divides by a length that is measured in fp32 from the same numbers."""
    expected, found = alone["two"], together[2, f"{mesh} two"][0]
    assert found.losses == expected.losses
    if mesh == "ddp":  # over shards the squares of the norm are added in another order
        assert found.norms == expected.norms
        assert all(torch.equal(found.adapter[key], tensor) for key, tensor in expected.adapter.items())


@pytest.mark.parametrize("mesh", ["ddp", "fsdp"])
def test_weights_that_one_process_reads_and_sends_are_the_weights(together, mesh):
    read, sent = together[2, f"{mesh} native"][0], together[2, f"{mesh} read once"][0]
    assert sent.losses == read.losses
    assert all(torch.equal(sent.adapter[key], tensor) for key, tensor in read.adapter.items())
