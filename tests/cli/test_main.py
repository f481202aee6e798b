"""The command itself: help at once, verbs by name, errors in one line, exit codes."""

import resource
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from weft import plugins
from weft.cli import main as command
from weft.cli.main import SUMMARIES, main
from weft.errors import ConfigError, DataError

HEAVY = ("torch", "pydantic", "rich", "yaml", "numpy", "transformers", "diffusers")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Sequence[str]], int]], None]:
    """Let a function stand in for the verb 'demo'."""

    def put(run: Callable[[Sequence[str]], int]) -> None:
        monkeypatch.setattr(plugins, "find", lambda slot, name: run)

    return put


def fails_with(error: BaseException) -> Callable[[Sequence[str]], int]:
    def run(argv: Sequence[str]) -> int:
        raise error

    return run


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules that a fresh process has imported after a command."""
    code = (
        "import sys; from weft.cli.main import main; main(sys.argv[1:]); "
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_help_comes_at_once_and_imports_nothing_heavy():
    assert not modules_after("--help") & set(HEAVY)
    # Processor seconds, the least of five: other work on the machine is not ours.
    assert min(seconds_of_help() for _ in range(5)) < 0.3


def seconds_of_help() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "weft.cli.main", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [("config", "explain", "adapter"), ("config", "schema"), ("show", "--help")])
def test_verbs_that_only_read_import_no_torch(arguments: tuple[str, ...]):
    assert "torch" not in modules_after(*arguments)


def test_every_verb_has_its_line_in_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in plugins.BUILT_IN["verb"])
    assert set(plugins.BUILT_IN["verb"]) <= set(SUMMARIES)


def test_an_unknown_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: weft has no verb 'trian'. Did you mean 'train'?\n"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "weft 0.1.0\n"


def test_each_problem_of_a_config_is_one_line_without_a_traceback(verb, capsys: pytest.CaptureFixture[str]):
    verb(fails_with(ConfigError("run.yaml:1:1: one.", "run.yaml:2:1: two.")))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "error: run.yaml:1:1: one.\nerror: run.yaml:2:1: two.\n"


def test_debug_before_the_verb_shows_where_an_error_arose(verb, capsys: pytest.CaptureFixture[str]):
    verb(fails_with(DataError("clips: nothing there.")))
    assert main(["--debug", "demo"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: clips: nothing there.\n")


def test_a_fault_of_ours_shows_a_traceback_and_asks_for_a_report(verb, capsys: pytest.CaptureFixture[str]):
    verb(fails_with(ZeroDivisionError("oh")))
    assert main(["demo"]) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError: oh" in said and "Please report it" in said.splitlines()[-1]


def test_ctrl_c_ends_with_130_and_one_line(verb, capsys: pytest.CaptureFixture[str]):
    verb(fails_with(KeyboardInterrupt()))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C.\n"


def test_a_missing_optional_package_is_told_with_the_command_that_installs_it(verb, capsys: pytest.CaptureFixture[str]):
    verb(fails_with(ModuleNotFoundError("No module named 'PIL'", name="PIL")))
    assert main(["demo"]) == 2
    assert "Run: pip install 'weft[video]'" in capsys.readouterr().err


def test_a_missing_module_that_is_none_of_our_packages_is_a_fault(verb, capsys: pytest.CaptureFixture[str]):
    verb(fails_with(ModuleNotFoundError("No module named 'nowhere'", name="nowhere")))
    assert main(["demo"]) == 1
    assert command._extra_of("nowhere") is None


def test_a_closed_pipe_is_no_error():
    code = f"{sys.executable} -m weft.cli.main config schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == ""


def test_what_argparse_refuses_ends_with_2(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "nothing"]) == 2
    assert main(["config", "--help"]) == 0
