"""`weft reproduce` writes the config that made an adapter, and a run of it makes the same adapter again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import config_of, make_clips, make_wan, merged, plain_config
from weft.cli.main import main
from weft.config.source import read_text
from weft.formats.adapter_file import SavedAdapter
from weft.formats.header import read_header
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.config import RunConfig, load_config, parse_config
from weft.run.folder import git_commit
from weft.run.start import train_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, clips, and a finished run of two steps on them."""
    root = tmp_path_factory.mktemp("reproduce")
    torch.set_num_threads(1)
    make_wan(root / "model", layers=1)
    make_clips(root / "clips", count=3)
    train_run(config_of(plain_of(root)), lambda event: None)
    return root


def plain_of(root: Path) -> dict[str, Any]:
    change = {"schedule": {"steps": 2}, "validation": {"every": 2}, "save": {"every": 0},
              "adapter": {"alpha": 2, "targets": ["attn1.to_q", "ffn"]}}  # fmt: skip
    return merged(plain_config(root, root / "model", root / "clips"), change)


def test_a_run_of_the_reproduced_config_makes_the_same_adapter_to_the_bit(world: Path, tmp_path: Path):
    out = tmp_path / "run.yaml"
    assert main(["reproduce", str(world / "runs" / "run" / "adapter"), "--out", str(out)]) == 0
    again = load_config(out, ["name=again"])
    train_run(again, lambda event: None)
    one, other = (read_adapter(world / "runs" / name / "adapter").tensors for name in ("run", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_the_resolved_config_without_what_is_so_by_default(world: Path, capsys: Capture):
    trained = config_of(plain_of(world)).resolved()
    for options in ([], ["--full"]):
        assert main(["reproduce", str(world / "runs" / "run"), *options]) == 0
        said = capsys.readouterr()
        assert parse_config(read_text(said.out)).resolved() == trained
        assert ("weight_decay" in said.out) == bool(options)
        assert "is there: training would go on with that run" in said.err and "seed: 5" in said.out


def test_the_header_says_what_made_the_adapter_and_is_small(world: Path):
    file = world / "runs" / "run" / "adapter" / "adapter_model.safetensors"
    told = read_header(file).metadata
    expected = {"weft.step": "2", "weft.steps": "2", "weft.seed": "5", "weft.processes": "1", "weft.precision": "fp32",
                "weft.family": "wan", "weft.data.items": "2", "weft.items_per_step": "2"}  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert told["weft.hardware"] and float(told["weft.loss"]) > 0 and told["weft.git"] == (git_commit() or "")
    assert int(told["weft.started"]) <= int(told["weft.saved"])
    assert json.loads(told["weft.versions"])["torch"] == torch.__version__
    assert sum(map(len, told.values())) < 64_000


def test_data_and_base_that_are_not_what_they_were_are_told(world: Path, tmp_path: Path, capsys: Capture):
    found = read_adapter(world / "runs" / "run" / "adapter")
    told = json.loads(found.metadata["weft.config"])
    clips = make_clips(tmp_path / "clips", count=3)
    for number in range(3):
        (clips / f"{number}.txt").write_text("another caption")
    told["data"]["sources"][0]["path"] = str(clips)
    told["family"]["source"] = str(tmp_path / "absent")
    moved = write(tmp_path / "moved", {**found.metadata, "weft.config": json.dumps(told)})
    assert main(["reproduce", str(moved)]) == 0
    notes = capsys.readouterr().err
    assert "the base cannot be compared: family.source: there is no folder" in notes
    assert "the data cannot be compared" in notes  # how clips are cut depends on the model
    told["family"]["source"] = str(make_wan(tmp_path / "wan", layers=2))
    write(moved, {**found.metadata, "weft.config": json.dumps(told)})
    assert main(["reproduce", str(moved)]) == 0
    notes = capsys.readouterr().err
    assert "is another model now" in notes and "clips, captions or their buckets are others now" in notes
    assert main(["reproduce", str(moved), "--no-check"]) == 0
    assert capsys.readouterr().err == ""


def write(folder: Path, metadata: Mapping[str, str], rank: int = 2) -> Path:
    tensors = {}
    for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"):
        tensors[f"blocks.0.{layer}.lora_A.weight"] = torch.ones(rank, 4)
        tensors[f"blocks.0.{layer}.lora_B.weight"] = torch.ones(4, rank)
    return PeftFolder().write(folder, SavedAdapter(tensors, rank=rank, alpha=1.0, metadata=metadata))


FOREIGN = {
    "ss_base_model_version": "wan", "ss_output_name": "my dog", "ss_network_dim": "2", "ss_network_alpha": "1.0",
    "ss_network_module": "networks.lora_wan", "ss_network_args": json.dumps({"loraplus_lr_ratio": "4", "verbose": "1"}),
    "ss_network_dropout": "None", "ss_learning_rate": "0.0002", "ss_seed": "42", "ss_steps": "1600",
    "ss_max_train_steps": "2000", "ss_lr_scheduler": "constant_with_warmup", "ss_lr_warmup_steps": "100",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)", "ss_mixed_precision": "bf16",
    "ss_timestep_sampling": "shift", "ss_sigmoid_scale": "1.0", "ss_discrete_flow_shift": "3.0",
    "ss_weighting_scheme": "none", "ss_gradient_checkpointing": "True", "ss_max_grad_norm": "1.0",
    "ss_sd_model_name": "wan2.1_t2v_14B_bf16.safetensors", "modelspec.timestep_range": "875,1000",
    "ss_datasets": json.dumps([{"video_directory": "dog", "resolution": [960, 544], "target_frames": [1, 25, 47],
                                "num_repeats": 2, "batch_size_per_device": 1, "enable_bucket": True}]),
}  # fmt: skip


def test_from_another_trainers_header_comes_a_config_to_begin_from(tmp_path: Path, capsys: Capture):
    assert main(["reproduce", str(write(tmp_path / "theirs", FOREIGN))]) == 0
    text = capsys.readouterr().out
    config: RunConfig = parse_config(read_text(text))
    plain = config.resolved()
    assert (config.name, config.seed, config.family.kind) == ("my-dog", 42, "wan")
    adapter = {name: plain["adapter"][name] for name in ("rank", "alpha", "lora_plus", "targets")}
    assert adapter == {"rank": 2, "alpha": 1.0, "lora_plus": 4.0, "targets": "self-attention"}
    assert plain["optimizer"]["kind"] == "adamw8bit" and plain["optimizer"]["lr"] == 2e-4
    assert plain["schedule"]["steps"] == 1600 and plain["schedule"]["warmup"] == 100
    assert plain["objective"]["timesteps"] == {"kind": "shift", "shift": 3.0, "scale": 1.0}
    assert plain["objective"]["times"] == [0.875, 1.0] and plain["engine"]["precision"] == "bf16"
    source = plain["data"]["sources"][0]
    assert source["path"] == "dog" and source["repeats"] == 2 and source["buckets"]["frames"] == [1, 25, 45]
    assert "its file was wan2.1_t2v_14B_bf16.safetensors" in text and '"verbose": "1"' in text


ODD = {
    "ss_steps": "lots", "ss_learning_rate": "fast", "ss_datasets": "[1", "ss_network_args": "x", "ss_seed": "",
    "ss_timestep_sampling": "flux_shift", "ss_optimizer": "prodigy", "ss_lr_scheduler": "rex", "ss_output_name": "...",
}  # fmt: skip


def test_what_is_not_understood_in_a_foreign_header_is_noted_and_left_out(tmp_path: Path, capsys: Capture):
    assert main(["reproduce", str(write(tmp_path / "theirs", ODD))]) == 0
    text = capsys.readouterr().out
    assert parse_config(read_text(text)).name == "again"
    for word in ("'fast' is not understood", "'rex' is not understood", "'flux_shift'", "prodigy", "data.buckets: not"):
        assert word in text


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "says nothing of how it was trained"),
        ({"weft.config": "{}", "weft.merged": '{"parents": [{"adapter": "a"}, {"adapter": "b"}]}'}, "from a, b, not"),
        ({"weft.config": "{"}, "says nothing of how it was trained"),
    ],
)
def test_an_adapter_that_no_run_made_is_refused(metadata: dict[str, str], words: str, tmp_path: Path, capsys: Capture):
    assert main(["reproduce", str(write(tmp_path / "a", metadata))]) == 2
    assert words in capsys.readouterr().err


