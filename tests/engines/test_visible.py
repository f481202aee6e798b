"""Every form in which an environment and a driver name the GPUs that a process may use."""

import os

import pytest
import torch

from weft.engines.visible import (
    PROCESS_NUMBER,
    Installed,
    child_environment,
    gpus_here,
    process_number,
    read_cuda_listing,
    read_rocm_listing,
    torch_uuid,
    visible_gpus,
)

A, B, C = "GPU-5d5ba0d6-d33d-2b2c", "GPU-5d5b77aa-0000-1111", "GPU-9f2e0000-aaaa-bbbb"
ALIKE = (Installed(0, A, "V100"), Installed(1, B, "V100"), Installed(2, C, "V100"))
MIXED = (Installed(0, A, "T4"), Installed(1, B, "H100"))
S, T, U = "MIG-c6d4f1ef-42e4", "MIG-cba663e8-9bed", "MIG-41b35a11-0000"
CUT = (Installed(0, A, "A100", (S, T)), Installed(1, B, "A100", (U,)), Installed(2, C, "A100"))


def cuda(listed: str | None, installed=ALIKE, seen=None, **more: str):
    return visible_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed, **more}, installed, seen)


@pytest.mark.parametrize(
    ("listed", "physical"),
    [
        (None, [0, 1, 2]),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("0,2,-1,1", [0, 2]),  # the example of CUDA's programming guide
        ("", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("1,1", []),
        ("0,7,1", [0]),
        ("1gpu2,2ampere", [1, 2]),  # torch's own example
        (A, [0]),
        ("GPU-9", [2]),
        ("GPU-5d5b", []),  # two GPUs begin so
        (f"{C},GPU-5d5ba", [2, 0]),
        (f"{C},GPU-9f2e", []),
        (f"{C},GPU-ffff,{A}", [2]),
        (f"{A},1", [0]),
        (f"1,{A}", [1]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(listed, physical):
    assert [gpu.physical for gpu in cuda(listed).gpus] == physical


@pytest.mark.parametrize(
    "listed", ["", "-1", "0", "2,0", "0,2,-1,1", "1,1", "none", "NoDevFiles", "0,7,1", A, "GPU-9", "GPU-5d5b",
               f"{C},GPU-5d5ba", f"{C},GPU-9f2e", f"{C},GPU-ffff,{A}", f"{A},1", f"1,{A}"]
)  # fmt: skip
def test_torchs_own_parser_finds_the_same_gpus(listed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    theirs = torch.cuda._parse_visible_devices()
    if theirs and isinstance(theirs[0], str):
        theirs = torch.cuda._transform_uuid_to_ordinals([str(name) for name in theirs], [A, B, C])
    there = []
    for index in theirs:  # torch leaves it to CUDA to stop at an index that no GPU has
        if int(index) >= 3:
            break
        there.append(index)
    assert [gpu.physical for gpu in cuda(listed).gpus] == there


@pytest.mark.parametrize(
    ("listed", "entries", "physical"),
    [
        (S, [S], [0]),
        ("MIG-4", [U], [1]),
        ("MIG-c", [], []),
        (f"{U},{S}", [U, S], [1, 0]),
        (f"MIG-{C}/1/0", [f"MIG-{C}/1/0"], [2]),
        ("MIG-GPU-nowhere/1/0", [], []),
        (None, [S, T, U], [0, 0, 1]),  # no whole GPU beside slices
        ("1", ["1"], [1]),
    ],
)
def test_mig_devices_are_found_under_both_of_their_names(listed, entries, physical):
    found = cuda(listed, CUT).gpus
    assert [gpu.entry for gpu in found] == entries and [gpu.physical for gpu in found] == physical


def test_two_slices_of_one_gpu_are_numbered_by_their_order_for_their_files_must_differ():
    assert [gpu.number for gpu in cuda(f"{S},{T}", CUT).gpus] == [0, 1]
    assert [gpu.number for gpu in cuda(f"{U},{S}", CUT).gpus] == [1, 0]


def test_a_process_sees_one_mig_device_and_is_told_how_to_use_the_others():
    found = cuda(None, CUT, seen=["c6d4f1ef-42e4"])
    assert len(found.gpus) == 3 and "one MIG device only" in found.notes[0]


def test_without_a_driver_indices_are_taken_as_they_stand_and_uuids_by_their_order():
    assert [(gpu.number, gpu.physical) for gpu in cuda("3,5", None).gpus] == [(3, 3), (5, 5)]
    uuids = cuda(f"{B},{A}", None)
    assert [(gpu.number, gpu.physical, gpu.entry) for gpu in uuids.gpus] == [(0, None, B), (1, None, A)]
    assert "numbered by their order" in uuids.notes[0]
    assert [gpu.entry for gpu in cuda(None, None, seen=[None, None]).gpus] == ["0", "1"]
    assert cuda(None, None, seen=[]) == cuda("", None)


def test_gpus_of_different_kinds_are_known_by_their_uuid_for_cuda_counts_the_fastest_first():
    unasked = cuda("0", MIXED)
    assert unasked.gpus[0].physical is None and "PCI_BUS_ID" in unasked.notes[0]
    by_torch = cuda("0", MIXED, seen=[B.removeprefix("GPU-")])
    assert (by_torch.gpus[0].physical, by_torch.gpus[0].name, by_torch.notes) == (1, "H100", ())
    assert cuda("0", MIXED, CUDA_DEVICE_ORDER="PCI_BUS_ID").gpus[0].physical == 0


def test_what_torch_does_not_see_is_left_out_and_said():
    found = cuda(None, ALIKE, seen=[None])
    assert [gpu.physical for gpu in found.gpus] == [0]
    assert found.notes == ("The environment and the driver name 3 GPUs, but torch sees 1.",)


@pytest.mark.parametrize(
    ("environment", "physical", "entries"),
    [
        ({}, [0, 1, 2], ["0", "1", "2"]),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, [2, 0], ["0", "1"]),
        ({"ROCR_VISIBLE_DEVICES": f"1,{C}"}, [1, 2], ["0", "1"]),
        ({"ROCR_VISIBLE_DEVICES": "1,1,2"}, [1], ["0"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, [], []),
        ({"HIP_VISIBLE_DEVICES": "2,1"}, [2, 1], ["2", "1"]),
        ({"HIP_VISIBLE_DEVICES": "GPU-9"}, [2], ["2"]),
        ({"HIP_VISIBLE_DEVICES": ""}, [], []),
        ({"HIP_VISIBLE_DEVICES": "0,x,1"}, [0], ["0"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1], ["1"]),
        ({"GPU_DEVICE_ORDINAL": "2"}, [2], ["2"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1", "GPU_DEVICE_ORDINAL": "2"}, [0], ["0"]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, [1], ["1"]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "CUDA_VISIBLE_DEVICES": "0"}, [2], ["0"]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "2"}, [], []),
    ],
)
def test_on_rocm_the_second_list_counts_within_the_first(environment, physical, entries):
    found = visible_gpus(environment, ALIKE, rocm=True).gpus
    assert [gpu.physical for gpu in found] == physical and [gpu.entry for gpu in found] == entries


def test_rocm_without_a_driver_keeps_the_first_lists_numbers():
    environment = {"ROCR_VISIBLE_DEVICES": "4,6", "HIP_VISIBLE_DEVICES": "1"}
    (gpu,) = visible_gpus(environment, None, rocm=True).gpus
    assert (gpu.physical, gpu.entry) == (6, "1")


@pytest.mark.parametrize("listed", [None, "2,0", f"{C},GPU-5d5ba", "GPU-9"])
def test_a_child_sees_its_own_gpu_alone_and_calls_its_files_as_the_parent_does(listed):
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    for gpu in visible_gpus(environment, ALIKE).gpus:
        child = child_environment(environment, gpu)
        (own,) = visible_gpus(child, ALIKE).gpus
        assert (own.physical, own.uuid) == (gpu.physical, gpu.uuid)
        assert process_number(child, own) == gpu.number


def test_a_child_on_rocm_counts_within_what_rocr_leaves_it():
    environment = {"ROCR_VISIBLE_DEVICES": "2,1", "GPU_DEVICE_ORDINAL": "1,0"}
    for gpu in visible_gpus(environment, ALIKE, rocm=True).gpus:
        (own,) = visible_gpus(child_environment(environment, gpu, rocm=True), ALIKE, rocm=True).gpus
        assert own.physical == gpu.physical


def test_a_process_without_gpu_is_number_0_unless_its_parent_says_otherwise():
    assert process_number({}, None) == 0 and process_number({PROCESS_NUMBER: "3"}, None) == 3


def test_the_drivers_own_lists_are_read():
    text = (
        f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})\n"
        f"  MIG 3g.20gb     Device  0: (UUID: {S})\n"
        f"  MIG 1g.5gb      Device  1: (UUID: MIG-{A}/7/0)\n"
        f"GPU 1: Tesla T4 (UUID: {B})\n"
    )
    assert read_cuda_listing(text) == (
        Installed(0, A, "NVIDIA A100-SXM4-40GB", (S, f"MIG-{A}/7/0")),
        Installed(1, B, "Tesla T4"),
    )
    cards = '{"card1": {"Unique ID": "0x1f"}, "card0": {"Unique ID": "0xAB", "Card series": "MI300X"}, "system": {}}'
    listed = read_rocm_listing(cards)
    assert listed == (Installed(0, "GPU-00000000000000ab", "MI300X"), Installed(1, "GPU-000000000000001f"))
    assert read_rocm_listing("no GPU") is None


def test_a_uuid_that_rocm_spells_in_letters_is_the_drivers():
    spelled = b"00000000000000ab".hex()
    dashed = "-".join((spelled[:8], spelled[8:12], spelled[12:16], spelled[16:20], spelled[20:]))
    assert torch_uuid(dashed, rocm=True) == "00000000000000ab"
    assert torch_uuid(dashed, rocm=False) == dashed
    assert torch_uuid("5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", rocm=True) == "5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"


def test_this_process_sees_as_many_gpus_as_torch_does():
    assert len(gpus_here().gpus) == torch.cuda.device_count() or "MIG" in os.environ.get("CUDA_VISIBLE_DEVICES", "")
