"""The continual demo's files: what is written is what `weft train` takes, and the banner is told first."""

from pathlib import Path

import pytest

from weft.cli.main import main
from weft.demo.continual import LEARNERS, write_world
from weft.demo.drift import BANNER, Drift
from weft.run.config import load_config


def test_the_configs_extend_the_shipped_parts_and_begin_with_the_trained_base(tmp_path):
    world = write_world(tmp_path, Drift(per_year=20), epochs=2)
    base = load_config(world.base)
    for learner in LEARNERS:
        config = load_config(world.configs[learner])
        assert (config.name, config.objective.kind, config.adapter.kind) == (learner, learner, "lora")
        assert Path(config.family.source) == base.folder / "adapter"
        assert config.data.path == world.drift.documents
        assert config.schedule.epochs == 2


def test_the_data_alone_come_with_the_banner_and_what_to_do_next(tmp_path, capsys):
    assert main(["demo", "--continual", "--data-only", "--out", str(tmp_path / "demo")]) == 0
    told = capsys.readouterr().out
    assert told.startswith(BANNER) and f"weft train {tmp_path / 'demo' / 'configs' / 'replay.yaml'}" in told
    assert not (tmp_path / "demo" / "runs").exists()


@pytest.mark.parametrize(("words", "said"), [
    (["--continual", "--steps", "3"], "--steps is of clips"),
    (["--data-only"], "--data-only is of documents"),
])  # fmt: skip
def test_options_of_the_other_demo_are_refused(tmp_path, capsys, words, said):
    assert main(["demo", "--out", str(tmp_path / "demo"), *words]) == 2
    assert said in capsys.readouterr().err