def test_a_config_that_this_weft_does_not_read_is_written_as_it_is_with_the_reason(tmp_path: Path, capsys: Capture):
    path = write(tmp_path / "old", {"weft.config": json.dumps({"name": "old", "engine": {"kind": "single"}})})
    assert main(["reproduce", str(path)]) == 0
    said = capsys.readouterr()
    assert "# This Weft does not read the config" in said.out and "kind: single" in said.out
    assert "note: family: this key is missing" in said.err


def test_a_file_that_is_there_is_not_overwritten(world: Path, tmp_path: Path, capsys: Capture):
    out = tmp_path / "run.yaml"
    out.write_text("mine")
    verb = ["reproduce", str(world / "runs" / "run"), "--no-check", "--out", str(out)]
    assert main(verb) == 2 and "is there already" in capsys.readouterr().err and out.read_text() == "mine"
    assert main([*verb, "--overwrite"]) == 0 and "kind: wan" in out.read_text()


def test_a_config_and_a_place_that_is_a_folder_are_refused(world: Path, tmp_path: Path, capsys: Capture):
    run = world / "runs" / "run"
    assert main(["reproduce", str(run / "config.yaml")]) == 2
    assert "config.yaml is a config" in capsys.readouterr().err
    assert main(["reproduce", str(run), "--no-check", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "is a folder. Name a file" in capsys.readouterr().err
