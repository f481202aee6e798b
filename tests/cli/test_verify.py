"""weft verify: 0 for two adapters that change a model alike, 1 for others, 2 for what cannot be read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.families.networks import wan
from tests.small_adapters import lora_on
from weft.cli.main import main
from weft.formats.adapter_file import SavedAdapter
from weft.formats.comfyui import ComfyUiFile
from weft.formats.peft import PeftFolder


@pytest.fixture(scope="module")
def adapter() -> SavedAdapter:
    return lora_on(wan(layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=24))


@pytest.fixture
def one(adapter: SavedAdapter, tmp_path: Path) -> str:
    return str(PeftFolder().write(tmp_path / "one", adapter))


def other(adapter: SavedAdapter, tmp_path: Path) -> str:
    return str(ComfyUiFile().write(tmp_path / "other.safetensors", adapter))


def test_two_formats_of_one_adapter_are_alike(adapter, one, tmp_path, capsys):
    assert main(["verify", one, other(adapter, tmp_path)]) == 0
    assert capsys.readouterr().out == "alike: 10 layers, 0.0e+00 apart at most (tolerance 1e-06)\n"


def test_layers_that_differ_are_told_worst_first_and_as_json(adapter, one, tmp_path, capsys):
    tensors = {key: 1.5 * t if key == "blocks.0.attn1.to_q.lora_B.weight" else t for key, t in adapter.tensors.items()}
    tensors["blocks.0.ffn.net.2.lora_A.weight"] = 1.01 * tensors["blocks.0.ffn.net.2.lora_A.weight"]
    changed = other(replace(adapter, tensors=tensors), tmp_path)
    assert main(["verify", one, changed]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "different: 2 of 10 layers by more than 1e-06, 5.00e-01 at most"
    assert lines[1].split() == ["5.00e-01", "blocks.0.attn1.to_q"]
    assert lines[2].split() == ["1.00e-02", "blocks.0.ffn.net.2"]
    assert main(["verify", one, changed, "--tolerance", "0.6"]) == 0
    capsys.readouterr()
    assert main(["verify", one, changed, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["largest"] == pytest.approx(0.5) and not told["equal"] and len(told["layers"]) == 10


def test_layers_in_one_alone_and_layers_of_other_sizes_are_told(adapter, one, tmp_path, capsys):
    paths = adapter.paths[1:]
    fewer = {key: t for key, t in adapter.tensors.items() if key.startswith(paths)}
    assert main(["verify", one, other(replace(adapter, tensors=fewer, targets=()), tmp_path)]) == 1
    assert f"in one of the two alone: 1 layers, first {adapter.paths[0]}" in capsys.readouterr().out
    wide = lora_on(wan(layers=1, num_attention_heads=1, attention_head_dim=32, ffn_dim=24))
    assert main(["verify", one, other(wide, tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["largest"] == "other"


def test_a_runs_folder_stands_for_its_finished_adapter(adapter, one, tmp_path):
    PeftFolder().write(tmp_path / "run" / "adapter", adapter)
    assert main(["verify", one, str(tmp_path / "run")]) == 0


def test_what_is_no_adapter_is_refused(one, tmp_path, capsys):
    assert main(["verify", one, str(tmp_path / "nowhere")]) == 2
    assert "there is no adapter at" in capsys.readouterr().err
    assert main(["verify", one, one, "--tolerance", "-1"]) == 2
