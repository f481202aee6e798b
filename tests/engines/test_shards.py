"""Tensors of many ranks in files: written in slices by some, read in others by others, equal to the bit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.multi import Ranks, spawn
from weft.engines.shards import Copies, Part, Shards, empty_beside, is_sharded, part_of
from weft.errors import RunError

LENGTHS = {"even": 8, "uneven": 5, "fewer than ranks": 3, "one": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def made() -> dict[str, Tensor]:
    """Whole tensors, the same on every rank: of lengths that four ranks divide and of others, in several dtypes."""
    chance = torch.Generator().manual_seed(4)
    tensors = {name: torch.randn(length, 3, generator=chance) for name, length in LENGTHS.items()}
    tensors |= {str(dtype): (100 * torch.randn(6, 2, generator=chance)).to(dtype) for dtype in DTYPES}
    return tensors | {"replicated": torch.randn(4, 4, generator=chance), "number": torch.tensor(7.0)}


def laid_out(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """As FSDP2 has them on a 1-D mesh, as HSDP on a 2-D one, whole in one process; some are on all ranks alike."""
    if mesh is None:
        return made()
    cut = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return {
        name: tensor if name in ("replicated", "number") else distribute_tensor(tensor, mesh, cut)
        for name, tensor in made().items()
    }


def write_all(mesh: DeviceMesh | None, folder: Path) -> list[str]:
    parts = {name: part_of(tensor).staged() for name, tensor in laid_out(mesh).items()}
    return [path.name for path in Shards().write(folder, parts)]


def read_all(mesh: DeviceMesh | None, folder: Path) -> dict[str, Tensor]:
    """Every tensor as this rank gets it, made whole again."""
    room = {name: empty_beside(like, tuple(like.shape), like.dtype) for name, like in laid_out(mesh).items()}
    Shards().read(folder, {name: part_of(tensor) for name, tensor in room.items()})
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in room.items()}


@dataclass
class OnFour:
    """What one of four ranks did: the files that it wrote, by folder, and what it read, by the folder and the mesh."""

    files: dict[str, list[str]]
    found: dict[str, dict[str, Tensor]]
    rows: Tensor  # an optimizer's tensor of another shape than its parameter's


def on_four(root: Path) -> OnFour:
    dist.init_process_group("gloo")
    meshes = {"FSDP": init_device_mesh("cpu", (4,)), "HSDP": init_device_mesh("cpu", (2, 2))}
    files = {name: write_all(mesh, root / name) for name, mesh in meshes.items()}
    found = {
        f"{folder} on {name}": read_all(mesh, root / folder) for name, mesh in meshes.items() for folder in WRITTEN
    }
    parameter = distribute_tensor(torch.zeros(4, 3), meshes["FSDP"], [Shard(0)])
    rows = empty_beside(parameter, (4, 1), torch.float32)
    assert isinstance(rows, DTensor) and rows.placements == (Replicate(),)
    Shards().read(root / "one process", {"rows": part_of(rows)})
    return OnFour(files, found, rows.to_local())


def on_three(root: Path) -> dict[str, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (3,))
    return {folder: read_all(mesh, root / folder) for folder in WRITTEN}


WRITTEN = ("one process", "FSDP", "HSDP")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[OnFour]]:
    """A folder by one process, by four of FSDP, by two times two of HSDP; and what the four did."""
    root = tmp_path_factory.mktemp("written")
    parts = {name: part_of(tensor) for name, tensor in made().items()}
    Shards().write(root / "one process", parts | {"rows": part_of(torch.arange(4.0).view(4, 1))})
    return root, spawn(4, on_four, root)


def assert_whole(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in made().items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_whoever_wrote_them_any_number_of_ranks_reads_the_same_tensors(written):
    root, four = written
    for folder in WRITTEN:
        assert_whole(read_all(None, root / folder))
    for rank in four:
        assert len(rank.found) == 6
        for tensors in rank.found.values():
            assert_whole(tensors)
    for found in spawn(3, on_three, root):
        for tensors in found.values():
            assert_whole(tensors)


@pytest.mark.parametrize("folder", ["FSDP", "HSDP"])
def test_what_ranks_have_alike_is_written_once_and_every_rank_writes_its_own_slices(written, folder):
    root, four = written
    there = sorted(path.name for path in (root / folder).iterdir())
    assert there == sorted(name for rank in four for name in rank.files[folder])
    numbers: dict[str, int] = {}
    for path in (root / folder).iterdir():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                numbers[name] = numbers.get(name, 0) + file.get_tensor(name).numel()
    assert numbers == {name: tensor.numel() for name, tensor in made().items()}


def test_state_of_another_shape_than_its_parameter_is_whole_on_every_rank(written):
    for rank in written[1]:
        assert torch.equal(rank.rows, torch.arange(4.0).view(4, 1))


def test_files_are_safetensors_and_nothing_else(tmp_path):
    write_all(None, tmp_path)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.keys() - {"__metadata__"} == made().keys()


def test_a_part_takes_its_own_slice_of_a_whole():
    part = Part(torch.zeros(2, 3), (4, 0), (6, 3))
    part.take(torch.arange(18.0).view(6, 3))
    assert torch.equal(part.local, torch.tensor([[12.0, 13.0, 14.0], [15.0, 16.0, 17.0]]))


def test_a_staged_part_does_not_follow_the_tensor():
    tensor = torch.ones(3)
    part = part_of(tensor).staged()
    tensor.add_(1)
    assert torch.equal(part.local, torch.ones(3))
    assert not is_sharded(tensor)


def test_copies_keep_shape_and_order_whether_tensors_fill_their_memory_or_not():
    memory = torch.arange(24.0)
    both = {"a": memory[:6].view(2, 3), "b": memory[6:].view(3, 6)}
    whole = torch.arange(40.0).view(4, 10)
    tensors = {**both, "again": both["a"], "corner": whole[:1, :2], "turned": whole.T, "none": torch.zeros(0, 3)}
    copies = Copies(torch.device("cpu"))
    made = copies.make(lambda: {name: part_of(tensor) for name, tensor in tensors.items()})
    copies.hold()
    assert all(torch.equal(made[name].local, tensor) for name, tensor in tensors.items())
    homes = {name: part.local.untyped_storage().data_ptr() for name, part in made.items()}
    assert homes["a"] == homes["b"] == homes["again"] != memory.untyped_storage().data_ptr()
    memory.zero_()
    assert torch.equal(made["b"].local, torch.arange(6.0, 24).view(3, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_what_leaves_a_gpu_is_what_it_was_when_the_copies_were_asked_for():
    weights = torch.ones(2**24, device="cuda")
    for _ in range(50):
        weights.mul_(1.0)
    copies, made = Copies(weights.device), list[dict[str, Part]]()
    thread = Thread(target=lambda: made.append(copies.make(lambda: {"weights": part_of(weights)})))
    thread.start()
    copies.hold()
    weights.zero_()
    thread.join()
    assert made[0]["weights"].local.is_pinned() and bool((made[0]["weights"].local == 1).all())


def failing(folder: Path) -> list[str]:
    dist.init_process_group("gloo")
    shards, said = Shards(), []

    def work() -> int:
        if shards.rank == 1:
            raise OSError(28, "No space left on device")
        return shards.rank

    for attempt in (
        lambda: shards.each(work),
        lambda: shards.first((folder / "is not there").read_text),
        lambda: shards.write(folder / "file" if shards.rank else folder / "free", {"x": part_of(torch.zeros(2))}),
        lambda: shards.read(folder / "is not there", {"x": part_of(torch.zeros(2))}),
    ):
        try:
            attempt()
            said.append("nothing")
        except RunError as failed:
            said.append(str(failed))
    return [*said, str(shards.first(lambda: f"rank {shards.rank}")), str(shards.each(lambda: shards.rank))]


def test_a_failure_of_one_rank_is_told_on_all_of_them(tmp_path):
    (tmp_path / "file").write_text("no folder")
    one, other = spawn(2, failing, tmp_path)
    assert one == other
    assert one[0].startswith("rank 1: OSError: ") and "No space left on device" in one[0]
    assert one[1].startswith("rank 0: FileNotFoundError")
    assert "Exists" in one[2] and "is not there" in one[3]
    assert one[4:] == ["rank 0", "[0, 1]"]


def test_a_file_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(tmp_path):
    Shards().write(tmp_path, {"x": part_of(torch.zeros(2, 3))})
    with pytest.raises(RunError, match=r"y \(2, 3\) is not in it"):
        Shards().read(tmp_path, {"y": part_of(torch.zeros(2, 3))})
    with pytest.raises(RunError, match=r"x \(2, 4\) is \(2, 3\) there"):
        Shards().read(tmp_path, {"x": part_of(torch.zeros(2, 4))})


def write_for_ever(folder: Path) -> None:
    dist.init_process_group("gloo")
    shards, number = Shards(), 0
    while True:
        shards.write(folder / str(number), {"x": part_of(torch.zeros(64, 64))})
        number += 1


def test_a_rank_whose_partner_was_killed_does_not_wait_for_it_for_ever(tmp_path):
    ranks = Ranks(2, write_for_ever, tmp_path)
    try:
        while not (tmp_path / "2").is_dir():
            assert all(process.is_alive() for process in ranks.processes)
        ranks.kill(1)
        ranks.processes[0].join(30)
        assert ranks.processes[0].exitcode == 1
    finally:
        ranks.stop()
