"""`weft demo`, whole: the README's first command."""

import pytest

from tests.program import Program
from weft.cli.main import main
from weft.demo.concept import Proof
from weft.demo.judge import Verdict


def verdict(right: bool) -> Verdict:
    return Verdict(right, right, right, None, None, 0.0)


def test_the_proof_fails_when_training_changed_nothing():
    nothing = tuple(verdict(False) for _ in range(6))
    everything = tuple(verdict(True) for _ in range(6))
    assert not Proof(nothing, nothing).learned
    assert not Proof(everything, everything).learned  # then the base knew it already
    assert Proof(nothing, everything).learned


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_trains_a_lora_on_mp4_files_and_proves_in_the_videos_that_it_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = Program(["demo"])
    said, _ = demo.communicate(timeout=580)
    assert demo.returncode == 0, said[-4000:]
    assert "before   after" in said
    out = tmp_path / "weft-demo"
    for name in ("before_after.mp4", "before_after.png", "runs/zorp/adapter/adapter_model.safetensors"):
        assert (out / name).stat().st_size > 1000, name
    assert main(["demo"]) == 2
    assert "holds an earlier demo" in capsys.readouterr().err
