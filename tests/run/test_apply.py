"""An adapter used again: as the start of another run, and by `weft sample`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.small import config_of, merged, plain_config
from weft.cli.sample import run as sample
from weft.errors import ConfigError, ModelError
from weft.formats.reading import read_adapter
from weft.run.apply import find_adapters
from weft.run.assemble import earlier_adapter
from weft.run.checks import check
from weft.run.start import train_run

ONE_STEP = {"schedule": {"steps": 1, "warmup": 0}, "validation": {"every": 0}}


def silent(event: object) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    plain = plain_config(tmp_path_factory.mktemp("finished"), world / "model", world / "clips")
    plain["data"]["cache_folder"] = str(world / "cache")
    config = config_of(plain)
    train_run(config, silent)
    return config.folder


@pytest.fixture
def trained(finished, plain) -> Path:
    """The adapter of a finished run of the test's own."""
    run = shutil.copytree(finished, config_of(plain).folder)
    return run / "adapter"


def change(tensors: dict[str, torch.Tensor], scale: float, path: str) -> torch.Tensor:
    return scale * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]


def test_a_run_starts_from_an_adapter_at_the_strength_that_it_had(plain, trained):
    """Another alpha and a learning rate of nearly nothing: the change of each layer stays what it was."""
    adapter = {"start_from": str(trained), "alpha": 1}
    again = config_of(merged(plain, ONE_STEP), name="again", adapter=adapter, optimizer={"lr": 1e-12})
    train_run(again, silent)
    old, new = read_adapter(trained), read_adapter(again.folder / "adapter")
    assert (old.scale, new.scale) == (1.0, 0.25)
    for path in old.targets:
        before, after = (change(dict(a.tensors), a.scale, path) for a in (old, new))
        assert before.abs().max() > 0
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-7)


def test_of_a_file_for_both_experts_each_gets_its_own_to_sample_with_and_to_begin_with(trained, tmp_path):
    plain = read_adapter(trained).tensors
    both = {f"transformer{n}.{key}": (2.0 if n else 1.0) * tensor for n in ("", "_2") for key, tensor in plain.items()}
    save_file(both, tmp_path / "both.safetensors")
    found = find_adapters([tmp_path / "both.safetensors"], [1.0])
    assert [one.expert for one in found] == ["high", "low"]
    for one in found:
        begun = earlier_adapter(tmp_path / "both.safetensors", one.expert)
        for key, tensor in plain.items():
            expected = (2.0 if one.expert == "low" else 1.0) * tensor
            assert torch.equal(one.adapter.tensors[key], expected) and torch.equal(begun.tensors[key], expected)


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"rank": 8}, r"of kind lora and rank 4, which the config cannot continue\. Write adapter\.rank=4"),
        ({"targets": "ffn"}, "differ in .* layers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(plain, trained, adapter, told):
    with pytest.raises(ConfigError, match=told):
        check(config_of(plain, adapter={"start_from": str(trained), **adapter}))


SIZE = ["--frames", "5", "--width", "32", "--height", "32", "--steps", "2"]


def test_sample_writes_a_video_for_each_prompt_and_the_bases_beside_it(trained, tmp_path, capsys):
    asked = ["--prompt", "a square", "--prompt", "a circle", "--compare", "--out", str(tmp_path / "out")]
    assert sample([str(trained), *asked, *SIZE]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"00.mp4", "01.mp4", "00_base.mp4", "01_base.mp4", "sheet.png"}
    assert "other base weights" not in capsys.readouterr().err


def test_sample_refuses_a_size_that_the_model_cannot_make(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"--width: 40 does not divide by 16"):
        sample([str(trained), "--prompt", "x", "--out", str(tmp_path), *SIZE, "--width", "40"])


def test_sample_on_another_base_says_that_the_layers_are_not_there(trained, tmp_path):
    from tests.small import make_wan

    other = make_wan(tmp_path / "other", layers=1)
    with pytest.raises(ModelError, match=r"this base has no 'blocks\.1\."):
        sample([str(trained), "--prompt", "x", "--out", str(tmp_path / "out"), "--base", str(other), *SIZE])


def test_a_header_by_another_version_is_refused_in_one_sentence(trained):
    config = {"family": {"kind": "wan", "source": "tiny-wan", "subfolder": "transformer"}}
    for file in trained.glob("*.safetensors"):
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = {**opened.metadata(), "weft.config": json.dumps(config)}
        save_file(tensors, file, metadata)
    with pytest.raises(ConfigError, match=r"this version of Weft does not know: subfolder\. It was written by another"):
        sample([str(trained), "--prompt", "a red fox"])
