"""`weft doctor`: every check in one report, exit code 1 when one failed."""

import json

import pytest

from weft.cli import checks
from weft.cli.doctor import run
from weft.engines.transfer import Probe
from weft.engines.visible import Installed, visible_gpus


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9", ">=2.11,<2.14", False),
        ("6", ">=6", True),
        ("6.0.3", "==6", False),
        ("3.0.0rc1", "<3", False),
        ("1.0", "", True),
    ],
)
def test_a_version_is_compared_by_its_numbers(version: str, wanted: str, holds: bool):
    assert checks.within(version, wanted) is holds


def test_an_optional_package_may_be_missing_and_a_needed_one_may_not():
    assert checks.package("no-such-package", ">=1", "video").status == "note"
    assert checks.package("no-such-package", ">=1", "").status == "fail"
    assert checks.package("pytest", ">=1000", "").status == "warn"


def test_this_machine_passes_and_the_report_names_each_group(capsys: pytest.CaptureFixture[str]):
    assert run(["--no-copies"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{group}\n" in f"\n{said}" for group in ("packages", "cpu", "machine"))
    assert "H.264 works" in said and said.splitlines()[-1].endswith("checks, none failed.")


def test_a_failed_probe_makes_exit_code_1_and_tells_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    broken = Probe("round trip 1 MiB", "cpu", False, "3 of 3 wrong: all zeros", 0.1)
    monkeypatch.setattr(checks, "self_test", lambda device: [broken])
    assert run(["--json"]) == 1
    failed = [check for check in json.loads(capsys.readouterr().out) if check["status"] == "fail"]
    assert len(failed) == 1 and "engine.verified_copy: true" in failed[0]["detail"]


def test_a_folder_that_cannot_be_written_is_a_failed_check(tmp_path):
    (found,) = checks.file_system(tmp_path / "nowhere")
    assert found.status == "fail" and "Work in another one" in found.detail


def test_each_visible_gpu_is_listed_with_its_number_and_how_a_child_is_given_it():
    two = (Installed(0, "GPU-aa", "V100"), Installed(1, "GPU-bb", "V100"))
    (line,) = checks.gpus(visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, two, ["bb"]))
    assert line.name == "gpu 1"
    assert line.detail == "cuda:0, the driver's 1, CUDA_VISIBLE_DEVICES=1, V100, GPU-bb"


def test_a_variable_that_hides_every_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    (line,) = checks.gpus(visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, None))
    assert (line.status, line.detail) == ("note", "none. CUDA_VISIBLE_DEVICES is '-1'.")
