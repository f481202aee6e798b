"""weft export and weft convert --to: what is written, where, what is said of it, and what is never left behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.networks import hunyuan, wan
from tests.small_adapters import lora_on
from weft.cli.main import main
from weft.few_steps import StepList
from weft.formats.adapter_file import STEP_LIST, SavedAdapter
from weft.formats.header import read_header
from weft.formats.kohya import MusubiFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.verifying import compare

FORMATS = ["peft", "diffusers", "comfyui", "musubi", "videox-fun", "original"]
PROVENANCE = {
    "weft.config": json.dumps({"data": {"sources": [{"path": "/home/me/secret"}]}}), "base_model": "/home/me/wan",
    "weft.base": "ab12", "weft.expert": "low", "weft.times": "[0.0, 0.875]", "weft.step": "6", "weft.family": "wan",
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter() -> SavedAdapter:
    network = wan(layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=24)
    return replace(lora_on(network), metadata={})


@pytest.fixture
def source(adapter: SavedAdapter, tmp_path: Path) -> Path:
    return PeftFolder().write(tmp_path / "mine", adapter)


@pytest.fixture
def told(adapter: SavedAdapter, tmp_path: Path) -> Path:
    """With all that a run writes into the header."""
    return PeftFolder().write(tmp_path / "told", replace(adapter, metadata=PROVENANCE))


def experts(adapter: SavedAdapter, folder: Path) -> Path:
    """A run of two experts, as its folder lies there."""
    folder.mkdir()
    (folder / "config.yaml").write_text("name: both\n")
    for stem in ("adapter", "global_step_2"):
        for name in ("high", "low"):
            own = replace(adapter, metadata={"weft.expert": name})
            PeftFolder().write(folder / f"{stem}_{name}", own)
    return folder


def for_both(adapter: SavedAdapter, folder: Path) -> Path:
    """As ai-toolkit writes them into one file: alphas are not told, and are the rank."""
    path = folder / "both.safetensors"
    tensors = {f"transformer_{n}.{key}": n * tensor for n in (1, 2) for key, tensor in adapter.tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def inside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_lies_beside_its_source_with_a_receipt_and_reads_back_alike(to, adapter, source, capsys):
    assert main(["export", str(source), "--to", to]) == 0
    name = "mine-peft" if to == "peft" else f"mine-{to}.safetensors"
    assert inside(source.parent) == {"mine", name}
    path = source.parent / name
    assert compare(adapter, read_adapter(path)).is_equal
    header = read_header(path / "adapter_model.safetensors" if to == "peft" else path)
    receipt = json.loads(header.metadata["weft.verified"])
    assert receipt["by"] == to and receipt["layers"] == len(adapter.paths) and receipt["largest"] <= 1e-6
    said = capsys.readouterr().out
    assert str(path) in said and f"{len(adapter.paths)} layers in {len(header.tensors)} keys" in said
    assert "lora of rank 3, scale 1.66667 (alpha 5 / rank)" in said and "fp32)" in said


@pytest.mark.parametrize(
    ("to", "line"),
    [("diffusers", "pipe.load_lora_weights('{}', load_into_transformer_2=True)"),
     ("comfyui", "node 'Load LoRA (Model)' (LoraLoaderModelOnly) on the model for low noise"),
     ("musubi", "wan_generate_video.py --lora_weight {} --lora_multiplier 1"),
     ("videox-fun", "lora_path = '{}', lora_weight = 1.0"),
     ("peft", "PeftModel.from_pretrained(pipe.transformer_2, '{}')")],
)  # fmt: skip
def test_the_last_line_says_how_the_expert_for_low_noise_is_loaded(to, line, told, capsys):
    assert main(["export", str(told), "--to", to]) == 0
    (path,) = told.parent.glob("told-*")
    assert line.format(path) in capsys.readouterr().out


def test_of_a_run_all_experts_are_written_or_one_of_a_step(adapter, tmp_path):
    run = experts(adapter, tmp_path / "both")
    assert main(["export", str(run), "--to", "comfyui"]) == 0
    assert {"both-comfyui_high.safetensors", "both-comfyui_low.safetensors"} <= inside(run)
    assert main(["export", str(run), "--to", "musubi", "--step", "2", "--expert", "high"]) == 0
    assert "both-2-musubi_high.safetensors" in inside(run) and "both-2-musubi_low.safetensors" not in inside(run)
    out = tmp_path / "there" / "style.safetensors"
    assert main(["export", str(run), "--to", "diffusers", "--out", str(out)]) == 0
    assert inside(out.parent) == {"style_high.safetensors", "style_low.safetensors"}
    assert read_header(out.with_name("style_low.safetensors")).metadata["weft.expert"] == "low"


def test_of_two_experts_both_are_written_or_none(adapter, tmp_path, capsys):
    run = experts(adapter, tmp_path / "both")
    network = hunyuan(num_layers=1, num_single_layers=1, attention_head_dim=16, rope_axes_dim=(4, 6, 6))
    odd = lora_on(network, r"(transformer_blocks.0.attn.to_out.0|proj_out)")
    PeftFolder().write(run / "adapter_low", replace(odd, metadata={"weft.expert": "low"}))
    before = inside(run)
    assert main(["export", str(run), "--to", "musubi"]) == 1  # musubi passes over the low one's layer
    said = capsys.readouterr().out
    assert "both-musubi_high.safetensors: not written, though right" in said and "lora_unet_final_layer_linear" in said
    dora = lora_on(wan(layers=1, num_attention_heads=1, attention_head_dim=16, ffn_dim=24), dora=True)
    PeftFolder().write(run / "adapter_low", replace(dora, metadata={"weft.expert": "low"}))  # musubi has none
    assert main(["export", str(run), "--to", "musubi", "--out", str(tmp_path / "new" / "a.safetensors")]) == 2
    assert inside(run) == before and not (tmp_path / "new").exists()


def test_a_file_for_both_experts_becomes_two(adapter, tmp_path, capsys):
    path = for_both(adapter, tmp_path)
    assert main(["export", str(path), "--to", "comfyui", "--out", str(tmp_path / "a.safetensors")]) == 0
    assert {"a_high.safetensors", "a_low.safetensors"} <= inside(tmp_path)
    assert read_adapter(tmp_path / "a_low.safetensors").metadata["weft.expert"] == "low"
    assert main(["verify", str(path), str(path)]) == 0
    assert "low noise: alike" in capsys.readouterr().out
    assert main(["verify", str(path), str(tmp_path / "a_low.safetensors")]) == 2
    assert "--expert:" in capsys.readouterr().err
    assert main(["verify", str(path), str(tmp_path / "a_low.safetensors"), "--expert", "low"]) == 0


def test_a_step_an_expert_and_a_format_that_are_not_there_are_refused(adapter, source, tmp_path, capsys):
    run = experts(adapter, tmp_path / "both")
    for arguments, words in [
        ([str(run), "--to", "comfyui", "--step", "3"], "no adapter of step 3. Saved are: global_step_2_high"),
        ([str(run / "adapter_high"), "--to", "comfyui", "--expert", "low"], "is for 'high' noise, not 'low'"),
        ([str(source), "--to", "comfyui", "--step", "3"], "--step:"),
        ([str(source), "--to", "confyui"], "Did you mean 'comfyui'?"),
        ([str(source), "--to", "peft", "--out", str(tmp_path / "a.safetensors")], "the format peft is a folder"),
        ([str(tmp_path / "nothing"), "--to", "musubi"], "there is no adapter at"),
    ]:
        assert main(["export", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_nothing_is_overwritten_unless_told(source, capsys):
    assert main(["export", str(source), "--to", "musubi"]) == 0
    assert main(["export", str(source), "--to", "musubi"]) == 2
    assert "is there already. Choose another name, or add --overwrite" in capsys.readouterr().err
    for to in ("musubi", "peft", "peft"):
        assert main(["export", str(source), "--to", to, "--overwrite"]) == 0


def test_a_folder_with_more_than_an_adapter_is_never_replaced(source, capsys):
    folder = source.parent / "models"
    folder.mkdir()
    assert main(["export", str(source), "--to", "peft", "--out", str(folder)]) == 0  # empty until now
    assert main(["export", str(source), "--to", "peft", "--out", str(folder), "--overwrite"]) == 0
    (folder / "wan.safetensors").touch()
    assert main(["export", str(source), "--to", "peft", "--out", str(folder), "--overwrite"]) == 2
    assert "models is a folder with wan.safetensors in it, and is not replaced" in capsys.readouterr().err
    assert (folder / "wan.safetensors").exists()
    (source.parent / "file").touch()
    assert main(["export", str(source), "--to", "peft", "--out", str(source.parent / "file"), "--overwrite"]) == 2
    assert "is no adapter of this format" in capsys.readouterr().err


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_is_measured_and_no_difference_beyond_it_is_let_through(to, dtype, adapter, source, capsys):
    assert main(["export", str(source), "--to", to, "--dtype", dtype]) == 0
    (path,) = source.parent.glob("mine-*")
    found = compare(adapter, read_adapter(path)).largest
    assert 1e-5 < found < {"bf16": 2**-8, "fp16": 2**-11}[dtype]  # of a product of two rounded factors
    assert "rounding" in capsys.readouterr().out
    weights = load_file(path / "adapter_model.safetensors" if to == "peft" else path)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for key, tensor in weights.items() if not key.endswith("alpha")} == {kind}


def test_a_stored_dtype_stays_unless_told(adapter, tmp_path):
    halves = {key: tensor.bfloat16() for key, tensor in adapter.tensors.items()}
    source = PeftFolder().write(tmp_path / "mine", replace(adapter, tensors=halves))
    for to in ("comfyui", "original"):
        assert main(["export", str(source), "--to", to]) == 0
        written = load_file(tmp_path / f"mine-{to}.safetensors")
        assert {t.dtype for key, t in written.items() if not key.endswith("alpha")} == {torch.bfloat16}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kept", ["full", "short", "none"])
def test_a_short_header_has_what_applying_needs_and_no_paths(to, kept, told, adapter):
    assert main(["export", str(told), "--to", to, "--metadata", kept]) == 0
    (path,) = told.parent.glob("told-*")
    weights = path / "adapter_model.safetensors" if to == "peft" else path
    header = read_header(weights).metadata
    assert ("weft.config" in header) == (kept == "full")
    assert (header.get("weft.expert"), header.get("weft.base")) == (("low", "ab12") if kept != "none" else (None, None))
    assert ("weft.verified" in header) == (kept != "none")
    assert kept != "none" or set(header) <= {"format", "lora_adapter_metadata"}
    if kept != "full":
        texts = [*header.values(), *(p.read_text() for p in path.glob("*.json"))] if path.is_dir() else header.values()
        assert not any("/home/me" in text or "secret" in text for text in texts)
    assert compare(adapter, read_adapter(path)).is_equal


def test_a_few_step_students_times_are_kept_and_told(adapter, tmp_path, capsys):
    steps = StepList.of(4, shift=5.0)
    source = PeftFolder().write(tmp_path / "fast", replace(adapter, metadata={STEP_LIST: steps.to_json()}))
    assert main(["export", str(source), "--to", "comfyui", "--metadata", "short"]) == 0
    assert f"{steps}, guidance 1" in capsys.readouterr().out
    assert read_adapter(tmp_path / "fast-comfyui.safetensors").step_list == steps


def test_a_dora_is_refused_where_it_would_be_read_otherwise(adapter, tmp_path, capsys):
    lengths = {f"{path}.lora_magnitude_vector": torch.ones(len(adapter.tensors[f"{path}.lora_B.weight"]))
               for path in adapter.paths}  # fmt: skip
    dora = replace(adapter, tensors={**adapter.tensors, **lengths}, dora=True)
    source = PeftFolder().write(tmp_path / "mine", dora)
    for to in ("comfyui", "musubi", "videox-fun", "original"):
        assert main(["export", str(source), "--to", to]) == 2
        assert "weft merge ADAPTER --into BASE" in capsys.readouterr().err
    for to in ("peft", "diffusers"):
        assert main(["export", str(source), "--to", to]) == 0
    assert inside(tmp_path) == {"mine", "mine-peft", "mine-diffusers.safetensors"}


def test_a_file_that_a_program_would_read_otherwise_is_never_left_behind(adapter, source, monkeypatch, capsys):
    whole = MusubiFile.write

    def forgetful(self, target: Path, adapter: SavedAdapter) -> Path:
        """A writer with trap 11: alphas are lost."""
        path = whole(self, target, adapter)
        save_file({key: tensor for key, tensor in load_file(path).items() if not key.endswith(".alpha")}, path)
        return path

    monkeypatch.setattr(MusubiFile, "write", forgetful)
    assert main(["export", str(source), "--to", "musubi"]) == 1
    assert inside(source.parent) == {"mine"}
    said = capsys.readouterr().out
    assert "not written" in said and "4.00e-01  blocks.0.attn1.to_q" in said  # scale 1 in place of 5 / 3


def test_what_musubi_would_pass_over_fails_by_name(tmp_path, capsys):
    network = hunyuan(num_layers=1, num_single_layers=1, attention_head_dim=16, rope_axes_dim=(4, 6, 6))
    source = PeftFolder().write(tmp_path / "mine", lora_on(network, r"(transformer_blocks.0.attn.to_out.0|proj_out)"))
    assert main(["export", str(source), "--to", "musubi"]) == 1
    assert "lora_unet_final_layer_linear" in capsys.readouterr().out and inside(tmp_path) == {"mine"}


def test_a_disk_that_is_full_and_a_place_that_is_a_file_leave_nothing(source, monkeypatch, capsys):
    (source.parent / "file").touch()
    assert main(["export", str(source), "--to", "musubi", "--out", str(source.parent / "file" / "a.safetensors")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (source.parent / "file").unlink()

    def full(self, target: Path, adapter: SavedAdapter) -> Path:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MusubiFile, "write", full)
    assert main(["export", str(source), "--to", "musubi"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert inside(source.parent) == {"mine"}


def test_convert_goes_from_every_format_to_every_other(adapter, source, tmp_path):
    assert main(["export", str(source), "--to", "original"]) == 0
    path = tmp_path / "mine-original.safetensors"
    for number, to in enumerate([*FORMATS, "original", "musubi", "peft"]):
        out = tmp_path / (f"{number}" if to == "peft" else f"{number}.safetensors")
        assert main(["convert", str(path), "--to", to, "--out", str(out)]) == 0
        path = out
    assert compare(adapter, read_adapter(path)).is_equal


def test_convert_says_which_options_are_for_what(source, tmp_path, capsys):
    for arguments, words in [
        (["--to", "musubi", "--under", "model."], "--under: this is for checkpoints alone"),
        (["--out", str(tmp_path / "a.safetensors"), "--expert", "high"], "--expert: this is for adapters alone"),
        ([], "or, for an adapter, its format by --to"),
    ]:
        assert main(["convert", str(source), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_an_expert_may_be_said_of_a_file_that_does_not_say_it(source, capsys):
    assert main(["export", str(source), "--to", "diffusers", "--expert", "low"]) == 0
    assert "load_into_transformer_2=True" in capsys.readouterr().out
    assert read_header(source.parent / "mine-diffusers_low.safetensors").metadata["weft.expert"] == "low"
