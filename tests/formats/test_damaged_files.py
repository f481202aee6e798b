"""What is damaged in an adapter's file is named in one sentence, wherever it is, and never carried on into another."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.errors import ModelError
from weft.formats.describe import describe
from weft.formats.header import read_header
from weft.formats.reading import experts_in, read_adapter

Q = "diffusion_model.blocks.0.self_attn.q"
DOWN, UP = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)), torch.ones(8, 2)
ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}


def with_header(folder: Path, header: bytes) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


def lora(folder: Path, metadata: dict[str, str] | None = None, **change: Tensor) -> Path:
    ends = {"lora_A": DOWN, "lora_B": UP, **{name: tensor for name, tensor in change.items() if name != "alpha"}}
    tensors = {f"{Q}.{end}.weight": tensor.contiguous() for end, tensor in ends.items()}
    tensors |= {f"{Q}.alpha": change["alpha"]} if "alpha" in change else {}
    path = folder / "a.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[1, 2]",
        json.dumps({"__metadata__": [1], f"{Q}.lora_A.weight": ENTRY}).encode(),
        json.dumps({"__metadata__": {"weft.config": 5}, f"{Q}.lora_A.weight": ENTRY}).encode(),
        json.dumps({f"{Q}.lora_A.weight": {**ENTRY, "shape": [-1, 2]}}).encode(),
        json.dumps({f"{Q}.lora_A.weight": {**ENTRY, "shape": [1 << 40, 1 << 20]}}).encode(),
        json.dumps({f"{Q}.lora_A.weight": {**ENTRY, "data_offsets": [0]}}).encode(),
    ],
    ids=["brackets", "deep", "list", "metadata", "number", "negative", "huge", "offsets"],
)
def test_a_header_that_no_library_writes_is_damaged(header, tmp_path):
    with pytest.raises(ModelError, match="its header is damaged"):
        read_header(with_header(tmp_path, header))


def test_a_dtype_that_the_library_does_not_know_is_no_fault_of_weft(tmp_path):
    header = {f"{Q}.lora_{half}.weight": {**ENTRY, "dtype": "Q9"} for half in "AB"}
    with pytest.raises(ModelError, match=r"cannot be read: .*Q9"):
        read_adapter(with_header(tmp_path, json.dumps(header).encode()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_A": DOWN / 0}, r"16 of the 16 numbers of '.*lora_A.weight' are NaN or infinite"),
        ({"lora_A": DOWN.index_fill(0, torch.tensor([1]), float("nan"))}, "8 of the 16 numbers"),
        ({"lora_B": UP.int()}, "stored as int32"),
        ({"alpha": torch.tensor(float("inf"))}, r"'.*\.alpha' are NaN or infinite"),
        ({"alpha": torch.tensor([1.0, 2.0])}, "an alpha of 2 numbers"),
        ({"lora_A": torch.ones(3, 8)}, r"has lora_A.weight \(3, 8\) and lora_B.weight \(8, 2\), which make no change"),
        ({"lora_A": torch.ones(0, 8), "lora_B": torch.ones(8, 0)}, "make no change of a layer"),
        ({"lora_A": torch.tensor(1.0)}, "make no change of a layer"),
    ],
)
def test_numbers_that_make_no_change_of_a_layer_are_refused(change, words, tmp_path):
    path = lora(tmp_path, **change)
    with pytest.raises(ModelError, match=words):
        read_adapter(path)
    describe(path)  # by the header alone, which may be odd


@pytest.mark.parametrize(
    ("key", "value"),
    [("weft.expert", "../../elsewhere"), ("weft.times", "x"), ("weft.config", "[1]"), ("weft.step_list", "{}")],
)
def test_facts_of_a_header_by_which_files_are_named_or_used_are_checked(key, value, tmp_path):
    with pytest.raises(ModelError, match=f"'{key}' in its header is damaged"):
        read_adapter(lora(tmp_path, {key: value}))


def test_fp8_weights_are_read_as_bf16_which_holds_them_exactly(tmp_path):
    path = lora(tmp_path, lora_A=DOWN.to(torch.float8_e4m3fn))
    a = next(tensor for key, tensor in read_adapter(path).tensors.items() if "lora_A" in key)
    assert a.dtype == torch.bfloat16
    assert torch.equal(a.float(), DOWN.to(torch.float8_e4m3fn).float())


def test_an_alpha_may_be_a_whole_number_of_any_shape(tmp_path):
    assert read_adapter(lora(tmp_path, alpha=torch.tensor([[6]]))).scale == 3


def test_a_file_says_by_its_names_whether_it_is_for_both_experts(tmp_path):
    assert experts_in(lora(tmp_path)) == ()
    both = {f"transformer{n}.blocks.0.attn1.to_q.lora_{h}.weight": t.clone() for n in ("", "_2")
            for h, t in (("A", DOWN), ("B", UP))}  # fmt: skip
    save_file(both, tmp_path / "b.safetensors")
    assert experts_in(tmp_path / "b.safetensors") == ("high", "low")
