"""weft convert: one file from checkpoints of many processes, against the tensors that they were written from."""

import importlib.util
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from tests.learners import batch_of as clips
from tests.learners import learner_of, small_config, trained
from tests.small import make_wan
from tests.zero_checkpoints import write_zero_checkpoint
from weft.cli.convert import run as convert
from weft.engines.shards import Shards, part_of
from weft.errors import ConfigError, ModelError
from weft.run.checkpoint import CheckpointWriter
from weft.run.consolidate import consolidate, open_source
from weft.run.retention import Retention


def converted(folder: Path, *options: str) -> dict[str, Tensor]:
    out = folder.parent / "converted.safetensors"
    assert convert([str(folder), "--out", str(out), *options]) == 0
    return load_file(out)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        assert found[name].dtype == kind and torch.equal(found[name], tensor.to(kind)), name


@pytest.fixture(scope="module", params=[(2, "bf16"), (3, "fp32")], ids=["ZeRO-2 bf16", "ZeRO-3 fp32"])
def zero(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder that DeepSpeed wrote on two processes, and the whole tensors that it had."""
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    stage, precision = request.param
    folder = tmp_path_factory.mktemp("zero") / "checkpoints"
    return folder, write_zero_checkpoint(folder, stage, precision=precision)


def test_a_zero_checkpoint_holds_the_masters_that_deepspeed_had(zero):
    folder, whole = zero
    assert_equal(converted(folder, "--dtype", "fp32"), whole, torch.float32)
    (folder.parent / "converted.safetensors").unlink()
    assert_equal(converted(folder / "global_step3"), whole, torch.bfloat16)


def test_a_zero_checkpoint_that_lacks_a_rank_or_could_run_code_is_refused(zero, tmp_path):
    folder = shutil.copytree(zero[0] / "global_step3", tmp_path / "global_step3")
    (file,) = folder.glob("*rank_1_mp*optim_states.pt")
    file.unlink()
    with pytest.raises(ModelError, match="written by 2 processes, and the files of 1 are there"):
        open_source(folder)
    torch.save({"optimizer_state_dict": Path("here")}, file)
    with pytest.raises(ModelError, match=r"pathlib\.\w+; it is not read"):
        open_source(folder)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        "model.weight": torch.randn(7, 5, generator=chance),
        "model.count": torch.arange(3),
        "model.scale": torch.tensor(0.5),
        "optim.weight": torch.randn(7, 5, generator=chance).bfloat16(),
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_checkpoint_is_read_once_its_pickle_is_trusted(tensors, tmp_path, capsys):
    dcp.save({**tensors, "step": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ModelError, match="say --allow-pickle"):
        converted(tmp_path / "dcp")
    assert_equal(converted(tmp_path / "dcp", "--allow-pickle"), tensors, torch.bfloat16)
    said = capsys.readouterr().out
    assert "left out, for they are no tensors: 1, such as step" in said and "model., optim." in said


def test_a_checkpoint_of_safetensors_needs_no_trust_and_one_beginning_of_names_can_be_taken(tensors, tmp_path):
    Shards().write(tmp_path / "dcp", {name: part_of(tensor) for name, tensor in tensors.items()})
    expected = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    assert_equal(converted(tmp_path / "dcp", "--under", "model.", "--dtype", "fp16"), expected, torch.float16)
    (tmp_path / "converted.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"begins with 'modle\.'\. Did you mean 'model\.'"):
        converted(tmp_path / "dcp", "--under", "modle.")


def test_of_a_checkpoint_of_ours_the_adapter_is_taken(tmp_path):
    config = small_config(
        tmp_path, make_wan(tmp_path / "model"), schedule={"steps": 2, "warmup": 0}, ema={"decay": 0.5}
    )
    learner = learner_of(config)
    trained(learner, config, [clips(2)])
    writer = CheckpointWriter(config.folder, Retention(), background=False)
    writer.save(learner, config.resolved())
    (folder,) = writer.done()
    expected = {name: p.detach() for name, p in learner.model.adapters.parameters("default").items()}
    assert_equal(converted(folder, "--dtype", "fp32"), expected, torch.float32)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json is not what was saved"):
        open_source(folder)


class Watched:
    """A source that counts how many of its tensors are alive."""

    left_out: list[str] = []

    def __init__(self, count: int) -> None:
        self.shapes = {f"{i}": ((64, 64), torch.float32) for i in range(count)}
        self.alive = self.most = 0

    def read(self, name: str) -> Tensor:
        tensor = torch.full((64, 64), float(name))
        self.alive += 1
        weakref.finalize(tensor, self.gone)
        self.most = max(self.most, self.alive)
        return tensor

    def gone(self) -> None:
        self.alive -= 1


def test_however_many_tensors_there_are_no_more_than_two_are_in_memory(tmp_path):
    source = Watched(50)
    consolidate(source, tmp_path / "all.safetensors", torch.bfloat16)
    assert source.most <= 2
    assert {name: float(t[0, 0]) for name, t in load_file(tmp_path / "all.safetensors").items()} == {
        str(i): float(i) for i in range(50)
    }


def test_a_folder_of_something_else_and_a_file_that_is_there_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint that is known"):
        open_source(tmp_path)
    with pytest.raises(ModelError, match="is no folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "old.safetensors").touch()
    with pytest.raises(ConfigError, match="is there already"):
        convert([str(tmp_path), "--out", str(tmp_path / "old.safetensors")])
    with pytest.raises(ConfigError, match=r"should end in \.safetensors"):
        convert([str(tmp_path), "--out", str(tmp_path / "file.pt")])
