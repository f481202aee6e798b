"""weft merge: the average of what adapters change, against dense matrices."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from tests.program import Program
from tests.small import make_clips, merged
from weft.cli.main import main
from weft.cli.merge import run as merge
from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter

PATHS = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2")


def adapter(seed: int, rank: int, alpha: float, conv_rank: int | None = None, **facts) -> SavedAdapter:
    """Random factors on two linear layers 12 -> 9, and on a convolution."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in PATHS:
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, 12, generator=chance)
        tensors[f"{path}.lora_B.weight"] = torch.randn(9, rank, generator=chance)
    if conv_rank:
        tensors["patch_embedding.lora_A.weight"] = torch.randn(conv_rank, 4, 1, 2, 2, generator=chance)
        tensors["patch_embedding.lora_B.weight"] = torch.randn(9, conv_rank, 1, 1, 1, generator=chance)
        facts |= {"conv_rank": conv_rank, "conv_alpha": 1.5}
    return SavedAdapter(tensors, rank, alpha, **{"metadata": {"weft.base": "abc", "weft.step": str(seed)}, **facts})


def deltas(adapter: SavedAdapter) -> dict[str, torch.Tensor]:
    """Dense changes in fp64."""
    t = {key: tensor.double().flatten(1) for key, tensor in adapter.tensors.items()}
    return {p: adapter.scale_at(p) * t[f"{p}.lora_B.weight"] @ t[f"{p}.lora_A.weight"] for p in adapter.paths}


@pytest.fixture
def parents() -> list[SavedAdapter]:
    return [adapter(1, 4, 2.0, 3), adapter(2, 2, 8.0, 2, rslora=True), adapter(3, 3, 3.0, 1)]


@pytest.fixture
def folders(parents, tmp_path) -> list[str]:
    styles = (PeftFolder(), DiffusersFile(), PeftFolder())
    return [str(s.write(tmp_path / str(i), p)) for i, (s, p) in enumerate(zip(styles, parents, strict=True))]


