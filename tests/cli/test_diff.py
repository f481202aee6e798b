"""`weft diff` says how two adapters, runs or configs were made differently, and how far their changes lie apart."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml

from tests.small import config_of, plain_config
from weft.cli.main import main
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.run.origins import apart

Capture = pytest.CaptureFixture[str]
Q, K = "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"


def lora(scale: float = 1.0, metadata: Mapping[str, str] = {}, paths: tuple[str, ...] = (Q, K)) -> SavedAdapter:
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for path in paths:
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, 6, generator=rng)
        tensors[f"{path}.lora_B.weight"] = scale * torch.randn(8, 2, generator=rng)
    return SavedAdapter(tensors, rank=2, alpha=4.0, metadata=metadata)


def header(tmp_path: Path, **change: object) -> dict[str, str]:
    config = config_of(plain_config(tmp_path, "tiny-wan", tmp_path / "clips"), **change).resolved()
    return {
        "weft.config": json.dumps(config), "weft.data": "aa", "weft.base": "bb", "weft.seed": "5", "weft.step": "6",
        "weft.versions": json.dumps({"torch": "2.9.0", "weft": "0.1.0"}), "weft.git": "c0ffee", "weft.saved": "1",
    }  # fmt: skip


def test_keys_data_and_versions_that_differ_are_told_with_both_values(tmp_path: Path, capsys: Capture):
    other = header(tmp_path, adapter={"rank": 2}, optimizer={"lr": 0.01})
    other |= {"weft.data": "dd", "weft.versions": json.dumps({"torch": "2.10.0", "weft": "0.1.0"}), "weft.saved": "9"}
    one = PeftFolder().write(tmp_path / "a", lora(metadata=header(tmp_path)))
    two = PeftFolder().write(tmp_path / "b", lora(2.0, metadata=other))
    assert main(["diff", str(one), str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "config:",
        "  adapter.rank: 4 -> 2",
        "  optimizer.lr: 0.001 -> 0.01",
        "made of:",
        "  data: aa -> dd",
        "  versions.torch: 2.9.0 -> 2.10.0",
        "changes: 1 apart, relative to the first, cosine 1.000000, on 2 layers",
    ]
    assert main(["diff", str(one), str(two), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["equal"] is False and plain["config"]["adapter.rank"] == [4, 2]
    assert plain["facts"] == {"data": ["aa", "dd"], "versions.torch": ["2.9.0", "2.10.0"]}
    assert plain["change"]["relative"] == pytest.approx(1)


def test_equal_ones_are_said_to_be_equal_also_when_they_were_saved_at_other_times(tmp_path: Path, capsys: Capture):
    for name, saved in (("a", "1"), ("b", "2")):
        PeftFolder().write(tmp_path / name, lora(metadata={**header(tmp_path), "weft.saved": saved}))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines() == ["changes: equal on 2 layers", "no difference"]


def test_an_adapter_can_be_set_beside_a_config_and_a_run(tmp_path: Path, capsys: Capture):
    adapter = PeftFolder().write(tmp_path / "run" / "adapter", lora(metadata=header(tmp_path)))
    plain = plain_config(tmp_path, "tiny-wan", tmp_path / "clips")
    written = tmp_path / "run.yaml"
    written.write_text(yaml.safe_dump({**plain, "seed": 6}))
    assert main(["diff", str(adapter), str(written)]) == 0
    assert capsys.readouterr().out == "config:\n  seed: 5 -> 6\n"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config_of(plain).resolved()))
    assert main(["diff", str(adapter), str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines() == ["changes: equal on 2 layers", "no difference"]


def test_foreign_headers_are_compared_by_their_own_keys(tmp_path: Path, capsys: Capture):
    for name, rate in (("a", "0.0001"), ("b", "0.0002")):
        said = {"ss_learning_rate": rate, "ss_training_finished_at": rate}
        PeftFolder().write(tmp_path / name, lora(metadata=said))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "its header has no config of Weft's" in out and "ss_training_finished_at" not in out
    assert "ss_learning_rate: " in out and "changes: equal on 2 layers" in out


def test_the_distance_is_that_of_the_whole_changes():
    one, other = lora(), lora(0.5, paths=(Q, "blocks.1.attn1.to_q"))
    found = apart(one, other)

    def whole(adapter: SavedAdapter, path: str) -> torch.Tensor:
        if f"{path}.lora_A.weight" not in adapter.tensors:
            return torch.zeros(8, 6)
        return adapter.scale * adapter.tensors[f"{path}.lora_B.weight"] @ adapter.tensors[f"{path}.lora_A.weight"]

    paths = (Q, K, "blocks.1.attn1.to_q")
    a, b = (torch.stack([whole(adapter, path) for path in paths]).flatten() for adapter in (one, other))
    assert found.relative == pytest.approx(float((a - b).norm() / a.norm()))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert (found.layers, found.alone) == (1, 2)


def test_layers_of_other_sizes_are_no_failure_of_the_report(tmp_path: Path, capsys: Capture):
    PeftFolder().write(tmp_path / "a", lora(paths=(Q,)))
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 5), f"{Q}.lora_B.weight": torch.ones(8, 2)}
    PeftFolder().write(tmp_path / "b", SavedAdapter(tensors, rank=2, alpha=4.0))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"changes: not compared: layer {Q}" in capsys.readouterr().out


def test_what_is_no_adapter_is_refused(tmp_path: Path, capsys: Capture):
    adapter = PeftFolder().write(tmp_path / "a", lora())
    assert main(["diff", str(adapter), str(tmp_path / "absent")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_facts_that_one_header_alone_tells_stand_in_one_line(tmp_path: Path, capsys: Capture):
    one = PeftFolder().write(tmp_path / "a", lora(metadata={"weft.seed": "5", "weft.data": "aa", "weft.base": "b"}))
    two = PeftFolder().write(tmp_path / "b", lora(metadata={"weft.seed": "6", "weft.git": "c"}))
    assert main(["diff", str(one), str(two)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "made of:",
        "  seed: 5 -> 6",
        f"  told by {one} alone: base, data",
        f"  told by {two} alone: git",
        "changes: equal on 2 layers",
    ]
