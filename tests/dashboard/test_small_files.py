"""What lies in a run's folder and is no file of ours: pipes, and YAML that is small on disk and endless to a reader."""

import os
import threading
from pathlib import Path

import pytest

from tests.dashboard.written import RunWriter
from weft.dashboard.regular import opened
from weft.dashboard.small_files import yaml_of
from weft.dashboard.store import Store

NOW = 1_795_274_532.0
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are of POSIX")
def test_pipes_in_a_runs_folder_hold_up_nobody(tmp_path) -> None:
    run = RunWriter(tmp_path / "piped", NOW - 100)
    run.begin()
    run.step(1)
    for name in ("heartbeat.rank0.json", "run.rank0.log", "health.jsonl", "events.rank1.jsonl", "training_gpu0.json"):
        os.mkfifo(run.folder / name)
    found: list[object] = []

    def look() -> None:
        store = Store(tmp_path, lambda: NOW)
        found.append((store.run("piped")["step"], store.health("piped"), store.log("piped")))
        store.series("piped", ["train/loss"], rank=1)
        found.append(store.status())

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(timeout=20)
    assert found[0] == (1, {"roles": {}}, []) and len(found) == 2
    with pytest.raises(OSError, match="no regular file"):
        opened(run.folder / "run.rank0.log")


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]\n", "[" * 20_000, "a: " + "{b: " * 5000], ids=len)
def test_a_yaml_bomb_is_an_empty_config(tmp_path: Path, text) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert yaml_of(tmp_path / "config.yaml") == {}


def test_a_config_whose_lists_are_shared_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert yaml_of(tmp_path / "config.yaml") == {"a": [1, 2], "b": [1, 2]}
