"""A small model and clips for the verbs that start processes, and how one is started."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.interpreter import interpreter
from tests.program import Program
from tests.small import make_clips, make_wan, merged, plain_config

Start = Callable[..., Program]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verbs")
    make_wan(root / "model")
    make_clips(root / "clips", count=5)
    return root


@pytest.fixture
def run_yaml(small_world: Path, tmp_path: Path) -> Path:
    """A config of four steps, whose cache is shared and whose runs are the test's own."""
    plain = plain_config(tmp_path, small_world / "model", small_world / "clips")
    change = {
        "schedule": {"steps": 4},
        "data": {"cache_folder": str(small_world / "cache")},
        "validation": {"every": 0},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(merged(plain, change)))
    return path


@pytest.fixture
def start() -> Start:
    """Start `weft` as a process of its own, as a shell does in a group of its own; both outputs in one."""

    def started(*arguments: str, **environment: str) -> Program:
        return Program(arguments, environment)

    return started


@pytest.fixture(scope="module")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of a Python that has imported already what `weft` needs."""
    with interpreter(tmp_path_factory.mktemp("python")) as path:
        yield str(path)
