"""`weft import` writes a run.yaml and says what became of each setting; a run that it wrote can be planned."""

from pathlib import Path

import pytest

from tests.importers.conftest import CONFIGS
from tests.small import make_clips
from weft.cli.main import main
from weft.run.config import load_config

MUSUBI, VIDEOX = CONFIGS / "musubi", CONFIGS / "videox-fun"


def run(*words: str | Path) -> int:
    return main(["import", *map(str, words)])


def test_without_out_the_yaml_goes_to_stdout_and_the_list_to_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run(VIDEOX / "t2v_low.sh") == 0
    out, err = capsys.readouterr()
    (tmp_path / "run.yaml").write_text(out)
    assert load_config(tmp_path / "run.yaml").adapter.rank == 64
    assert "Their key -> ours:" in err and "  - rank 64 -> adapter.rank" in err
    assert "#   - rank 64 -> adapter.rank" in out


def test_with_out_the_next_command_is_told_and_nothing_is_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "my run.yaml"
    assert run(MUSUBI / "hunyuan.sh", "--out", out) == 0
    said = capsys.readouterr()
    assert not said.out and f"fill in 1 value marked with <--, then: weft plan '{out}'" in said.err
    before = out.read_text()
    assert run(VIDEOX / "t2v_low.sh", "--out", out) == 2 and out.read_text() == before
    assert run(VIDEOX / "t2v_low.sh", "--out", out, "--overwrite") == 0 and out.read_text() != before


def test_a_model_can_be_named_in_place_of_theirs(tmp_path: Path):
    assert run(MUSUBI / "hunyuan.sh", "--out", tmp_path / "run.yaml", "--model", "models/HunyuanVideo") == 0
    assert load_config(tmp_path / "run.yaml").family.source == "models/HunyuanVideo"


def test_mistakes_are_one_error_of_one_line_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(MUSUBI / "a_date.sh", "--out", tmp_path / "run.yaml") == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {MUSUBI / 'a_date.sh'}:2: 'output_name'") and said.err.count("\n") == 1
    assert not said.out and not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize(("out", "said"), [(".", "is a folder. Name a file"), ("no.txt/run.yaml", "cannot be written")])
def test_a_place_that_takes_no_file_is_told(out: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "no.txt").write_text("")
    assert run(MUSUBI / "hunyuan.sh", "--out", tmp_path / out, "--overwrite") == 2
    assert f"error: --out: {tmp_path / out} {said}" in capsys.readouterr().err


def test_values_to_fill_in_are_counted_as_they_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.toml").write_text(
        "output_dir = 'a'\ndataset = 'not_here.toml'\nepochs = 1\n[model]\ntype = 'wan'\nckpt_path = 'm'\n"
        "dtype = 'bfloat16'\n[optimizer]\ntype = 'adamw'\nlr = 1e-4\n"
    )
    assert run(tmp_path / "a.toml", "--out", tmp_path / "run.yaml") == 0
    marks = (tmp_path / "run.yaml").read_text().count("<-- FILL IN")
    assert marks == 3 and "fill in 3 values marked with <--" in capsys.readouterr().err


def test_whose_the_file_is_can_be_said(capsys: pytest.CaptureFixture[str]):
    assert run(MUSUBI / "hunyuan.sh", "--from", "videox-fun") == 2
    assert "no command there starts a training script of VideoX-Fun" in capsys.readouterr().err
    assert run(MUSUBI / "hunyuan.sh", "--from", "musuby") == 2
    assert "Did you mean 'musubi'?" in capsys.readouterr().err


def test_weft_train_says_whose_file_it_was_handed(capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(MUSUBI / "wan21_i2v.toml")]) == 2
    assert capsys.readouterr().err.endswith(
        f"is a file of musubi-tuner. Turn it into ours with: weft import {MUSUBI / 'wan21_i2v.toml'} --out run.yaml\n"
    )


def test_a_run_that_was_imported_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On the model that Weft ships, with clips that are there."""
    make_clips(tmp_path / "clips", count=4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.sh").write_text(
        "accelerate launch scripts/wan2.1/train_lora.py --config_path=config/wan2.1/wan_civitai.yaml \\\n"
        "  --pretrained_model_name_or_path=tiny-wan --train_data_dir=clips --video_sample_size=64 \\\n"
        "  --image_sample_size=64 --token_sample_size=64 --video_sample_stride=1 --video_sample_n_frames=9 \\\n"
        "  --train_batch_size=1 --max_train_steps=4 --enable_bucket --uniform_sampling --use_peft_lora --rank=4 \\\n"
        "  --network_alpha=4 --target_name=q,k,v,ffn.0,ffn.2 --learning_rate=1e-4 --output_dir=imported\n"
    )
    assert run("train.sh", "--out", "run.yaml") == 0
    assert main(["plan", "run.yaml", "data.fps=8"]) == 0
    # 2 x (q, k, v) + 2 of ffn in each block, found by VideoX-Fun's own names
    said = capsys.readouterr().out
    assert "Trainable params" in said and "ffn.net.0.proj" in said
