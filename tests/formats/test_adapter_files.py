"""Adapter files without a network: headers, descriptions, refusals, and writing that is whole or absent."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from weft.durable import whole_file
from weft.errors import ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.canonical import tensors_at_scale
from weft.formats.describe import describe
from weft.formats.diffusers import DiffusersFile
from weft.formats.header import read_header
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter

PATHS = ("blocks.0.attn1.to_q", "blocks.0.ffn.net.0.proj")


@pytest.fixture
def adapter() -> SavedAdapter:
    tensors = {}
    for path in PATHS:
        tensors[f"{path}.lora_A.weight"] = torch.ones(4, 6)
        tensors[f"{path}.lora_B.weight"] = torch.ones(8, 4)
    return SavedAdapter(tensors, rank=4, alpha=2.0, rslora=True, targets=PATHS, metadata={"weft.step": "500"})


def lora_file(path, keys, metadata=None):
    save_file({key: torch.zeros(2, 2) for key in keys}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("style", [PeftFolder(), DiffusersFile()], ids=["peft", "diffusers"])
def test_a_description_gives_the_facts_from_the_header_alone(style, adapter, tmp_path):
    path = style.write(tmp_path / "adapter", adapter)
    told = describe(path)
    assert (told.rank, told.alpha, told.rslora, told.dora, told.scale) == (4, 2.0, True, False, 1.0)
    assert set(told.targets) == set(PATHS) and len(told.keys) == 4
    assert told.dtypes == {"F32": 4} and told.parameters == 2 * (4 * 6 + 8 * 4)
    assert told.metadata["weft.step"] == "500" and told.family == "wan" and told.tells_alpha
    assert told.size == told.weights.stat().st_size


def test_peft_finds_only_its_own_fields_in_our_config(adapter, tmp_path):
    from peft import LoraConfig

    folder = PeftFolder().write(tmp_path, adapter)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert set(fields) <= set(LoraConfig().to_dict())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (4, 2, True)


def test_a_later_write_replaces_the_former_and_leaves_no_drafts(adapter, tmp_path):
    PeftFolder().write(tmp_path, adapter)
    doubled = {key: 2 * value for key, value in adapter.tensors.items()}
    PeftFolder().write(tmp_path, SavedAdapter(doubled, 4, 2.0))
    assert read_adapter(tmp_path).tensors[f"{PATHS[0]}.lora_A.weight"][0, 0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("former")
    with pytest.raises(RuntimeError, match="disk"), whole_file(path) as draft:
        draft.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]


def test_a_saved_file_can_be_read_by_those_who_can_read_its_folder(adapter, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    written = DiffusersFile().write(tmp_path, adapter)
    assert written.stat().st_mode == plain.stat().st_mode


def test_a_file_without_alpha_has_scale_1(tmp_path):
    file = lora_file(tmp_path / "a.safetensors", ["transformer.x.lora_A.weight", "transformer.x.lora_B.weight"])
    assert read_adapter(file).scale == describe(file).scale == 1


def test_a_run_with_another_alpha_continues_from_the_same_change(adapter):
    b = f"{PATHS[0]}.lora_B.weight"
    assert adapter.scale == 1  # alpha 2 over the root of rank 4
    continued = tensors_at_scale(adapter, 0.25)
    assert torch.equal(0.25 * continued[b], adapter.scale * adapter.tensors[b])


REFUSED = {
    "lokr": (["transformer.blocks.0.attn1.to_q.lokr_w1"], "incomplete: 'blocks.0.attn1.to_q' has no 'lokr_w2_a'"),
    "oft": (["transformer.blocks.0.attn1.to_q.oft_R.weight"], "an adapter that is no LoRA"),
    "peft": (["base_model.model.x.lora_A.weight", "x"], "a PEFT adapter mixed with other tensors"),
    "model": (["blocks.0.attn1.to_q.weight", "proj_out.weight"], "2 tensors, first 'blocks.0.attn1.to_q.weight'"),
    "half": (["transformer.x.lora_A.weight"], "incomplete: 1 tensors are missing, first 'x.lora_B.weight'"),
    "stranger": (["transformer.x.lora_A.weight", "transformer.y.diff"], "1 tensors that are no LoRA weights.*changes"),
}


@pytest.mark.parametrize(("keys", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_adapter_of_ours_is_named(keys, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        read_adapter(lora_file(tmp_path / "a.safetensors", keys))


def test_folders_that_hold_no_adapter_are_named(tmp_path):
    with pytest.raises(ModelError, match="no such file or folder"):
        read_adapter(tmp_path / "absent")
    with pytest.raises(ModelError, match="found nothing"):
        read_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="a whole model, not an adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"without weights: adapter_model\.safetensors is missing"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "BOFT"}, "holds a BOFT adapter; Weft reads LORA, LOHA, LOKR, OFT"),
        ({"peft_type": "LOKR"}, "holds 4 tensors that are no lokr weights"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_other_methods_under_the_same_file_names_are_refused(fields, words, adapter, tmp_path):
    folder = PeftFolder().write(tmp_path, adapter)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ModelError, match=words):
        read_adapter(folder)


def test_weights_without_their_config_are_refused_because_alpha_is_unknown(adapter, tmp_path):
    folder = PeftFolder().write(tmp_path, adapter)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="alpha of the weights is unknown"):
        read_adapter(folder / "adapter_model.safetensors")


def test_a_pickle_that_would_run_code_is_refused(adapter, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    folder = PeftFolder().write(tmp_path, adapter)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="cannot be read as plain weights"):
        read_adapter(folder)
    with pytest.raises(ModelError, match="is a pickle"):
        describe(folder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 zip", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1 << 40)])
def test_a_file_that_is_not_safetensors_is_called_so(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_header(path)


def test_a_file_cut_short_is_told_by_its_missing_bytes(adapter, tmp_path):
    path = DiffusersFile().write(tmp_path, adapter)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=f"cut short: 100 of {len(whole)} bytes are missing"):
        read_adapter(path)
