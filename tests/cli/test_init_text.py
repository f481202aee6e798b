"""`weft init` for a language model: the model and the columns are recognised, and what is written parses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small import make_qwen3
from tests.small_text import make_text
from weft.cli.init import run
from weft.errors import ConfigError, DataError, ModelError
from weft.run.config import RunConfig, load_config

REAL = Path(__file__).parents[3] / "shared" / "data" / "chat" / "instructions_300.jsonl"
ROWS: dict[str, Any] = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "text": {"text": "a b"},
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path: str, row: Any, count: int = 40) -> Path:
    Path(path).write_text("\n".join([json.dumps(row)] * count))
    return Path(path)


def init(model: str | Path, data: str | Path) -> RunConfig:
    assert run([str(model), "--data", str(data)]) == 0
    return load_config(Path("run.yaml"))


@pytest.mark.parametrize("form", ROWS)
def test_columns_are_recognised_and_what_is_written_parses(qwen, form):
    config = init(qwen, written("chats.jsonl", ROWS[form]))
    (source,) = config.data.sources
    assert (config.family.kind, config.data.kind, config.objective.kind) == ("causal-lm", "chat", "next-token")
    assert (source.path, source.format, source.columns) == (Path("chats.jsonl"), form, {})
    assert config.data.validation_items == 2
    assert config.data.length == 512  # what this model was made for
    assert config.data.learn == ("all" if form == "text" else "assistant")


@pytest.mark.parametrize(("row", "form", "columns"), [
    ({"chat": ROWS["messages"]["messages"]}, "messages", {"messages": "chat"}),
    ({"dialog": ROWS["sharegpt"]["conversations"]}, "sharegpt", {"conversations": "dialog"}),
    ({"prompt": "a", "completion": "b"}, "alpaca", {"instruction": "prompt", "output": "completion"}),
])  # fmt: skip
def test_columns_of_other_names_are_written_down(qwen, row, form, columns):
    (source,) = init(qwen, written("chats.jsonl", row)).data.sources
    assert (source.format, dict(source.columns)) == (form, columns)


def test_columns_that_tell_nothing_are_refused_with_what_was_expected(qwen):
    with pytest.raises(DataError, match=r"no column tells its format; it has left, right\. Expected 'messages'"):
        run([str(qwen), "--data", str(written("chats.jsonl", {"left": "a", "right": "b"}))])
    assert not Path("run.yaml").exists()


def test_every_line_but_headings_says_why(qwen):
    init(qwen, written("chats.jsonl", ROWS["messages"]))
    lines = Path("run.yaml").read_text().splitlines()
    bare = [line.strip() for line in lines[2:] if line and not line.endswith(":") and "#" not in line]
    assert bare == ["kind: lora", "kind: chat"]


def test_a_model_that_is_still_to_be_fetched_is_written_with_the_command(capsys):
    config = init("qwen3-0.6b", written("chats.jsonl", ROWS["alpaca"]))
    assert config.family.source == "models/Qwen3-0.6B" and config.data.length == 2048
    commands = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert commands[0] == ["hf", "download", "Qwen/Qwen3-0.6B", "--local-dir", "models/Qwen3-0.6B"]
    assert [command[:2] for command in commands[1:]] == [["weft", "plan"], ["weft", "train"]]


def test_a_warmup_is_a_small_part_of_the_steps(qwen):
    """1000 rows of some 90 bytes are about 22 thousand tokens: 44 rows of 512, 16 steps in three epochs."""
    assert init(qwen, written("chats.jsonl", ROWS["messages"], 1000)).schedule.warmup == 0
    Path("run.yaml").unlink()
    long = {"instruction": "why? " * 800, "output": "so " * 1000}
    assert 0 < init(qwen, written("long.jsonl", long, 1000)).schedule.warmup <= 50


def test_a_model_of_another_kind_is_refused(here, qwen):
    bert = here / "bert"
    make_text(bert)
    config = json.loads((bert / "config.json").read_text()) | {"model_type": "t5", "architectures": ["T5Model"]}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="describes a 't5'"):
        run([str(bert), "--data", str(written("chats.jsonl", ROWS["text"]))])


def test_the_nearest_language_model_and_the_nearest_file_are_told(qwen):
    with pytest.raises(ConfigError, match=r"Did you mean 'qwen3-0\.6b'"):
        run(["qwen3-06b", "--data", "chats.jsonl"])
    written("chats.jsonl", ROWS["text"])
    with pytest.raises(DataError, match=r"there is no 'chat\.jsonl' .* Did you mean 'chats\.jsonl'\?"):
        run([str(qwen), "--data", "chat.jsonl"])


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no real conversations beside the checkout")
def test_real_instructions_are_written_as_a_config_that_plans(qwen):
    config = init(qwen, REAL)
    survey = config.data.survey(config.family)
    assert config.data.sources[0].format == "messages"
    assert config.data.validation_items == len(survey.validation) == 15
