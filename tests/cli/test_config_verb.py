"""`weft config`: show, explain and schema from the command line."""

import json
from pathlib import Path

import pytest

from weft.cli.config import run
from weft.cli.init import run as init
from weft.config.explain import schema
from weft.errors import ConfigError
from weft.run.config import RunConfig, load_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.jsonl").touch()
    init(["tiny-wan", "--data", "clips.jsonl"])
    return "run.yaml"


def test_show_prints_a_config_that_reads_back_as_itself(config: str, tmp_path: Path, capsys):
    capsys.readouterr()
    assert run(["show", config, "--origin", "adapter.rank=4", "samples.prompts=['a: b', off]"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config("shown.yaml") == load_config(config, ["adapter.rank=4", "samples.prompts=['a: b', off]"])
    assert "  rank: 4" in shown and "# (command line)" in shown and "# run.yaml:" in shown and "# default" in shown


def test_show_tells_every_mistake(config: str):
    with pytest.raises(ConfigError) as caught:
        run(["show", config, "adapter.rnak=4", "schedule.steps=many"])
    assert len(caught.value.problems) == 2


def test_schema_is_the_json_schema_of_a_run(capsys):
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema(RunConfig)


def test_explain_needs_no_section(capsys):
    assert run(["explain"]) == 0 and run(["explain", "adapter.rank"]) == 0
    assert "adapter.rank = 16" in capsys.readouterr().out
