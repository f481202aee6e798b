"""Copies that lie are found, made again by another way, and refused in the end. No GPU: the liar is a parameter."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from weft.engines.transfer import Route, direct, fingerprint, in_chunks, routes, self_test, through_clone, verified_copy
from weft.errors import RunError

META = torch.device("meta")
CPU = torch.device("cpu")


def to_zeros(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.zeros_like(tensor)


def one_bit_off(tensor: Tensor, device: torch.device) -> Tensor:
    wrong = tensor.clone()
    wrong.view(-1)[0] += 1
    return wrong


def copied(tensor: Tensor, *ways: Route, attempts: int = 3, told: list[str] | None = None) -> Tensor:
    """As verified_copy between devices; the source's device has another name, so that a copy is made on a CPU too."""
    elsewhere = torch.device("cpu", 0)
    return verified_copy(tensor, elsewhere, attempts, ways, [].append if told is None else told.append)


GOOD, ZEROS, BIT = Route("a good copy", direct), Route("a lying copy", to_zeros), Route("a sloppy copy", one_bit_off)


def test_a_right_copy_is_taken_without_a_word():
    told: list[str] = []
    source = torch.randn(3, 5)
    assert_close(copied(source, GOOD, told=told), source, rtol=0, atol=0)
    assert told == []


def test_a_copy_of_zeros_is_made_again_by_another_way_and_told():
    told: list[str] = []
    source = torch.randn(3, 5)
    assert_close(copied(source, ZEROS, GOOD, told=told), source, rtol=0, atol=0)
    assert told == ["copying to cpu:0 went wrong by a lying copy (all zeros); a good copy was right."]


def test_a_copy_that_is_wrong_in_one_number_is_found():
    told: list[str] = []
    copied(torch.randn(1000), BIT, GOOD, told=told)
    assert "a sloppy copy (other bits)" in told[0]


def test_when_no_way_is_right_the_error_names_them_all_and_what_to_do():
    with pytest.raises(RunError, match=r"arrived wrong 3 times, by a lying copy .*, a sloppy copy .*weft doctor"):
        copied(torch.ones(4), ZEROS, BIT)


def test_a_tensor_of_zeros_may_arrive_as_zeros():
    assert copied(torch.zeros(4), ZEROS).count_nonzero() == 0


@pytest.mark.parametrize("way", [direct, through_clone, in_chunks])
@pytest.mark.parametrize(
    "source",
    [
        torch.randn(7, 3),
        torch.randn(7, 3).t(),
        torch.randn(9 << 20),  # 36 MiB: three pieces
        torch.tensor(2.5),
        torch.randn(5).to(torch.bfloat16),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64),
        torch.empty(0, 3),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.dtype}",
)
def test_every_way_copies_every_sort_of_tensor(way, source: Tensor):
    result = copied(source, Route("one", way))
    assert result.shape == source.shape and result.dtype == source.dtype
    assert fingerprint(result) == fingerprint(source)
    assert [*map(str, result.reshape(-1)[:50])] == [*map(str, source.reshape(-1)[:50])]


def test_a_tensor_that_is_there_already_is_not_copied():
    source = torch.randn(3)
    assert verified_copy(source, source.device).data_ptr() == source.data_ptr()
    assert verified_copy(source, META).device == META


def test_on_rocm_nothing_is_copied_straight_from_a_file(monkeypatch: pytest.MonkeyPatch):
    assert routes()[0].copy is direct
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert direct not in [route.copy for route in routes()]


def test_the_self_test_passes_on_a_cpu():
    probes = self_test(CPU, sizes=(1 << 20,))
    assert [probe.name for probe in probes if not probe.passed] == []
    assert {probe.name for probe in probes} == {"round trip 1 MiB", "mapped safetensors", "zero_", "matmul"}


@pytest.mark.parametrize(("liar", "said"), [(to_zeros, "all zeros"), (one_bit_off, "other bits")])
def test_the_self_test_finds_copies_that_lie(liar, said: str):
    wrong = {probe.name: probe.detail for probe in self_test(CPU, copy=liar, sizes=(1 << 20,)) if not probe.passed}
    assert set(wrong) == {"round trip 1 MiB", "mapped safetensors"}
    assert all(f"3 of 3 wrong: the copy on the device differs: {said}" in detail for detail in wrong.values())


def test_a_copy_that_raises_is_a_failed_probe_and_not_the_end():
    def crash(tensor: Tensor, device: torch.device) -> Tensor:
        raise RuntimeError("HIP error: out of luck\nand more")

    details = [probe.detail for probe in self_test(CPU, copy=crash, sizes=(1 << 20,)) if not probe.passed]
    assert details == ["3 of 3 wrong: HIP error: out of luck"] * 2