def test_the_change_of_an_average_is_the_average_of_the_changes(parents, folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert merge(["--average", *folders, "--out", str(out)]) == 0
    for file in (out, out / "pytorch_lora_weights.safetensors"):
        made = read_adapter(file)
        assert (made.rank, made.alpha, made.scale, made.conv_rank, made.rslora) == (9, 9.0, 1.0, 6, False)
        for path, change in deltas(made).items():
            assert_close(change, sum(deltas(p)[path] for p in parents) / 3, atol=1e-6, rtol=1e-6)
    assert "the exact average" in capsys.readouterr().out


def test_shares_are_weights_over_their_sum(parents, folders, tmp_path):
    merge(["--average", *folders, "--out", str(tmp_path / "out"), "--weights", "3,1,4"])
    for path, change in deltas(read_adapter(tmp_path / "out")).items():
        expected = sum(w / 8 * deltas(p)[path] for w, p in zip((3, 1, 4), parents, strict=True))
        assert_close(change, expected, atol=1e-6, rtol=1e-6)


def test_a_smaller_rank_is_the_nearest_of_that_rank_and_its_loss_is_told(parents, folders, tmp_path, capsys):
    merge(["--average", *folders, "--out", str(tmp_path / "out"), "--rank", "4"])
    made = read_adapter(tmp_path / "out")
    assert (made.rank, made.conv_rank) == (4, 4)
    lost, whole = [], []
    for path, change in deltas(made).items():
        exact = sum(deltas(p)[path] for p in parents) / 3
        u, s, vh = torch.linalg.svd(exact)
        assert_close(change, u[:, :4] * s[:4] @ vh[:4], atol=1e-5, rtol=1e-5)
        lost.append(s[4:].norm() / s.norm())
        whole.append((s[4:].square().sum(), s.square().sum()))
    said = capsys.readouterr().out
    assert f"{max(lost):8.2%}" in said
    cut, norm = (sum(pair[i] for pair in whole) for i in (0, 1))
    assert f"{(cut / norm).sqrt():.2%} is lost" in said


def test_the_mean_of_factors_would_have_been_something_else(parents, folders, tmp_path):
    """Two equal changes, the factors of one with the other sign: the mean of the factors is zero."""
    turned = {key: -tensor for key, tensor in parents[0].tensors.items()}
    other = str(PeftFolder().write(tmp_path / "turned", replace(parents[0], tensors=turned)))
    merge(["--average", folders[0], other, "--out", str(tmp_path / "out")])
    for path, change in deltas(read_adapter(tmp_path / "out")).items():
        assert_close(change, deltas(parents[0])[path], atol=1e-6, rtol=1e-6)


def test_the_file_names_its_parents_and_keeps_what_they_agree_in(folders, tmp_path):
    merge(["--average", *folders, "--out", str(tmp_path / "out"), "--weights", "2,1,1"])
    header = read_adapter(tmp_path / "out").metadata
    told = json.loads(header["weft.merged"])
    assert [p["adapter"] for p in told["parents"]] == folders and [p["share"] for p in told["parents"]] == [
        0.5,
        0.25,
        0.25,
    ]
    assert [p["step"] for p in told["parents"]] == ["1", "2", "3"] and told["method"] == "average of changes"
    assert header["weft.base"] == "abc" and "weft.step" not in header


OTHERS = {
    "layers": ({"layers": "other"}, "stand on other layers: 2 are in one alone, such as 'blocks.0.attn1.to_q'"),
    "kind": ({"kind": "oft"}, "is of kind oft, and the mean of several such changes"),
    "dora": ({"dora": True}, "is of kind DoRA, and the mean of several such changes"),
    "base": ({"metadata": {"weft.base": "xyz"}}, "was trained on other base weights than"),
    "expert": ({"metadata": {"weft.base": "abc", "weft.expert": "low"}}, "was trained for another expert than"),
}


@pytest.mark.parametrize(("fields", "words"), OTHERS.values(), ids=list(OTHERS))
def test_adapters_without_a_common_average_are_refused_by_name(fields, words, tmp_path):
    first = adapter(1, 4, 2.0, metadata={"weft.base": "abc", "weft.expert": "high"})
    second = adapter(2, 4, 2.0)
    if "layers" in fields:
        tensors = {key.replace("attn1", "attn2"): tensor for key, tensor in second.tensors.items()}
        second = replace(second, tensors=tensors)
    elif "kind" in fields:
        weights = {f"{path}.oft_R.weight": torch.zeros(3, 6) for path in PATHS}
        second = SavedAdapter(weights, 0, 0.0, kind="oft", options={"oft_block_size": 4})
    elif "dora" in fields:
        magnitudes = {f"{path}.lora_magnitude_vector": torch.ones(9) for path in PATHS}
        second = replace(second, tensors={**second.tensors, **magnitudes}, dora=True)
    else:
        second = replace(second, **fields)
    paths = [str(PeftFolder().write(tmp_path / name, a)) for name, a in (("a", first), ("b", second))]
    with pytest.raises(ModelError, match=words):
        merge(["--average", *paths, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_adapters_of_models_of_other_sizes_are_refused(folders, parents, tmp_path):
    wide = {k: torch.zeros(t.shape[0], 24, *t.shape[2:]) if "_A" in k else t for k, t in parents[0].tensors.items()}
    other = str(PeftFolder().write(tmp_path / "wide", replace(parents[0], tensors=wide)))
    with pytest.raises(ModelError, match=r"models of other sizes: 'blocks\.0\.attn1\.to_q' is"):
        merge(["--average", folders[0], other, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--weights", "1,2"], "expected 3 numbers above 0"),
        (["--weights", "1,0,2"], "expected 3 numbers above 0"),
        (["--weights", "1,a,2"], "expected numbers such as 3,1, got '1,a,2'"),
        (["--rank", "0"], "expected a whole number of at least 1"),
    ],
)
def test_impossible_wishes_are_refused(more, words, folders, tmp_path):
    with pytest.raises(ConfigError, match=words):
        merge(["--average", *folders, "--out", str(tmp_path / "out"), *more])


def test_one_adapter_is_no_average_and_a_full_folder_is_left_alone(folders, tmp_path):
    with pytest.raises(ConfigError, match="needs two adapters at least"):
        merge(["--average", folders[0], "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="is there already and not empty"):
        merge(["--average", *folders, "--out", str(tmp_path / "0")])
    assert read_adapter(tmp_path / "0").rank == 4


@pytest.mark.slow
def test_two_independent_processes_and_their_average(plain, tmp_path, capsys):
    """Row C3: two runs at once, each on its own clips, and one adapter from both."""
    quick = {"schedule": {"steps": 2, "warmup": 0}, "validation": {"every": 0}, "save": {"every": 0}}
    processes = []
    for number in (0, 1):
        clips = make_clips(tmp_path / f"clips{number}", count=4)
        for other in (0, 1) if number else (2, 3):
            (clips / f"{other}.mp4").unlink()
            (clips / f"{other}.txt").unlink()
        change = {
            "name": f"run_gpu{number}",
            "data": {"sources": [{"path": str(clips)}], "validation_items": 0,
                     "cache_folder": str(tmp_path / f"cache{number}")},
        }  # fmt: skip
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(merged(merged(plain, quick), change)))
        processes.append(Program(["train", str(file)]))
    said = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    runs = [tmp_path / "runs" / f"run_gpu{number}" for number in (0, 1)]
    out = tmp_path / "runs" / "run_average"
    assert main(["merge", "--average", str(runs[0] / "adapter"), str(runs[1]), "--out", str(out)]) == 0
    made, parents = read_adapter(out), [read_adapter(run / "adapter") for run in runs]
    assert made.rank == 8 and Path(capsys.readouterr().out.splitlines()[-1]) == out
    for path, change in deltas(made).items():
        first, second = (deltas(parent)[path] for parent in parents)
        assert first.abs().max() > 0 and not torch.equal(first, second)
        assert_close(change, (first + second) / 2, atol=1e-6, rtol=1e-6)
    assert [parent["run"] for parent in json.loads(made.metadata["weft.merged"])["parents"]] == ["run_gpu0", "run_gpu1"]
    size = ["--frames", "5", "--width", "32", "--height", "32", "--steps", "1"]
    assert main(["sample", str(out), "--prompt", "a square", *size, "--out", str(tmp_path / "videos")]) == 0
