"""weft merge on the command line: what is said, which options go together, and what it leaves when it is stopped."""

import json
from pathlib import Path

import pytest

from tests.families import networks
from tests.run.test_merging import wan_comfyui, wan_diffusers
from tests.run.test_stack import lora
from weft.cli.main import main
from weft.errors import ConfigError
from weft.formats.peft import PeftFolder
from weft.run.block_strengths import BlockStrengths


@pytest.fixture
def base(tmp_path) -> Path:
    return wan_comfyui(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path) -> Path:
    made = lora(networks.wan(), ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"), 3, 2.0, seed=1)
    return PeftFolder().write(tmp_path / "adapter", made)


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and what was printed."""
    code = main(["merge", *words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_merge_says_what_went_in_how_much_was_written_and_where(adapter, base, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    code, text = said([str(adapter), "--into", str(base), "--weights", "0.5", "--out", str(out)], capsys)
    lines = text.splitlines()
    assert code == 0 and lines[0] == f"   0.5  {adapter} (rank 3, scale 0.666667)"
    assert lines[1] == "2 layers changed" and "tensors read back and compared" in lines[2] and lines[-1] == str(out)
    code, text = said([str(adapter), "--into", str(base), "--out", str(out)], capsys)
    assert code == 2 and "is there already. Name another, or add --overwrite." in text and "Traceback" not in text
    assert said([str(adapter), "--into", str(base), "--out", str(out), "--overwrite"], capsys)[0] == 0


def test_weft_show_reads_a_merged_base_and_its_header_says_the_strengths(adapter, base, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    words = [str(adapter), "--into", str(base), "--blocks", "0=0.5", "--dtype", "fp32", "--out", str(out)]
    assert said(words, capsys)[0] == 0
    with out.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    told = json.loads(header["__metadata__"]["weft.merged"])
    assert (told["blocks"], told["dtype"], told["adapters"][0]["weight"]) == ("0=0.5", "fp32", 1.0)
    assert main(["show", str(out)]) == 0 and "Wan transformer" in capsys.readouterr().out


def test_links_and_what_was_left_out_are_said(adapter, tmp_path, capsys):
    base = wan_diffusers(tmp_path / "folder")
    (base / "large.bin").write_bytes(bytes(1 << 20))
    (base / "transformer" / "old.bin").write_bytes(b"old")
    _, text = said([str(adapter), "--into", str(base), "--out", str(tmp_path / "out")], capsys)
    assert "1 other file is a hard link to the base's" in text
    assert "left out: transformer/old.bin, which holds weights without the change" in text


OTHERS = {
    "no adapter": (["--into", "BASE"], "--into: which adapter? Name one before it"),
    "no way": (["A"], "one of the arguments --into --average --stack --ema is required"),
    "two ways": (["A", "--into", "BASE", "--stack", "A", "A"], "not allowed with argument --into"),
    "beside": (["A", "--average", "A", "A"], "belongs behind --average"),
    "rank": (["A", "--into", "BASE", "--rank", "3"], "--rank goes with --average and --stack, and not with --into"),
    "dtype": (["--stack", "A", "A", "--dtype", "bf16"], "--dtype goes with --into, and not with --stack"),
    "copy": (["--average", "A", "A", "--copy"], "--copy goes with --into, and not with --average"),
    "blocks": (["--average", "A", "A", "--blocks", "0=1"], "--blocks goes with --into and --stack, and not with --ave"),
    "weights": (["A", "--into", "BASE", "--weights", "1,2"], "--weights: expected 1 numbers, one for each adapter"),
    "words": (["A", "--into", "BASE", "--weights", "much"], "--weights: expected numbers such as 3,1, got 'much'"),
    "file": (["A", "--into", "BASE", "--out", "folder"], "the base is one file, so expected is a .safetensors file"),
}


@pytest.mark.parametrize(("words", "expected"), OTHERS.values(), ids=list(OTHERS))
def test_options_that_do_not_go_together_are_refused(
    words: list[str], expected: str, adapter, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places: dict[str, str] = {"A": str(adapter), "BASE": str(base)}
    told: list[str] = [places.get(word, word) for word in words]
    code, text = said(told if "--out" in told else [*told, "--out", "x.safetensors"], capsys)
    assert code == 2 and expected in text and "Traceback" not in text
    assert not (tmp_path / "x.safetensors").exists()


def test_ctrl_c_leaves_nothing(adapter, base, tmp_path, capsys, monkeypatch):
    def stop(meter: object, count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.cli.merge.Meter.add", stop)
    code, text = said([str(adapter), "--into", str(base), "--out", str(tmp_path / "x.safetensors")], capsys)
    assert code == 130 and "stopped by Ctrl-C" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- --blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("0-9=0.5,20-=0", "blocks.9.attn1.to_q", 0.5), ("0-9=0.5,20-=0", "blocks.10.attn1.to_q", 1.0),
        ("0-9=0.5,20-=0", "blocks.39.ffn.net.2", 0.0), ("-3=.25", "blocks.3.attn1.to_q", 0.25),
        ("7=2", "blocks.7.attn1.to_q", 2.0), ("7=2", "patch_embedding", 1.0),
        ("double:0-=0.5,single:1=0", "transformer_blocks.4.attn.to_q", 0.5),
        ("double:0-=0.5,single:1=0", "single_transformer_blocks.1.proj_mlp", 0.0),
        ("1-=0.5", "model.layers.1.self_attn.q_proj", 0.5),
    ],
)  # fmt: skip
def test_strengths_are_by_the_number_of_the_block(text, path, strength):
    assert BlockStrengths.parse(text).of(path) == strength


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0:9=1", "'0:9=1' cannot be read; expected block numbers and strengths such as 0-9=0.5,20-=0"),
        ("0-9", "'0-9' cannot be read"),
        ("9-0=1", "ends before it begins"),
        ("0-9=-1", "cannot be read"),
        ("0-9=0.5,5=1", "0-9=0.5 and 5=1 name the same block"),
        ("triple:0=1", "double:0-9=0.5,single:20-=0"),
    ],
)
def test_what_is_no_strength_by_block_is_refused_with_what_is_expected(text, words):
    with pytest.raises(ConfigError) as caught:
        BlockStrengths.parse(text)
    assert str(caught.value).startswith("--blocks: ") and words in str(caught.value)


def test_a_range_without_an_adapted_block_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"--blocks: 40-=0 names no block that is adapted; those are 0-39"):
        BlockStrengths.parse("40-=0").check(f"blocks.{n}.attn1.to_q" for n in range(40))
    paths = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.proj_mlp")
    with pytest.raises(ConfigError, match=r"0-9=0.5 names no block that is adapted; those are double:0-0, single:3-3"):
        BlockStrengths.parse("0-9=0.5").check(paths)
