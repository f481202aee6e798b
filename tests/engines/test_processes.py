"""Processes that find each other, agree and add up; and what is said when a launcher has told them half."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multi import RankFailed, spawn
from weft.engines.parallel import Layout, Parallel
from weft.engines.processes import Alone, Place, Together, device_of, join, place_here, place_in
from weft.engines.torch_engine import Torch
from weft.errors import ConfigError

CPU = torch.device("cpu")
LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool)


def test_a_process_that_was_told_nothing_or_of_one_is_alone():
    assert place_in({}) == place_in({**LAUNCHED, "WORLD_SIZE": "1"}) == Place(rank=0, world=1, local=0)


def test_a_launchers_words_are_read():
    assert place_in(LAUNCHED) == Place(rank=3, world=4, local=1)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_a_launchers_words_are_refused_by_the_one_that_is_missing(missing):
    told = {name: value for name, value in LAUNCHED.items() if name != missing}
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is 4, but {missing} is not set. Start the processes with"):
        place_in(told)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "4", "RANK is 4, which is none of 0 to 3"),
        ("RANK", "first", "RANK is 'first'; a whole number was expected"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0; at least 1"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http'"),
    ],
)
def test_words_that_cannot_be_are_refused(name, value, said):
    with pytest.raises(ConfigError, match=said):
        place_in({**LAUNCHED, name: value})


def test_each_of_several_processes_has_the_gpu_of_its_number_on_its_machine():
    cuda = torch.device("cuda")
    assert device_of(cuda, Place(3, 4, 1), installed=2) == torch.device("cuda", 1)
    assert device_of(torch.device("cuda", 1), Place(), installed=2) == torch.device("cuda", 1)
    assert device_of(CPU, Place(3, 4, 1), installed=0) == CPU
    with pytest.raises(ConfigError, match=r"process 1 of this machine \(LOCAL_RANK\) has no GPU of its own: 1 is"):
        device_of(cuda, Place(3, 4, 1), installed=1)
    with pytest.raises(ConfigError, match="'cuda:0' is one GPU, but 4 processes were started"):
        device_of(torch.device("cuda", 0), Place(3, 4, 1), installed=2)
    with pytest.raises(ConfigError, match="several processes cannot share 'mps'"):
        device_of(torch.device("mps"), Place(3, 4, 1), installed=0)


def test_one_process_agrees_with_itself_in_the_words_that_several_would_hear():
    assert Alone().agreed({"a": (1, 2)}) == {"a": [1, 2]}


def meeting() -> tuple[Any, ...]:
    """Everything that processes tell each other, in a layout of two groups of two."""
    section, parallel = Torch(device="cpu"), Parallel(data=4)
    engine, again = section.open(parallel), section.open(parallel)
    group = Together(Layout(data=2, sequence=2), CPU)
    rank = engine.rank
    heard = engine.agreed({"said by": rank, "text": "ä", "list": [1.5, None]} if rank == 0 else None)
    engine.barrier()
    asked: list[int] = []

    def read(dtype: torch.dtype) -> Tensor:
        asked.append(rank)
        return torch.arange(6).view(2, 3).to(dtype)

    tensors = [group.read_by_first(lambda d=dtype: read(d), (2, 3), dtype) for dtype in DTYPES]
    empty = group.read_by_first(lambda: torch.empty(0, 3), (0, 3), torch.float32)
    sums = engine.total(torch.tensor([rank, 1])), group.total(torch.tensor(10**group.data_rank))
    engine.close()
    engine.close()
    whereabouts = (rank, engine.world, engine.data_rank, engine.data_world, again.rank, group.data_rank)
    return whereabouts, heard, sums, tensors, tuple(empty.shape), len(asked)


def test_four_processes_meet_agree_and_add_up():
    found = spawn(4, meeting)
    for rank, (whereabouts, heard, sums, tensors, empty, read) in enumerate(found):
        assert whereabouts == (rank, 4, rank, 4, rank, rank // 2)
        assert heard == {"said by": 0, "text": "ä", "list": [1.5, None]}
        assert sums[0].tolist() == [0 + 1 + 2 + 3, 4]
        assert sums[1] == 1 + 10, "ranks of a sequence group have one loss, which counts once"
        assert [t.dtype for t in tensors] == list(DTYPES)
        assert all(torch.equal(t, torch.arange(6).view(2, 3).to(t.dtype)) for t in tensors)
        assert empty == (0, 3)
        assert read == (len(DTYPES) if rank == 0 else 0), "only rank 0 reads"


def lonely() -> str:
    """Wait three seconds for somebody who never comes."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(ConfigError) as refused:
        join(place_here(), CPU, timeout=0.05)
    return str(refused.value)


def test_processes_that_do_not_meet_are_told_where_they_waited():
    (said,) = spawn(1, lonely)
    assert "the 2 processes did not meet at MASTER_ADDR:MASTER_PORT 127.0.0.1:" in said


def failing() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("said by rank 1")
    Torch(device="cpu").open(Parallel())


def test_a_rank_that_fails_ends_the_others_and_its_trace_is_shown():
    with pytest.raises(RankFailed, match=r"(?s)---- rank 1 ----.*said by rank 1"):
        spawn(2, failing)
